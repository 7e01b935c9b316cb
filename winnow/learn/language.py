"""Training of the projector and the language model on a frozen tower."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from winnow.learn.packing import IGNORED, Pack, additive_mask, pack, prefix_ids, right_by_type
from winnow.learn.targets import ROWS, Alignment, dense_targets, extents
from winnow.learn.tower import features, shown_first
from winnow.reference.presets import Preset
from winnow.world import Spec, ask, scene

ALIGNMENT_WEIGHT = 0.15


@dataclass(frozen=True)
class Keep:
    """Which visual tokens a training step leaves: shares of steps with all tokens and with those of things first.

    The other steps keep a random subset. `counts` are shares of the picture's tokens to draw from; `compact` is the
    share of reduced steps in which the kept tokens get consecutive positions instead of their own.
    """

    full: float
    shown: float
    counts: tuple[float, ...]
    compact: float = 0.0

    def draw(self, rng: random.Random, targets: Tensor) -> tuple[Tensor, Tensor, int]:
        """Indices [B, M] of the kept tokens, ascending, their offsets [B, M] among the visual positions, and how many
        visual positions there are."""
        batch, _, visual = targets.shape
        choice = rng.random()
        if choice < self.full:
            index = torch.arange(visual).expand(batch, -1)
            return index, index, visual
        count = max(1, round(rng.choice(self.counts) * visual))
        if choice < self.full + self.shown:
            index = shown_first(targets, count, 0.99)
        else:
            index = torch.rand(batch, visual).topk(count, -1).indices
        index = index.sort(-1).values
        if rng.random() < self.compact:
            return index, torch.arange(count).expand(batch, -1), count
        return index, index, visual


ALL_TOKENS = Keep(full=1.0, shown=0.0, counts=())


@dataclass(frozen=True)
class Mix:
    """Scenes and questions of a stage: specs with weights, and how often each type is asked per scene."""

    specs: tuple[tuple[float, Spec], ...]
    ask: Mapping[str, int] = field(default_factory=dict)

    def spec(self, rng: random.Random) -> Spec:
        return rng.choices([s for _, s in self.specs], [w for w, _ in self.specs])[0]

    def types(self) -> list[str]:
        return [kind for kind, times in self.ask.items() for _ in range(times)]


@dataclass
class Batch:
    images: Tensor  # uint8 [B, S, S, 3]
    targets: Tensor  # [B, rows, N]
    extents: Tensor  # [B, N]
    pack: Pack


def make_batch(preset: Preset, mix: Mix, first_seed: int, count: int, text: int) -> Batch:
    """Scenes of `count` consecutive training seeds with packed questions of the mix."""
    rng = random.Random(first_seed)
    images, targets, sizes, questions = [], [], [], []
    for seed in range(first_seed, first_seed + count):
        drawn = scene(seed, preset.image, spec=mix.spec(rng), types=())
        images.append(drawn.pixels)
        targets.append(dense_targets(drawn, preset.grid).reshape(-1, preset.visual_tokens))
        sizes.append(extents(drawn, preset.grid).reshape(-1))
        questions.append(ask(drawn.objects, drawn.size, rng, types=mix.types()))
    return Batch(
        torch.from_numpy(np.stack(images)),
        torch.from_numpy(np.stack(targets)).long(),
        torch.from_numpy(np.stack(sizes)).long(),
        pack(questions, text, rng),
    )


def align(projected: Tensor, embedding: Tensor, words: Tensor) -> Tensor:
    """Cross-entropy of naming each patch that shows something by its projected token.

    `projected` [B, M, D], `embedding` [vocabulary, D], `words` [B, M, K] with -1 for none. Tokens are normalised first:
    without it the loss does not move.
    """
    named = (words >= 0).any(-1)
    tokens = F.rms_norm(projected[named].float(), (projected.shape[-1],))
    scores = (tokens @ embedding.float().t()).log_softmax(-1)
    chosen = words[named]
    valid = (chosen >= 0).float()
    return -((scores.gather(-1, chosen.clamp_min(0)) * valid).sum(-1) / valid.sum(-1)).mean()


def locate(projected: Tensor, places: nn.Linear, index: Tensor, extent: Tensor, center: Tensor, grid: int) -> Tensor:
    """Reading off each token its row, its column, the size of its thing and whether that is centred there.

    Cross-entropies, so that the projector keeps what relations, comparisons and counts need. `places` maps D to
    2 × grid + sizes + 1 logits; `index` [B, M] are the patches that the tokens come from, `extent` [B, M] their size
    classes (0: no thing, not counted), `center` [B, M] is 1 on the centre of a thing.
    """
    logits = places(F.rms_norm(projected.float(), (projected.shape[-1],))).flatten(0, 1)
    rows, columns = (index // grid).flatten(), (index % grid).flatten()
    sizes = extent.flatten() - 1  # −1 is ignored
    return (
        F.cross_entropy(logits[:, :grid], rows)
        + F.cross_entropy(logits[:, grid : 2 * grid], columns)
        + F.cross_entropy(logits[:, 2 * grid : -1], sizes, ignore_index=-1)
        + 5 * F.binary_cross_entropy_with_logits(logits[:, -1], center.flatten().float())
    )


def step(
    model: LlavaForConditionalGeneration,
    places: nn.Linear,
    batch: Batch,
    alignment: Alignment,
    keep: Keep | None,
    rng: random.Random,
) -> tuple[Tensor, dict[str, float], Tensor]:
    """The loss of a batch, its parts, and questions right and asked by type [types, 2].

    With `keep` None only the alignment is trained: tokens near the words that name them, and their places readable by
    `places`. Embedding rows are tied to the output.
    """
    inner = model.model
    device = inner.device
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        seen = features(inner.vision_tower, batch.images.to(device))
    embedding = inner.language_model.embed_tokens.weight
    words = alignment.words(batch.targets)
    if keep is None:
        index = torch.arange(seen.shape[1]).expand(len(seen), -1)
    else:
        index, offsets, end = keep.draw(rng, batch.targets)
    words = words.gather(1, index[..., None].expand(-1, -1, words.shape[-1])).to(device)
    seen = seen.gather(1, index.to(device)[..., None].expand(-1, -1, seen.shape[-1]))
    with torch.autocast(device.type, torch.bfloat16):
        projected = inner.multi_modal_projector(seen)
    loss_align = align(projected, embedding, words)
    grid = round(batch.targets.shape[-1] ** 0.5)
    extent = batch.extents.gather(1, index).to(device)
    center = batch.targets[:, ROWS.index("center")].gather(1, index).to(device)
    loss_align = loss_align + locate(projected, places, index.to(device), extent, center, grid)
    if keep is None:
        return loss_align, {"align": loss_align.item()}, torch.zeros(0, 2)
    packed = batch.pack
    visual = index.shape[1]
    embed = inner.language_model.embed_tokens
    inputs = torch.cat(
        [embed(prefix_ids(len(seen)).to(device)), projected.float(), embed(packed.ids.to(device))], 1
    )  # [B, 2 + M + T, D]
    positions = torch.cat([torch.arange(2).expand(len(seen), -1), 2 + offsets, 2 + end + packed.position], 1).to(device)
    mask = additive_mask(packed.segment.to(device), visual, torch.bfloat16)
    with torch.autocast(device.type, torch.bfloat16):
        hidden = inner.language_model(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
    hidden = hidden[:, 2 + visual :]
    answered = (packed.labels != IGNORED).to(device)
    logits = hidden[answered].float() @ embedding.t()
    loss_answer = F.cross_entropy(logits, packed.labels.to(device)[answered])
    predicted = torch.full_like(packed.labels, IGNORED)
    predicted[answered.cpu()] = logits.argmax(-1).cpu()
    parts = {"align": loss_align.item(), "answer": loss_answer.item()}
    return loss_answer + ALIGNMENT_WEIGHT * loss_align, parts, right_by_type(predicted, packed)


def frozen(modules: Sequence[nn.Module]) -> None:
    """Take modules out of training."""
    for module in modules:
        module.requires_grad_(False).eval()
