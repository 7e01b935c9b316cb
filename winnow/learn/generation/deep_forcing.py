"""The frame writer that Deep Forcing is tried on: trained on clips of 16 frames, and made to write ten times as many.

Two phases: clips that are spoiled from some frame on, so that the model learns to take looks from clean early frames;
then clips whose later frames it wrote itself. What a cut makes unknowable is not asked.

Departs from the paper: the model is a toy of ours that regresses frames, with nothing to denoise, on latents that are
drawn; a chunk is one frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.kv_method import CacheMethod
from winnow.learn.generation.clips import TEST, Clip, clip, distance, drift, motion, spoiled, written
from winnow.learn.generation.writer import TOKENS, FrameWriter
from winnow.learn.progress import Log
from winnow.learn.pruners.fit import LEAST, MAX_SEED, Phase, Record, Run
from winnow.methods.deep_forcing import DeepForcing
from winnow.parts.learned import SHIPPED, learned

SLUG = "frames"
CLIPS = 1600
TRAINED = 16  # frames that are seen in training
GIVEN, WRITTEN, LATE = 4, 160, 120  # frames to begin with, frames in all, and the first of the late ones
MEASURED = 12  # streams
APART = 1 << 32  # seeds of clips between two seeds of a run

DEEP = DeepForcing(sink=7, recent=4, window=15, top=4, by="newest", frame=TOKENS)
POLICIES: dict[str, CacheMethod] = {
    "participative": DEEP.replace(by="product"),
    "deep_sink": DEEP,
    "deep_sink_in_place": DEEP.replace(move=False),
    "no_sink": DEEP.replace(sink=0, top=11),
}


def load(weights: str | Path | None = None) -> FrameWriter:
    """The model with trained weights.

    Args:
        weights: a file that `winnow train frames` wrote, or `untrained`; default: those that winnow ships.
    """
    given = SHIPPED / f"{SLUG}.safetensors" if weights is None else weights
    module: Any = learned(SLUG, str(given), ModelInfo(), FrameWriter)
    return module.eval()


def train(
    out: str | Path | None = None,
    *,
    resume: bool = False,
    seed: int = 0,
    scale: float = 1.0,
    save: int = 100,
    quiet: bool = False,
) -> Path:
    """Train the model, and return the file of the weights."""
    folder = Path(out) if out is not None else Path("runs") / SLUG
    if not scale > 0 or not 0 <= seed < MAX_SEED:
        raise WinnowError(f"scale {scale}, seed {seed}; scale is above 0, and seed is 0 … {MAX_SEED - 1}.")
    if (folder / "cache").exists() and not resume:
        raise WinnowError(f"{folder} already holds a run; continue it with resume, or choose another folder.")
    torch.set_num_threads(1)
    count = max(LEAST, round(CLIPS * scale))
    variant = {"method": SLUG, "model": "writer", "seed": seed, "scale": scale}
    (folder / "cache").mkdir(parents=True, exist_ok=True)

    def clips(start: int, end: int) -> Iterable[int]:
        return range(seed * APART + start, seed * APART + end)

    recipe: Any = Recipe(scale)
    run = Run(folder, recipe, variant, Log(folder, quiet), save, clips, torch.device("cpu"))
    records = run.recorded(count)
    given = {"seed": seed or None, "scale": None if scale == 1 else scale}
    command = f"winnow train {SLUG}" + "".join(f" --{k} {v}" for k, v in given.items() if v is not None)
    data = f"{count} clips of {TRAINED + 1} frames from {seed * APART} on"
    facts = {"command": command, "name": "frame writer of winnow", "data": data}
    return run.export(run.trained(records), records, facts)


class Recipe:
    sizes = {"width": 64, "depth": 3, "heads": 4}  # noqa: RUF012
    settings: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def make(self) -> nn.Module:
        return FrameWriter(**self.sizes)

    def record(self, number: int) -> Record:
        return dict(vars(clip(number, TRAINED + 1)))

    def phases(self, records: Sequence[Record]) -> list[Phase]:
        told = {name: torch.stack([own[name] for own in records]) for name in records[0]}

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
        own = {name: torch.stack([record[name] for record in records]) for name in records[0]}
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


def error(said: Tensor, own: Record) -> Tensor:
    """Mean square error of the frames that can be known."""
    known = own["known"][:, 1:].float()
    each = (said - own["frames"][:, 1:]).square().mean((2, 3, 4))
    return (each * known).sum() / known.sum().clamp_min(1)


def unseen(count: int) -> Clip:
    """Clips without cuts that nobody was trained on."""
    return Clip.stack([clip(TEST + number, TRAINED, cuts=0) for number in range(count)])
