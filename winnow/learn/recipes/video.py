"""Train the video reference model: its tower names things, then its language model learns what happens to them.

What is looked up in a clip (who came first, what touched what, how often) is learned fastest where one thing happens,
and carries over. Hence the order of stages, and the gates on accuracy instead of fixed lengths. The language model
begins as that of a reference model for pictures, which knows most words and how to look a name up. Every clip is drawn
for its step and used once, so the running accuracies of training are accuracies on unseen clips.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig

from winnow import reference
from winnow.learn import attention, stages, video
from winnow.learn.checkpoint import check_start, save_model
from winnow.learn.optim import Optimizer
from winnow.learn.stages import Chain
from winnow.learn.video import Mix
from winnow.reference import video as reader
from winnow.world.clips import TYPES, ClipSpec

SEEDS = 1 << 10  # of runs
RATES = (3e-3, 1.5e-3)  # Muon, AdamW
TEXT = 150  # tokens of questions and answers behind each clip
KEPT = (0.0, 0.25, 0.5, 0.75)  # of the visual tokens, where some are dropped; none: what can be guessed
TOWER_SECONDS = 2  # of a clip, in a stage of the tower


@dataclass(frozen=True)
class Stage(stages.Stage):
    """Steps on these clips, in batches of so many; with `tower` only the tower is trained.

    `dropped` is the share of steps in which the language model gets a random part of the visual tokens.
    """

    mix: Mix
    batch: int = 24
    tower: bool = False
    dropped: float = 0.0


CROWDED = ClipSpec(things=(3, 3), still=6, visit=0, repeat=0, cross=4, word=4, hit=3, cuts=(0.7, 0.2, 0.1), pan=0.3)
ONE = ClipSpec(things=(1, 1), still=0.5, repeat=3, word=2.5, cuts=(1.0,), pan=0.3)
TWO = ClipSpec(things=(2, 2), still=1, repeat=3, word=2, cuts=(1.0,), pan=0.3)
FULL = ClipSpec(word=2)

EVENTS = {"presence": 2, "when": 3, "motion": 2, "count": 2, "change": 2, "color": 2, "cause": 2, "needle": 2}
EVERY = {"presence": 1, "when": 3, "motion": 2, "count": 2, "change": 2, "color": 3, "cause": 3, "needle": 1}
EVERY |= {"order": 4, "cuts": 1, "camera": 1}


def full_plan(scale: float = 1.0) -> list[Stage]:
    """The tower; then one thing, two things, and whole clips."""

    def steps(count: int) -> int:
        return max(4, round(count * scale))

    return [
        Stage("tower", steps(320), Mix(((3, CROWDED), (1, FULL))), batch=64, tower=True, decay=True),
        Stage(
            "one",
            steps(300),
            Mix(((3, ONE), (1, TWO)), EVENTS),
            gate={"when": 0.85, "motion": 0.9, "count": 0.8},
            least=steps(60),
        ),
        Stage(
            "two",
            steps(250),
            Mix(((3, TWO), (1, ONE)), EVERY),
            gate={"order": 0.9, "count": 0.85, "when": 0.9},
            least=steps(60),
        ),
        Stage("all", steps(400), Mix(((3, FULL), (1, TWO)), EVERY), dropped=0.2, decay=True),
    ]


def train(
    out: str | Path = "runs/video",
    *,
    resume: bool = False,
    device: str = "cpu",
    seed: int = 0,
    scale: float = 1.0,
    sizes: Qwen2_5_VLConfig | None = None,
    pictures: str | None = "small",
    plan: Sequence[Stage] | None = None,
    every: int = 20,
    save: int = 25,
    quiet: bool = False,
    stop_after: int | None = None,
    stop_at: float | None = None,
) -> Path:
    """Train the video reference model into `out` and return the folder of the finished model.

    `out` holds checkpoint.pt, log.jsonl, curves.png and model/ (a folder for `from_pretrained`, renewed at each
    checkpoint). `resume` continues the run that `out` holds.

    Args:
        scale: share of the full schedule.
        pictures: the preset whose language model this one begins with; None: from random weights.
        plan: stages in place of `full_plan(scale)`.
        every, save, stop_after, stop_at: see `Chain.go`.
    """
    folder = Path(out)
    check_start(folder, resume=resume, device=device, seed=seed, seeds=SEEDS, scale=scale)
    run = _Run(folder, seed, scale, sizes or reader.config(), torch.device(device), quiet)
    if not run.resume() and pictures is not None:
        reader.take_language(run.model, reference.load(pictures)[0])
    return run.go(plan or full_plan(scale), every=every, save=save, stop_after=stop_after, stop_at=stop_at)


class _Run(Chain[Stage]):
    """Each stage has an optimizer of its own: which parameters are trained differs."""

    counted = "clips"
    warmup = 30
    anew = True

    def __init__(
        self, folder: Path, seed: int, scale: float, sizes: Qwen2_5_VLConfig, device: torch.device, quiet: bool
    ) -> None:
        self.sizes, self.model = sizes, reader.make_model(sizes, seed)
        self.model.to(device)  # type: ignore[arg-type]
        if device.type == "cpu":
            attention.use(self.model)
        self.events = video.Events(sizes.get_text_config().hidden_size).to(device)
        variant = {"seed": seed, "scale": scale, "recipe": "video"}
        super().__init__(folder, variant, {"model": self.model, "events": self.events}, quiet)

    def optimizer(self, stage: Stage) -> Optimizer:
        inner = self.model.model
        video.trained([inner.visual] if stage.tower else [inner.visual.merger, inner.language_model], self.model)
        return Optimizer([self.model, self.events], *RATES, inside=("layers.", "blocks."))

    def loss(self, stage: Stage) -> Tensor:
        first = self.first_seed(stage.batch)
        torch.manual_seed(first)
        if stage.tower:
            batch = video.make_batch(stage.mix, first, stage.batch, TEXT, TOWER_SECONDS)
            loss, found = video.tower_step(self.model, batch)
        else:
            batch = video.make_batch(stage.mix, first, stage.batch, TEXT)
            rng = random.Random(first)
            keep = rng.choice(KEPT) if rng.random() < stage.dropped else None
            loss, parts, right = video.step(self.model, self.events, batch, keep, train_tower=False)
            found = dict(zip(TYPES, right, strict=True))
            for name, value in parts.items():
                self.averages.add_loss(name, value)
        self.count += stage.batch
        for name, pair in found.items():
            self.averages.add(name, pair)
        return loss

    def export(self, folder: Path) -> None:
        save_model(self.model, reader.make_model(self.sizes), reader.make_tokenizer(), folder)
