"""Training of the video reference model: its tower on single seconds, then its language model on whole clips."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from winnow.learn.attention import products
from winnow.learn.clip_reading import language
from winnow.learn.clip_targets import MARKS, NOTHING, targets
from winnow.learn.language import align
from winnow.learn.packing import IGNORED, Pack, pack, right_by_type
from winnow.reference.video import MERGE, PATCH, patches, token_ids
from winnow.world.clips import FPS, TYPES, ClipSpec, staged
from winnow.world.clips.draw import Stage
from winnow.world.clips.questions import ask

LOOK = 3  # layers of the language model before what happened is read off its visual tokens
MOST_SECONDS = 32  # that `Events` tells apart
ALIGNMENT_WEIGHT, EVENTS_WEIGHT, NOTHING_WEIGHT = 0.15, 0.3, 0.2


@dataclass(frozen=True)
class Mix:
    """Clips and questions of a stage: specs with weights, lengths in frames, and how often each type is asked."""

    specs: tuple[tuple[float, ClipSpec], ...]
    ask: Mapping[str, int] = field(default_factory=dict)
    frames: tuple[int, ...] = (16,)
    side: int = 84

    def spec(self, rng: random.Random) -> ClipSpec:
        return rng.choices([spec for _, spec in self.specs], [weight for weight, _ in self.specs])[0]

    def types(self) -> list[str]:
        return [kind for kind, times in self.ask.items() for _ in range(times)]


@dataclass
class Batch:
    """`frames` uint8 [B, T, S, S, 3]; `words` [B, T/2 · cells, words]; `marks` [B, T/2 · cells, marks]."""

    frames: Tensor
    words: Tensor
    marks: Tensor
    pack: Pack


def make_batch(mix: Mix, first_seed: int, count: int, text: int, seconds: int | None = None) -> Batch:
    """Clips of `count` consecutive training seeds; with `seconds` only those that show most, and no questions."""
    rng = random.Random(first_seed)
    length = rng.choice(mix.frames)
    grid = mix.side // (PATCH * MERGE)
    frames, words, marks, asked = [], [], [], []
    for seed in range(first_seed, first_seed + count):
        stage, own = staged(seed, length, mix.side, spec=mix.spec(rng))
        whole = list(range(length // FPS))
        shown = whole if seconds is None else _fullest(stage, own.sample(whole, len(whole)))[:seconds]
        frames.append(stage.draw([FPS * second + i for second in shown for i in range(FPS)]))
        named, marked = targets(stage, shown, grid)
        words.append(named.reshape(-1, named.shape[-1]))
        marks.append(marked.reshape(-1, marked.shape[-1]))
        asked.append(ask(stage.story, length // FPS, mix.side, own, types=mix.types() if seconds is None else ()))
    packed = pack(asked, text, rng, types=TYPES, ids=token_ids)
    return Batch(
        torch.from_numpy(np.stack(frames)),
        torch.from_numpy(np.stack(words)).long(),
        torch.from_numpy(np.stack(marks)).float(),
        packed,
    )


def _fullest(stage: Stage, seconds: list[int]) -> list[int]:
    """Seconds, those that show most things first."""

    def shown(second: int) -> int:
        return sum(track.boxes[FPS * second] is not None for track in stage.story.tracks)

    return sorted(seconds, key=shown, reverse=True)


class Events(nn.Module):
    """Linear read-outs of visual tokens inside the language model, used in training only: when, and what happens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, MOST_SECONDS + len(MARKS))

    def loss(self, hidden: Tensor, second: Tensor, marks: Tensor) -> Tensor:
        """`hidden` [B, M, D] of tokens of the seconds [B, M], `marks` [B, M, len(MARKS)]."""
        if not second.numel():
            return self.out.bias.sum() * 0
        logits = self.out(F.rms_norm(hidden.float(), (hidden.shape[-1],)))
        when = F.cross_entropy(logits[..., :MOST_SECONDS].flatten(0, 1), second.clamp_max(MOST_SECONDS - 1).flatten())
        weight = logits.new_tensor(5.0)
        return when + 3 * F.binary_cross_entropy_with_logits(logits[..., MOST_SECONDS:], marks, pos_weight=weight)


def tower_tokens(model: Qwen2_5_VLForConditionalGeneration, flat: Tensor, merged: bool = True) -> Tensor:
    """Visual tokens [N, P/4, D] of single seconds [N, P, K], or patches before the merger [N, P, D].

    What the tower computes of pictures that fit into one window, all seconds of a batch at once.
    """
    tower = model.model.visual
    hidden = F.linear(flat, tower.patch_embed.proj.weight.flatten(1))
    turns = _turns(tower, flat.shape[1])
    for block in tower.blocks:
        hidden = hidden + _attended(block.attn, block.norm1(hidden), turns)
        hidden = hidden + block.mlp(block.norm2(hidden))
    return merge(model, hidden) if merged else hidden


def merge(model: Qwen2_5_VLForConditionalGeneration, hidden: Tensor) -> Tensor:
    out: Tensor = model.model.visual.merger(hidden.flatten(0, 1))
    return out.view(len(hidden), -1, out.shape[-1])


def _turns(tower: Any, count: int) -> tuple[Tensor, Tensor]:
    """Rotations of a square grid of `count` patches, unit by unit."""
    units = round(count**0.5) // MERGE
    place = torch.arange(units * MERGE).view(units, MERGE)
    rows = place[:, None, :, None].expand(units, units, MERGE, MERGE)
    columns = place[None, :, None, :].expand(units, units, MERGE, MERGE)
    weight = tower.patch_embed.proj.weight
    cos, sin = tower.rotary_pos_emb(weight, torch.stack([rows.flatten(), columns.flatten()], 1).to(weight.device))
    return cos, sin


def _attended(attention: Any, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    batch, tokens, width = x.shape
    q, k, v = attention.qkv(x).view(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = (_turned(part, *turns) for part in (q, k))
    mixed, _ = products(attention, q, k, v, None, attention.scaling)
    out: Tensor = attention.proj(mixed.reshape(batch, tokens, width))
    return out


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-right, left], -1) * sin).to(x.dtype)


def tower_step(model: Qwen2_5_VLForConditionalGeneration, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of naming what tokens show by the language model's words; (right, asked) of things, colours, motions."""
    with torch.autocast(batch.frames.device.type, torch.bfloat16):
        tokens = tower_tokens(model, patches(batch.frames).flatten(0, 1))
    tokens = tokens.reshape(len(batch.frames), -1, tokens.shape[-1])
    table = model.model.language_model.embed_tokens.weight
    loss = naming(tokens, table, batch.words)
    with torch.no_grad():
        scores = F.rms_norm(tokens.float(), (tokens.shape[-1],)) @ table.t()
        best = scores.topk(3, -1).indices
        found = {}
        for number, name in enumerate(("thing", "color", "motion")):
            asked = (batch.words[..., number] >= 0) & (batch.words[..., number] != NOTHING)
            right = (best == batch.words[..., number : number + 1]).any(-1) & asked
            found[name] = torch.tensor([float(right.sum()), float(asked.sum())])
    return loss, found


def naming(tokens: Tensor, table: Tensor, words: Tensor) -> Tensor:
    """Cross-entropy of naming tokens [B, V, D] by their words [B, V, K]; those that show nothing count little."""
    nothing = words[..., 0] == NOTHING
    shown = align(tokens, table, words.masked_fill(nothing[..., None], -1))
    return shown + NOTHING_WEIGHT * align(tokens, table, words.masked_fill(~nothing[..., None], -1))


def step(
    model: Qwen2_5_VLForConditionalGeneration, events: Events, batch: Batch, keep: float | None, train_tower: bool
) -> tuple[Tensor, dict[str, float], Tensor]:
    """The loss of a batch, its parts, and questions right and asked by type [types, 2].

    Args:
        keep: share of the visual tokens that a random choice leaves; None: all.
    """
    packed, device = batch.pack, model.device
    flat = patches(batch.frames.to(device)).flatten(0, 1)
    with torch.autocast(device.type, torch.bfloat16):
        with torch.set_grad_enabled(train_tower):
            hidden = tower_tokens(model, flat, merged=False)
        tokens = merge(model, hidden)
    tokens = tokens.reshape(len(batch.frames), -1, tokens.shape[-1]).float()
    seconds = batch.frames.shape[1] // FPS
    visual = tokens.shape[1]
    index = torch.arange(visual).expand(len(tokens), -1)
    if keep is not None:
        index = torch.rand(len(tokens), visual).topk(round(keep * visual), -1).indices.sort(-1).values
    with torch.autocast(device.type, torch.bfloat16):
        out, looked = language(model, tokens, index, seconds, packed, LOOK)
    table = model.model.language_model.embed_tokens.weight
    answered = (packed.labels != IGNORED).to(device)
    logits = out[answered].float() @ table.float().t()
    answer = F.cross_entropy(logits, packed.labels.to(device)[answered])
    loss_align = naming(tokens, table, batch.words.to(device))
    marks = batch.marks.gather(1, index[..., None].expand(-1, -1, len(MARKS))).to(device)
    happened = events.loss(looked, (index // (visual // seconds)).to(device), marks)
    predicted = torch.full_like(packed.labels, IGNORED)
    predicted[answered.cpu()] = logits.argmax(-1).cpu()
    parts = {"answer": answer.item(), "align": loss_align.item(), "events": happened.item()}
    loss = answer + ALIGNMENT_WEIGHT * loss_align + EVENTS_WEIGHT * happened
    return loss, parts, right_by_type(predicted, packed, len(TYPES))


def trained(modules: Sequence[nn.Module], whole: nn.Module) -> None:
    """Take everything out of training but these."""
    whole.requires_grad_(False)
    for module in modules:
        module.requires_grad_(True)
