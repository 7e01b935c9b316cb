"""Accuracy of a reference model on questions of winnow's world, by type, with fewer visual tokens, or with none.

All questions about a picture are answered in one pass (see `packing`). A question counts as right when every token of
its answer and the end are the most likely next tokens, given those before: then greedy decoding gives exactly that
answer. `card` checks this against `generate`.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from winnow.learn.packing import Pack, additive_mask, pack, prefix_ids
from winnow.learn.tower import pixels
from winnow.world import TYPES, Question, Scene, Spec, scene

BATCH = 16
ROW = 4096  # tokens of questions behind one picture: enough for all of them


@dataclass(frozen=True)
class Sample:
    """Scenes and, for each, the questions that are asked about it."""

    scenes: tuple[Scene, ...]
    questions: tuple[tuple[Question, ...], ...]

    @property
    def flat(self) -> list[tuple[Scene, Question]]:
        return [(s, q) for s, questions in zip(self.scenes, self.questions, strict=True) for q in questions]


def draw_sample(
    per_type: int,
    size: int = 224,
    split: str = "test",
    seed: int = 0,
    types: Sequence[str] = TYPES,
    spec: Spec | None = None,
) -> Sample:
    """`per_type` questions of each type, from as few consecutive scenes as give them (at most 200 × `per_type`)."""
    left = dict.fromkeys(types, per_type)
    scenes, questions = [], []
    for number in range(seed, seed + 200 * per_type):
        drawn = scene(number, size, split, spec)
        taken = []
        for question in drawn.questions:
            if left.get(question.type, 0) > 0:
                left[question.type] -= 1
                taken.append(question)
        if taken:
            scenes.append(drawn)
            questions.append(tuple(taken))
        if not any(left.values()):
            break
    return Sample(tuple(scenes), tuple(questions))


@torch.no_grad()
def visual_tokens(model: LlavaForConditionalGeneration, images: Sequence[np.ndarray]) -> Tensor:
    """Projected tokens [n, V, D] of uint8 pictures, by the model's own `get_image_features`."""
    out = []
    for at in range(0, len(images), BATCH):
        batch = pixels(torch.from_numpy(np.stack(images[at : at + BATCH]))).to(model.device)
        pooled = model.model.get_image_features(
            pixel_values=batch, vision_feature_layer=-2, vision_feature_select_strategy="default", return_dict=True
        ).pooler_output
        out.append(torch.stack(list(pooled)).float().cpu())
    return torch.cat(out)


@torch.no_grad()
def answers_right(
    model: LlavaForConditionalGeneration,
    tokens: Tensor,
    questions: Sequence[Sequence[Question]],
    keep: Tensor | None = None,
    leave_before: int | None = None,
) -> list[list[bool]]:
    """For each question of each row, whether the model answers it exactly.

    `tokens` [n, V, D] are visual tokens; `keep` [n, M] are ascending indices of those that the language model gets (at
    their own positions); with `leave_before` l all of them leave before layer l.
    """
    out: list[list[bool]] = []
    everything = torch.arange(tokens.shape[1])
    for at in range(0, len(questions), BATCH):
        rows = questions[at : at + BATCH]
        packed = pack(rows, ROW)
        seen = tokens[at : at + BATCH]
        index = everything.expand(len(rows), -1) if keep is None else keep[at : at + BATCH]
        seen = seen.gather(1, index[..., None].expand(-1, -1, seen.shape[-1]))
        predicted = _predict(model, seen, 2 + index, 2 + tokens.shape[1], packed, leave_before)
        right = (predicted == packed.labels) | (packed.labels < 0)
        for b, row in enumerate(rows):
            out.append([bool(right[b][packed.segment[b] == number].all()) for number in range(len(row))])
    return out


def _predict(
    model: LlavaForConditionalGeneration, seen: Tensor, places: Tensor, text_at: int, packed: Pack, leave: int | None
) -> Tensor:
    """Most likely next tokens [B, T] of packed questions behind visual tokens `seen` at positions `places`."""
    inner, device = model.model.language_model, model.device
    visual = seen.shape[1]
    ids = torch.cat([prefix_ids(len(seen)), packed.ids], 1).to(device)
    embedded = inner.embed_tokens(ids)
    hidden = torch.cat([embedded[:, :2], seen.to(device, embedded.dtype), embedded[:, 2:]], 1)
    positions = torch.cat([torch.arange(2).expand(len(seen), -1), places, text_at + packed.position], 1).to(device)
    mask = additive_mask(packed.segment.to(device), visual, hidden.dtype)
    for number, layer in enumerate(inner.layers):
        if number == leave:
            stay = [0, 1, *range(2 + visual, hidden.shape[1])]
            hidden, positions = hidden[:, stay], positions[:, stay]
            mask = additive_mask(packed.segment.to(device), 0, hidden.dtype)
        turns = inner.rotary_emb(hidden, positions)
        hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=turns)
    hidden = inner.norm(hidden[:, -packed.ids.shape[1] :])
    return model.lm_head(hidden).argmax(-1).cpu()


def by_type(sample: Sample, right: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Accuracy of each type, and "overall" over all questions."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for questions, marks in zip(sample.questions, right, strict=True):
        for question, mark in zip(questions, marks, strict=True):
            groups[question.type].append(mark)
            groups["overall"].append(mark)
    return {kind: sum(marks) / len(marks) for kind, marks in groups.items()}


def majority(sample: Sample) -> dict[str, float]:
    """The share of questions that the best constant answer per type gets right."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, question in sample.flat:
        answers[question.type][question.answer] += 1
    best = {kind: counts.most_common(1)[0][1] for kind, counts in answers.items()}
    out = {kind: best[kind] / sum(counts.values()) for kind, counts in answers.items()}
    return out | {"overall": sum(best.values()) / len(sample.flat)}


def erased(drawn: Scene, question: Question, elsewhere: bool, rng: random.Random) -> np.ndarray:
    """The picture with the question's evidence painted over by the picture's median colour.

    With `elsewhere` boxes of the same sizes are painted over that do not touch the evidence (as far as 50 draws find
    such places).
    """
    out = drawn.pixels.copy()
    fill = np.median(out.reshape(-1, 3), 0).astype(np.uint8)
    taken = np.zeros(out.shape[:2], bool)
    for box in question.evidence:
        taken[box.y0 : box.y1, box.x0 : box.x1] = True
    for box in question.evidence:
        x, y, wide, high = box.x0, box.y0, box.x1 - box.x0, box.y1 - box.y0
        if elsewhere:
            for _ in range(50):
                x, y = rng.randrange(drawn.size - wide + 1), rng.randrange(drawn.size - high + 1)
                if not taken[y : y + high, x : x + wide].any():
                    break
            else:
                continue
        out[y : y + high, x : x + wide] = fill
    return out


def one_each(
    model: LlavaForConditionalGeneration, sample: Sample, paint: Callable[[Scene, Question], np.ndarray]
) -> list[list[bool]]:
    """Like `answers_right`, each question on a picture of its own."""
    images = [paint(drawn, question) for drawn, question in sample.flat]
    marks = answers_right(model, visual_tokens(model, images), [(question,) for _, question in sample.flat])
    flat = iter(mark[0] for mark in marks)
    return [[next(flat) for _ in questions] for questions in sample.questions]
