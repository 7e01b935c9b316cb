"""Pretraining of the vision tower: name every patch, and name the whole picture from [CLS]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel

from winnow.learn.targets import CLASSES, COLOR_NAMES, ROW_SIZES, bag, dense_targets
from winnow.world import Spec, scene

MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)) * 255
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)) * 255

CROWDED = Spec(things=(8, 18), group=0.2, labelled=(0.0, 0.5, 0.9), chart=0.3, document=0.35)
TEXT = Spec(things=(5, 10), group=0.2, labelled=(0.9, 1.0), chart=0.1, document=0.6)


def pixels(images: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] → normalised float [B, 3, S, S]; the same as CLIP's image processor gives."""
    mean, std = MEAN.to(images.device)[:, None, None], STD.to(images.device)[:, None, None]
    return images.permute(0, 3, 1, 2).contiguous().float().sub_(mean).div_(std)


@dataclass
class Batch:
    """`images` uint8 [B, S, S, 3]; `targets` [B, rows, N]; `bags` [B, words], rows summing to 1."""

    images: Tensor
    targets: Tensor
    bags: Tensor


def make_batch(first_seed: int, count: int, size: int, grid: int) -> Batch:
    """Scenes of `count` consecutive seeds: half crowded, a quarter full of text, a quarter ordinary."""
    images, targets, bags = [], [], []
    for seed in range(first_seed, first_seed + count):
        spec = (CROWDED, TEXT, CROWDED, Spec())[seed % 4]
        drawn = scene(seed, size, spec=spec, types=())
        images.append(drawn.pixels)
        targets.append(dense_targets(drawn, grid).reshape(len(ROW_SIZES), -1))
        bags.append(bag(drawn))
    words = torch.from_numpy(np.stack(bags))
    return Batch(
        torch.from_numpy(np.stack(images)),
        torch.from_numpy(np.stack(targets)).long(),
        words / words.sum(-1, keepdim=True).clamp_min(1),
    )


class Heads(nn.Module):
    """Linear read-outs used in pretraining only."""

    def __init__(self, width: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(width)
        self.dense = nn.Linear(width, sum(ROW_SIZES) + 2 * grid)
        self.bag = nn.Linear(width, len(CLASSES) + len(COLOR_NAMES))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """[B, N, D] → logits of each target row, then of the patch's row and column."""
        return self.dense(self.norm(features)).split((*ROW_SIZES, self.grid, self.grid), -1)


def features(tower: CLIPVisionModel, images: Tensor) -> Tensor:
    """Patch features of the last layer but one [B, N, D], as LLaVA reads them; the last layer is not run."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels(images)))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, None)
    return hidden[:, 1:]


def shown_first(targets: Tensor, count: int, mix: float) -> Tensor:
    """Indices [B, count] of patches: those that show something first, ties (and a `mix` > 1 share) at random."""
    shown = (targets[:, 0] > 0).float()
    return (shown + torch.rand(shown.shape, device=shown.device) * mix).topk(count, -1).indices


def loss(
    tower: CLIPVisionModel,
    heads: Heads,
    batch: Batch,
    keep: int | None,
    parts: dict[str, Tensor] | None = None,
    cls_objective: bool = True,
) -> Tensor:
    """Dense naming on the last layer but one and, with `cls_objective`, a bag of words on the final [CLS].

    With `keep` only so many patches enter the encoder, those that show something first: cheaper steps.
    `parts` receives the accuracies of this batch.
    """
    targets, grid = batch.targets, heads.grid
    hidden = tower.embeddings(pixels(batch.images))
    index = torch.arange(grid * grid, device=targets.device).expand(len(targets), -1)
    if keep is not None:
        index = shown_first(targets, keep, 1.2)
        kept = hidden[:, 1:].gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
        hidden = torch.cat([hidden[:, :1], kept], 1)
        targets = targets.gather(2, index[:, None].expand(-1, targets.shape[1], -1))
    hidden = tower.pre_layrnorm(hidden)
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, None)
    logits = [x.float().flatten(0, 1) for x in heads(hidden[:, 1:])]
    kind, color, tens, ones, rank, center = targets.unbind(1)
    weight = torch.ones(len(CLASSES), device=targets.device)
    weight[0] = 0.3

    def where_any(row: int, target: Tensor) -> Tensor:
        """Cross-entropy on the patches where this target is not 0; 0 when there is none."""
        chosen = target.flatten() > 0
        return F.cross_entropy(logits[row][chosen], target.flatten()[chosen]) if chosen.any() else logits[row].sum() * 0

    out = 2 * F.cross_entropy(logits[0], kind.flatten(), weight=weight)
    out = out + 0.5 * F.cross_entropy(logits[1], color.flatten())
    out = out + 0.4 * (where_any(2, tens) + where_any(3, ones)) + 0.3 * where_any(4, rank)
    out = out + 0.7 * F.cross_entropy(logits[5], center.flatten(), weight=logits[5].new_tensor([1.0, 3.0]))
    place = F.cross_entropy(logits[6], (index // grid).flatten()) + F.cross_entropy(logits[7], (index % grid).flatten())
    out = out + 0.3 * place
    if cls_objective:
        last = tower.encoder.layers[-1](hidden, None)
        named = heads.bag(tower.post_layernorm(last[:, 0])).float().log_softmax(-1)
        out = out - 0.5 * (named * batch.bags).sum(-1).mean()
    if parts is not None:
        word = (kind >= CLASSES.index("ACE")) & (kind < CLASSES.index("number"))
        for name, row, target, among in (
            ("patch", 0, kind, kind > 0),
            ("word", 0, kind, word),
            ("tens", 2, tens, tens > 0),
            ("ones", 3, ones, ones > 0),
            ("color", 1, color, color > 0),
            ("row", 6, index // grid, kind > 0),
        ):
            right = (logits[row].argmax(-1) == target.flatten())[among.flatten()]
            parts[name] = torch.tensor([float(right.sum()), float(right.numel())])
    return out
