"""Train the video reference model: its tower names things, then its language model learns what happens to them.

What is looked up in a clip (who came first, what touched what, how often) is learned fastest where one thing happens,
and carries over. Hence the order of stages, and the gates on accuracy instead of fixed lengths. The language model
begins as that of a reference model for pictures, which knows most words and how to look a name up. Every clip is drawn
for its step and used once, so the running accuracies of training are accuracies on unseen clips.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig

from winnow import reference
from winnow.core.errors import WinnowError
from winnow.learn import attention, video
from winnow.learn.optim import Optimizer, ramp
from winnow.learn.progress import Log, draw_curves
from winnow.learn.run import Averages, read_checkpoint
from winnow.learn.video import Mix
from winnow.models.load import device_of
from winnow.reference import video as reader
from winnow.world.clips import TYPES, ClipSpec

STAGE_SEEDS = 1 << 32  # seeds of clips per stage, so that no stage sees a clip of another
MAX_STAGES = 64
RATES = (3e-3, 1.5e-3)  # Muon, AdamW
WARMUP = 30  # steps at the start of a stage
TEXT = 150  # tokens of questions and answers behind each clip
KEPT = (0.0, 0.25, 0.5, 0.75)  # of the visual tokens, where some are dropped; none: what can be guessed
TOWER_SECONDS = 2  # of a clip, in a stage of the tower


@dataclass(frozen=True)
class Stage:
    """Up to `steps` steps, ended early when every type of `gate` reaches its accuracy (after `least` steps).

    With `tower` only the tower is trained. With `decay` the learning rate falls over the second half and no gate
    applies. `dropped` is the share of steps in which the language model gets a random part of the visual tokens.
    """

    name: str
    steps: int
    mix: Mix
    gate: Mapping[str, float] = field(default_factory=dict)
    least: int = 40
    batch: int = 24
    rate: float = 1.0
    tower: bool = False
    decay: bool = False
    dropped: float = 0.0


CROWDED = ClipSpec(things=(3, 3), still=6, visit=0, repeat=0, cross=4, word=4, hit=3, cuts=(0.7, 0.2, 0.1), pan=0.3)
ONE = ClipSpec(things=(1, 1), still=0.5, repeat=3, word=2.5, cuts=(1.0,), pan=0.3)
TWO = ClipSpec(things=(2, 2), still=1, repeat=3, word=2, cuts=(1.0,), pan=0.3)
FULL = ClipSpec(word=2)

EVENTS = {"presence": 2, "when": 3, "motion": 2, "count": 2, "change": 2, "color": 2, "cause": 2, "needle": 2}
EVERY = {"presence": 1, "when": 3, "motion": 2, "count": 2, "change": 2, "color": 3, "cause": 3, "needle": 1}
EVERY |= {"order": 4, "cuts": 1, "camera": 1}


def stages(scale: float = 1.0) -> list[Stage]:
    """The tower; then one thing, two things, and whole clips."""

    def steps(count: int) -> int:
        return max(4, round(count * scale))

    return [
        Stage("tower", steps(320), Mix(((3, CROWDED), (1, FULL))), batch=64, tower=True, decay=True),
        Stage(
            "one",
            steps(300),
            Mix(((3, ONE), (1, TWO)), EVENTS),
            {"when": 0.85, "motion": 0.9, "count": 0.8},
            least=steps(60),
        ),
        Stage(
            "two",
            steps(250),
            Mix(((3, TWO), (1, ONE)), EVERY),
            {"order": 0.9, "count": 0.85, "when": 0.9},
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
        plan: stages in place of `stages(scale)`.
        every, save: steps between lines of the log, and between checkpoints.
        stop_after: steps after which to stop with a checkpoint; none: at the end.
        stop_at: `time.time()` after which to stop with a checkpoint.
    """
    if not 0 < scale < math.inf:
        raise WinnowError(f"scale {scale}; it is the share of the full schedule, a number above 0")
    if not 0 <= seed < 1 << 10:
        raise WinnowError(f"seed {seed} is outside 0 … {(1 << 10) - 1}")
    device_of(device)
    folder = Path(out)
    if (folder / "checkpoint.pt").exists() and not resume:
        raise WinnowError(f"{folder} already holds a run; continue it with resume, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(folder, seed, scale, sizes or reader.config(), torch.device(device), quiet)
    if run.path.exists():
        run.resume()
    elif pictures is not None:
        reader.take_language(run.model, reference.load(pictures)[0])
    run.go(list(plan or stages(scale)), every, save, stop_after, stop_at)
    return folder / "model"


class _Run:
    """A model with its place in the chain of stages."""

    def __init__(
        self, folder: Path, seed: int, scale: float, sizes: Qwen2_5_VLConfig, device: torch.device, quiet: bool
    ) -> None:
        self.folder, self.path, self.device = folder, folder / "checkpoint.pt", device
        self.seed, self.sizes = seed, sizes
        self.variant = {"seed": seed, "scale": scale, "recipe": "video"}
        self.model = reader.make_model(sizes, seed)
        self.model.to(device)  # type: ignore[arg-type]
        if device.type == "cpu":
            attention.use(self.model)
        self.events = video.Events(sizes.get_text_config().hidden_size).to(device)
        self.log = Log(folder, quiet)
        self.stage, self.at, self.clips = 0, 0, 0
        self.averages = Averages()
        self.optimizer_state: Any = None

    def resume(self) -> None:
        state = read_checkpoint(self.path)
        if state["variant"] != self.variant:
            raise WinnowError(
                f"{self.folder} holds a run with {state['variant']}; it cannot go on with {self.variant}. Give "
                "the same options, or another folder"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.events.load_state_dict(state["events"])
        except RuntimeError:
            raise WinnowError(f"{self.path} holds the weights of a model of other sizes; give those sizes") from None
        self.stage, self.at, self.clips = state["stage"], state["at"], state["clips"]
        self.averages.pairs, self.averages.losses = state["pairs"], state["losses"]
        self.optimizer_state = state["optimizer"]

    def save(self, optimizer: Optimizer | None) -> None:
        """Write the checkpoint whole or not at all, and the model as it is now."""
        state = {
            "variant": self.variant,
            "model": self.model.state_dict(),
            "events": self.events.state_dict(),
            "stage": self.stage,
            "at": self.at,
            "clips": self.clips,
            "pairs": self.averages.pairs,
            "losses": self.averages.losses,
            "optimizer": optimizer.state_dict() if optimizer else None,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)
        copy = reader.make_model(self.sizes)
        copy.load_state_dict(self.model.state_dict())
        copy.bfloat16().save_pretrained(self.folder / "model")
        reader.make_tokenizer().save_pretrained(self.folder / "model")
        draw_curves(self.log.path, self.folder / "curves.png")

    def go(self, plan: list[Stage], every: int, save: int, stop_after: int | None, stop_at: float | None) -> None:
        left = math.inf if stop_after is None else stop_after
        for stage in plan[self.stage :]:
            optimizer = self._optimizer(stage)
            while self.at < stage.steps:
                if left == 0 or (stop_at is not None and time.time() > stop_at):
                    self.save(optimizer)
                    return
                self._step(stage, optimizer)
                left -= 1
                if self.at % every == 0 or self.at == stage.steps:
                    self.log.write(stage.name, self.at, self.averages.values(), clips=self.clips)
                    if self._done(stage):
                        break
                if self.at % save == 0:
                    self.save(optimizer)
            self.stage, self.at, self.averages = self.stage + 1, 0, Averages()
            self.save(None)

    def _optimizer(self, stage: Stage) -> Optimizer:
        """A fresh one for each stage: which parameters are trained differs."""
        inner = self.model.model
        video.trained([inner.visual] if stage.tower else [inner.visual.merger, inner.language_model], self.model)
        optimizer = Optimizer([self.model, self.events], *RATES, inside=("layers.", "blocks."))
        if self.optimizer_state is not None:
            optimizer.load_state_dict(self.optimizer_state)
            self.optimizer_state = None
        return optimizer

    def _step(self, stage: Stage, optimizer: Optimizer) -> None:
        first = (self.seed * MAX_STAGES + self.stage) * STAGE_SEEDS + self.at * stage.batch
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
        loss.backward()
        optimizer.step(stage.rate * ramp(self.at, stage.steps, stage.decay, WARMUP))
        self.at += 1
        self.clips += stage.batch
        self.averages.add_loss("loss", loss.item())
        for name, pair in found.items():
            self.averages.add(name, pair)

    def _done(self, stage: Stage) -> bool:
        passed = all(self.averages.accuracy(name) >= least for name, least in stage.gate.items())
        return bool(stage.gate) and not stage.decay and self.at >= stage.least and passed
