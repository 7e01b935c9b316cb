"""Clips in which one or two things come and go, and what is asked of them in words: what, when and where."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from winnow.learn.fitting import Record
from winnow.learn.video import tower_tokens
from winnow.parts.time_tokens import BoxTokens, TimeTokens
from winnow.reference.video import MERGE, PATCH, patches
from winnow.world.clips import CLIP_GLYPHS, CLIP_SHAPES, FPS, ClipSpec, staged
from winnow.world.clips.records import Track

FRAMES, SIDE = 32, 84
SECONDS, CELLS = FRAMES // FPS, (SIDE // (PATCH * MERGE)) ** 2
SPEC = ClipSpec(things=(1, 2), still=0, visit=3, repeat=0, cross=2, hit=0, word=0, cuts=(1,), pan=0)
TIMES, BOXES = TimeTokens(2 * SECONDS + 1), BoxTokens(SIDE // 3 + 1)
TASKS = ("<what>", "<when>", "<where>")
WORDS = ("<pad>", "<s>", "</s>", *TASKS, *CLIP_GLYPHS, *CLIP_SHAPES, *TIMES.vocabulary, *BOXES.vocabulary)
WORD_ID = {word: number for number, word in enumerate(WORDS)}
PAD, START, END = range(3)
MOST = 5  # words of an answer, its end among them
ASKED = 5  # of a clip, at most


@torch.no_grad()
def clip_record(model: Any, seed: int, split: str = "train") -> Record:
    """The tokens of a clip of the frozen model, with prompts and answers.

    `prompt` [ASKED, 2], `answer` [ASKED, MOST] with pads behind the end, `asked` how many there are.
    """
    stage, _ = staged(seed, FRAMES, SIDE, split, SPEC)
    frames = torch.from_numpy(stage.draw(range(FRAMES)))[None]
    tokens = tower_tokens(model, patches(frames).flatten(0, 1).to(model.dtype)).flatten(0, 1)
    pairs = questions(stage.story.tracks)
    prompt, answer = torch.full((ASKED, 2), PAD), torch.full((ASKED, MOST), PAD)
    for number, (asked, said) in enumerate(pairs):
        prompt[number, : len(asked)] = torch.tensor([WORD_ID[word] for word in asked])
        answer[number, : len(said)] = torch.tensor([WORD_ID[word] for word in said])
    return {"tokens": tokens.half(), "prompt": prompt, "answer": answer, "asked": torch.tensor(len(pairs))}


def questions(tracks: Sequence[Track]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Prompts and answers: the names by when things come; when each is there; where it is halfway through."""
    things = sorted((track for track in tracks if track.kind != "text"), key=lambda track: (track.start, track.name))
    found: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    found.append((("<what>",), (*(track.name for track in things), "</s>")))
    for track in things:
        start, end = track.visits[0]
        found.append((("<when>", track.name), (*TIMES.encode(start, end, SECONDS), "</s>")))
        box = track.boxes[FPS * (start + end) // 2]
        if box is not None:
            edges = (box.x0, box.y0, box.x1, box.y1)
            found.append((("<where>", track.name), (*BOXES.encode(edges, SIDE, SIDE), "</s>")))
    return found


def clips_of(tokens: Tensor, every: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `ClipQueries` takes of `[b, V, D]` tokens of whole clips, so many seconds a clip: tokens, places, there."""
    side = math.isqrt(CELLS)
    place = torch.cartesian_prod(torch.arange(every), torch.arange(side), torch.arange(side))
    clips = tokens.unflatten(1, (SECONDS // every, every * CELLS))
    return clips, place.expand(*clips.shape[:3], 3), torch.ones(clips.shape[:3], dtype=torch.bool)
