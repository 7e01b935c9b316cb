"""The frame writer that Deep Forcing is tried on: trained on clips of 16 frames, and made to write ten times as many.

Two phases: clips that are spoiled from some frame on, so that the model learns to take looks from clean early frames;
then clips whose later frames it wrote itself. What a cut makes unknowable is not asked.

Departs from the paper: the model is a toy of ours that regresses frames, with nothing to denoise, on latents that are
drawn; a chunk is one frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from winnow.core.kv_method import CacheMethod
from winnow.learn.fitting import Phase, Record
from winnow.learn.generation.clips import TEST, Clip, clip, distance, drift, motion, spoiled, written
from winnow.learn.generation.writer import TOKENS, FrameWriter
from winnow.learn.toy import Toy, stacked
from winnow.methods.deep_forcing import DeepForcing

TRAINED = 16  # frames that are seen in training
GIVEN, WRITTEN, LATE = 4, 160, 120  # frames to begin with, frames in all, and the first of the late ones
MEASURED = 12  # streams

DEEP = DeepForcing(sink=7, recent=4, window=15, top=4, by="newest", frame=TOKENS)
POLICIES: dict[str, CacheMethod] = {
    "participative": DEEP.replace(by="product"),
    "deep_sink": DEEP,
    "deep_sink_in_place": DEEP.replace(move=False),
    "no_sink": DEEP.replace(sink=0, top=11),
}


class Writer(Toy[FrameWriter]):
    slug, kind, name, model = "frames", "writer", "frame writer of winnow", FrameWriter
    examples, told = 1600, f"clips of {TRAINED + 1} frames"
    sizes: ClassVar = {"width": 64, "depth": 3, "heads": 4}

    def record(self, number: int) -> Record:
        return dict(vars(clip(number, TRAINED + 1)))

    def phases(self, records: Sequence[Record]) -> list[Phase]:
        told = stacked(records)

        def entered(batch: list[int]) -> tuple[Record, Tensor, torch.Generator]:
            own = {name: x[batch] for name, x in told.items()}
            generator = torch.Generator().manual_seed(batch[0] * len(records) + batch[1])
            return own, spoiled(own["frames"][:, :-1], own["ground"], generator), generator

        def by_noise(module: Any, batch: list[int]) -> Tensor:
            own, frames, _ = entered(batch)
            return error(module(frames), own)

        def by_itself(module: Any, batch: list[int]) -> Tensor:
            own, frames, generator = entered(batch)
            with torch.no_grad():
                frames = written(frames, module(frames), generator)
            return error(module(frames), own)

        return [
            Phase("spoiled", round(800 * self.scale), 8, 3e-3, by_noise),
            Phase("written", round(200 * self.scale), 8, 1e-3, by_itself),
        ]

    @torch.no_grad()
    def measure(self, module: Any, records: Sequence[Record]) -> dict[str, float]:
        """Errors on held-out clips, and what becomes of long streams under each policy."""
        own = stacked(records)
        entered = spoiled(own["frames"][:, :-1], own["ground"], torch.Generator().manual_seed(0))
        found = {
            "error": float(error(module(own["frames"][:, :-1]), own)),
            "error_spoiled": float(error(module(entered), own)),
        }
        clips = unseen(MEASURED)
        for name, method in POLICIES.items():
            frames = module.write(clips.frames[:, :GIVEN], WRITTEN, method)
            found[f"drift_{name}"] = float(drift(frames, LATE).mean())
            found[f"distance_{name}"] = float(distance(frames, clips)[:, LATE:].mean())
            found[f"motion_{name}"] = float(motion(frames, LATE).mean())
        return found


load, train = Writer.load, Writer.train


def error(said: Tensor, own: Record) -> Tensor:
    """Mean square error of the frames that can be known."""
    known = own["known"][:, 1:].float()
    each = (said - own["frames"][:, 1:]).square().mean((2, 3, 4))
    return (each * known).sum() / known.sum().clamp_min(1)


def unseen(count: int) -> Clip:
    """Clips without cuts that nobody was trained on."""
    return Clip.stack([clip(TEST + number, TRAINED, cuts=0) for number in range(count)])
