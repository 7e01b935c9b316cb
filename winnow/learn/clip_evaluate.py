"""Accuracy of the video reference model on questions about clips: whole, without what makes a clip, with fewer tokens.

All questions about a clip are answered in one pass, as in `evaluate`. Conditions show what a question needs:

    full            the clip
    blind           no clip
    shuffled        its frames in random order
    single-frame    its middle frame, standing still for as long
    averaged        the mean of its frames, standing still for as long

Choices of tokens have the same budget: `random`, `seconds` (whole seconds, evenly spaced: what sampling fewer frames
does), `evidence` (the question's, then other things, then any: a ceiling).
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.learn import video
from winnow.learn.clip_reading import language
from winnow.learn.packing import Pack, pack
from winnow.reference.video import MERGE, PATCH, patches, token_ids
from winnow.world.clips import LEVELS, TYPES, Clip, ClipQuestion, ClipSpec, Sight, clip, stretches

CONDITIONS = ("full", "blind", "shuffled", "single-frame", "averaged")
CHOICES = ("random", "seconds", "evidence")
CLIPS_FOR_EACH = 60  # drawn at most for one question of a type
BATCH, ROW = 16, 1024

Marks = list[list[bool]]


@dataclass(frozen=True)
class Sample:
    """Clips and, for each, the questions that are asked about it."""

    clips: tuple[Clip, ...]
    questions: tuple[tuple[ClipQuestion, ...], ...]

    @property
    def flat(self) -> list[tuple[Clip, ClipQuestion]]:
        return [(c, q) for c, questions in zip(self.clips, self.questions, strict=True) for q in questions]


def draw_sample(
    per_type: int,
    *,
    frames: int = 16,
    side: int = 84,
    split: str = "test",
    seed: int = 0,
    types: Sequence[str] = TYPES,
    spec: ClipSpec | None = None,
) -> Sample:
    """`per_type` questions of each type, from as few consecutive clips as give them."""
    left = dict.fromkeys(types, per_type)
    clips, questions = [], []
    for number in range(seed, seed + CLIPS_FOR_EACH * per_type):
        drawn = clip(number, frames, side, split, spec, types=types)
        taken = [question for question in drawn.questions if left[question.type] > 0]
        for question in taken:
            left[question.type] -= 1
        if taken:
            clips.append(drawn)
            questions.append(tuple(taken))
        if not any(left.values()):
            return Sample(tuple(clips), tuple(questions))
    missing = ", ".join(kind for kind, count in left.items() if count)
    raise WinnowError(f"clips of {frames} frames give too few questions of {missing}; ask fewer than {per_type}")


def seen_under(drawn: Clip, condition: str) -> np.ndarray:
    """The frames that a condition shows: uint8 [frames, side, side, 3]."""
    if condition == "shuffled":
        order = list(range(drawn.frames))
        random.Random(f"{drawn.split} {drawn.seed}").shuffle(order)
        return drawn.pixels[order]
    if condition == "single-frame":
        return np.repeat(drawn.pixels[drawn.frames // 2][None], drawn.frames, 0)
    if condition == "averaged":
        return np.repeat(drawn.pixels.mean(0).round().astype(np.uint8)[None], drawn.frames, 0)
    return drawn.pixels


def under(model: Qwen2_5_VLForConditionalGeneration, sample: Sample, condition: str) -> Marks:
    """For each question of each clip, whether it is answered exactly under a condition."""
    if condition not in CONDITIONS:
        raise WinnowError(f"unknown condition {condition!r}; the conditions are {', '.join(CONDITIONS)}")
    shown = [seen_under(drawn, condition) for drawn in sample.clips]
    return _marks(model, sample, shown, _nothing if condition == "blind" else None)


def with_tokens(model: Qwen2_5_VLForConditionalGeneration, sample: Sample, choice: str, share: float) -> Marks:
    """As `under` "full", with a share of the visual tokens, at their own positions."""
    if choice not in CHOICES:
        raise WinnowError(f"unknown choice of tokens {choice!r}; the choices are {', '.join(CHOICES)}")
    chosen = {"random": _at_random, "seconds": _seconds, "evidence": _evidence}[choice]

    def keep(drawn: Clip, question: ClipQuestion) -> list[int]:
        layout = layout_of(drawn)
        return chosen(drawn, question, layout, max(1, round(share * layout.n)))

    return _marks(model, sample, [drawn.pixels for drawn in sample.clips], keep)


def layout_of(drawn: Clip) -> Layout:
    cells = drawn.side // (PATCH * MERGE)
    return Layout.grid(cells, cells, drawn.seconds)


def _nothing(drawn: Clip, question: ClipQuestion) -> list[int]:
    return []


def _at_random(drawn: Clip, question: ClipQuestion, layout: Layout, count: int) -> list[int]:
    return sorted(_rng(drawn, question).sample(range(layout.n), count))


def _seconds(drawn: Clip, question: ClipQuestion, layout: Layout, count: int) -> list[int]:
    cells = layout.n // drawn.seconds
    return whole_seconds(drawn.seconds, cells, max(1, count // cells))


def whole_seconds(seconds: int, cells: int, number: int) -> list[int]:
    """The tokens of so many seconds of a clip, evenly spaced."""
    chosen = [int((i + 0.5) * seconds / number) for i in range(number)]
    return [second * cells + cell for second in chosen for cell in range(cells)]


def _evidence(drawn: Clip, question: ClipQuestion, layout: Layout, count: int) -> list[int]:
    rng = _rng(drawn, question)
    things = [Sight(f, box) for t in drawn.tracks for f, box in enumerate(t.boxes) if box is not None]
    chosen: dict[int, None] = {}
    for sights in (question.evidence, things):
        group = np.flatnonzero(layout.covering(stretches(sights, drawn.side, drawn.frames))).tolist()
        chosen.update(dict.fromkeys(rng.sample(group, len(group))))
    chosen.update(dict.fromkeys(rng.sample(range(layout.n), layout.n)))
    return sorted(list(chosen)[:count])


def _rng(drawn: Clip, question: ClipQuestion) -> random.Random:
    return random.Random(f"{drawn.split} {drawn.seed} {question.text}")


@torch.no_grad()
def _marks(
    model: Qwen2_5_VLForConditionalGeneration,
    sample: Sample,
    shown: Sequence[np.ndarray],
    keep: Callable[[Clip, ClipQuestion], list[int]] | None,
) -> Marks:
    """With `keep`, every question is asked behind tokens of its own."""
    out: Marks = []
    for at in range(0, len(shown), BATCH):
        frames = torch.from_numpy(np.stack(shown[at : at + BATCH]))
        tokens = video.tower_tokens(model, patches(frames).flatten(0, 1).to(model.device, model.dtype))
        tokens = tokens.reshape(len(frames), -1, tokens.shape[-1])
        rows = sample.questions[at : at + BATCH]
        if keep is None:
            everything = torch.arange(tokens.shape[1]).expand(len(rows), -1)
            out += _right(model, tokens, everything, rows, sample.clips[0].seconds)
            continue
        for clip_, questions, own in zip(sample.clips[at : at + BATCH], rows, tokens, strict=True):
            index = torch.tensor([keep(clip_, question) for question in questions], dtype=torch.long)
            asked = [[question] for question in questions]
            alone = _right(model, own.expand(len(questions), -1, -1), index, asked, clip_.seconds)
            out.append([marks[0] for marks in alone])
    return out


def _right(
    model: Qwen2_5_VLForConditionalGeneration,
    tokens: Tensor,
    index: Tensor,
    rows: Sequence[Sequence[ClipQuestion]],
    seconds: int,
) -> Marks:
    packed = pack(rows, ROW, types=TYPES, ids=token_ids)
    hidden, _ = language(model, tokens, index, seconds, packed)
    return answered_right(model.lm_head(hidden), packed, [len(row) for row in rows])


def answered_right(logits: Tensor, packed: Pack, counts: Sequence[int]) -> Marks:
    """For each question of each row, whether all tokens of its answer are the likeliest.

    Args:
        logits: [B, T, vocabulary] of packed rows.
        counts: questions of each row.
    """
    right = (logits.argmax(-1).cpu() == packed.labels) | (packed.labels < 0)
    return [[bool(right[b][packed.segment[b] == number].all()) for number in range(n)] for b, n in enumerate(counts)]


def by_type(sample: Sample, marks: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Accuracy of each type, of each level, and "overall" over all questions."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for questions, row in zip(sample.questions, marks, strict=True):
        for question, mark in zip(questions, row, strict=True):
            for name in (question.type, LEVELS[question.type], "overall"):
                groups[name].append(mark)
    return {name: sum(found) / len(found) for name, found in groups.items()}


def majority(sample: Sample) -> dict[str, float]:
    """The share of questions of each type that its most frequent answer gets right."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, question in sample.flat:
        answers[question.type][question.answer] += 1
    return {kind: counts.most_common(1)[0][1] / counts.total() for kind, counts in answers.items()}


def relation_gap(full: Mapping[str, float], fewer: Mapping[str, float]) -> float:
    """Share of perception that is kept less the share of relations: how much a compression costs relations alone.

    Of what the full clip does not give either, nothing is kept.
    """
    perception, relation = (fewer[level] / full[level] if full[level] else 0.0 for level in ("perception", "relation"))
    return perception - relation
