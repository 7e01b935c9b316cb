"""What LangDC's small language model is to say of a chunk of a clip: its things, with their colours and directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from winnow.world.clips import CLIP_GLYPHS, CLIP_SHAPES, CLIP_WORDS, FPS
from winnow.world.clips.names import CLIP_COLORS, DIRECTIONS
from winnow.world.clips.records import Track

WORDS = ("</s>", "<s>", *CLIP_GLYPHS, *CLIP_SHAPES, *CLIP_WORDS, *CLIP_COLORS, *DIRECTIONS[0], *DIRECTIONS[1])
WORD_ID = {word: number for number, word in enumerate(WORDS)}


def caption(tracks: Sequence[Track], start: int, end: int) -> tuple[str, ...]:
    """The things that are seen in the seconds [start, end), by when they are first seen there; ties by name.

    A shape has the colour that it has at the end; what moves, its direction.
    """
    found = []
    for track in tracks:
        sights = track.sights(start, end)
        if sights:
            found.append((sights[0].frame, track.name, track, sights[-1].frame))
    said: list[str] = []
    for _, name, track, last in sorted(found, key=lambda one: one[:2]):
        moves = track.direction and (track.partner is None or FPS * start < FPS * (track.partner.changes or 0))
        said += [name, *filter(None, (track.color_at(last), track.direction if moves else ""))]
    return tuple(said)


def captions(tracks: Sequence[Track], seconds: int, every: int, most: int) -> Int[Tensor, "c n"]:
    """Words of each chunk, cut off at so many, with stops behind them."""
    chunks = range(0, seconds, every)
    table = torch.full((len(chunks), most), WORD_ID["</s>"])
    for number, start in enumerate(chunks):
        said = caption(tracks, start, start + every)[:most]
        table[number, : len(said)] = torch.tensor([WORD_ID[word] for word in said], dtype=torch.long)
    return table
