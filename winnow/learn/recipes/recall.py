"""Train the recall model from nothing: short texts with few facts first, then longer ones with more.

Looking a name up is learned fastest on a few facts in a few dozen words, and carries over. Hence the order, and the
gates on accuracy instead of fixed lengths. Every text is drawn for its step and used once, so the running accuracies of
training are accuracies on unseen texts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from winnow.core.errors import WinnowError
from winnow.learn import attention, recall
from winnow.learn.optim import Optimizer, ramp
from winnow.learn.progress import Log, draw_curves
from winnow.learn.recall import Texts
from winnow.learn.run import Averages, read_checkpoint
from winnow.models.load import device_of
from winnow.reference import text
from winnow.world.recall import TASKS

STAGE_SEEDS = 1 << 32  # seeds of texts per stage, so that no stage reads a text of another
STEP_SEEDS = 1 << 12
MAX_STAGES = 64
RATES = (8e-3, 4e-3)  # Muon, AdamW
WARMUP = 20  # steps at the start of a run


@dataclass(frozen=True)
class Stage:
    """Up to `steps` steps, ended early when every task of `gate` reaches its accuracy (after `least` steps).

    With `decay` the learning rate falls over the second half and no gate applies.
    """

    name: str
    steps: int
    texts: Texts
    gate: Mapping[str, float] = field(default_factory=dict)
    least: int = 40
    tokens: int = 6144  # of a batch
    rate: float = 1.0  # share of the learning rates
    decay: bool = False


MIX = {"pairs": 4, "several": 4, "copy": 2, "echo": 1, "needle": 1, "filler": 0.5}
FACTS = {"pairs": 5, "several": 5, "needle": 1, "filler": 1}
LOOK_UP = {"pairs": 0.92, "several": 0.9}


def stages(scale: float = 1.0) -> list[Stage]:
    """Contexts of at most 64 tokens, then of 96 and 512."""

    def steps(count: int) -> int:
        return max(4, round(count * scale))

    return [
        Stage("64", steps(100), Texts(MIX, (32, 48, 64), full=0.7, room=64), tokens=4096, rate=0.5),
        Stage("96", steps(100), Texts(MIX, (48, 64, 96), full=0.7, room=64), LOOK_UP, steps(25), tokens=4096),
        Stage("512", steps(160), Texts(MIX, (64, 128, 256, 512), full=0.4, room=160), decay=True),
        Stage("512-facts", steps(70), Texts(FACTS, (128, 256, 512), full=0.4, room=160), rate=0.6, decay=True),
        Stage("512-last", steps(70), Texts(FACTS, (128, 256, 512), full=0.4, room=160), rate=0.5, decay=True),
    ]


def train(
    out: str | Path = "runs/recall",
    *,
    resume: bool = False,
    device: str = "cpu",
    seed: int = 0,
    scale: float = 1.0,
    sizes: LlamaConfig | None = None,
    plan: Sequence[Stage] | None = None,
    every: int = 25,
    save: int = 40,
    quiet: bool = False,
    stop_after: int | None = None,
) -> Path:
    """Train the recall model into `out` and return the folder of the finished model.

    `out` holds checkpoint.pt, log.jsonl, curves.png and model/ (a folder for `from_pretrained`, renewed at each
    checkpoint). `resume` continues the run that `out` holds.

    Args:
        scale: share of the full schedule.
        plan: stages in place of `stages(scale)`.
        every, save: steps between lines of the log, and between checkpoints.
        stop_after: steps after which to stop with a checkpoint; none: at the end.
    """
    if not 0 < scale < math.inf:
        raise WinnowError(f"scale {scale}; it is the share of the full schedule, a number above 0")
    if not 0 <= seed < 1 << 16:
        raise WinnowError(f"seed {seed} is outside 0 … {(1 << 16) - 1}")
    device_of(device)
    folder = Path(out)
    if (folder / "checkpoint.pt").exists() and not resume:
        raise WinnowError(f"{folder} already holds a run; continue it with resume, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(folder, seed, scale, sizes or text.config(), torch.device(device), quiet)
    if run.path.exists():
        run.resume()
    run.go(list(plan or stages(scale)), every, save, stop_after)
    return folder / "model"


class _Run:
    """A model with its place in the chain of stages."""

    def __init__(
        self, folder: Path, seed: int, scale: float, sizes: LlamaConfig, device: torch.device, quiet: bool
    ) -> None:
        self.folder, self.path, self.device = folder, folder / "checkpoint.pt", device
        self.seed, self.sizes = seed, sizes
        self.variant = {"seed": seed, "scale": scale, "recipe": "recall"}
        self.model = text.make_model(sizes, seed)
        self.model.to(device)  # type: ignore[arg-type]
        if device.type == "cpu":
            attention.use(self.model)
        self.log = Log(folder, quiet)
        self.stage, self.at, self.tokens = 0, 0, 0
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
        except RuntimeError:
            raise WinnowError(f"{self.path} holds the weights of a model of other sizes; give those sizes") from None
        self.stage, self.at, self.tokens = state["stage"], state["at"], state["tokens"]
        self.averages.pairs, self.averages.losses = state["pairs"], state["losses"]
        self.optimizer_state = state["optimizer"]

    def save(self, optimizer: Optimizer) -> None:
        """Write the checkpoint whole or not at all, and the model as it is now."""
        state = {
            "variant": self.variant,
            "model": self.model.state_dict(),
            "stage": self.stage,
            "at": self.at,
            "tokens": self.tokens,
            "pairs": self.averages.pairs,
            "losses": self.averages.losses,
            "optimizer": optimizer.state_dict(),
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)
        copy = text.make_model(self.sizes)
        copy.load_state_dict(self.model.state_dict())
        copy.bfloat16().save_pretrained(self.folder / "model")
        text.make_tokenizer().save_pretrained(self.folder / "model")
        draw_curves(self.log.path, self.folder / "curves.png")

    def go(self, plan: list[Stage], every: int, save: int, stop_after: int | None) -> None:
        left = math.inf if stop_after is None else stop_after
        optimizer = Optimizer([self.model], *RATES)
        if self.optimizer_state is not None:
            optimizer.load_state_dict(self.optimizer_state)
        for stage in plan[self.stage :]:
            while self.at < stage.steps:
                if left == 0:
                    self.save(optimizer)
                    return
                self._step(stage, optimizer)
                left -= 1
                if self.at % every == 0 or self.at == stage.steps:
                    self.log.write(stage.name, self.at, self.averages.values(), tokens=self.tokens)
                    if self._done(stage):
                        break
                if self.at % save == 0:
                    self.save(optimizer)
            self.stage, self.at, self.averages = self.stage + 1, 0, Averages()
            self.save(optimizer)

    def _step(self, stage: Stage, optimizer: Optimizer) -> None:
        first = (self.seed * MAX_STAGES + self.stage) * STAGE_SEEDS + self.at * STEP_SEEDS
        rows = recall.make_rows(stage.texts, first, stage.tokens)
        loss, parts, right = recall.step(self.model, rows)
        loss.backward()
        warmup = 1 if self.stage else WARMUP
        optimizer.step(stage.rate * ramp(self.at, stage.steps, stage.decay, warmup))
        self.at += 1
        self.tokens += rows.ids.numel()
        self.averages.add_loss("loss", loss.item())
        for name, value in parts.items():
            self.averages.add_loss(name, value)
        for task, pair in zip(TASKS, right, strict=True):
            self.averages.add(task, pair)

    def _done(self, stage: Stage) -> bool:
        passed = all(self.averages.accuracy(task) >= least for task, least in stage.gate.items())
        return bool(stage.gate) and not stage.decay and self.at >= stage.least and passed
