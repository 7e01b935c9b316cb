"""A training run of one process: a chain of stages with gates, a seed for each step, one checkpoint and one log."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from winnow.core.errors import WinnowError
from winnow.learn.checkpoint import CHECKPOINT, read_checkpoint, restore, write_checkpoint
from winnow.learn.optim import Optimizer, ramp
from winnow.learn.progress import Averages, Log, draw_curves

STAGE_SEEDS = 1 << 32  # per stage, so that no stage sees an example of another
MAX_STAGES = 64


@dataclass(frozen=True)
class Stage:
    """Up to `steps` steps, ended early when every name of `gate` reaches its accuracy (after `least` steps).

    With `decay` the learning rate falls over the second half and no gate applies. `rate` is a share of the rates.
    """

    name: str
    steps: int
    gate: Mapping[str, float] = field(default_factory=dict, kw_only=True)
    least: int = field(default=40, kw_only=True)
    rate: float = field(default=1.0, kw_only=True)
    decay: bool = field(default=False, kw_only=True)


S = TypeVar("S", bound=Stage)


class Chain(ABC, Generic[S]):
    """A model with its place in the chain of stages.

    Attributes:
        counted: what examples are counted in, in the log and in the checkpoint.
        warmup: steps after which a fresh optimizer has its full rates.
        anew: whether each stage has an optimizer of its own; else one goes through all stages.
        modules: what is trained, by its name in the checkpoint.
        count: of what is `counted`, so far.
    """

    counted: ClassVar[str]
    warmup: ClassVar[int]
    anew: ClassVar[bool]

    def __init__(
        self, folder: Path, variant: Mapping[str, Any], modules: Mapping[str, nn.Module], quiet: bool = False
    ) -> None:
        self.folder, self.path = folder, folder / CHECKPOINT
        self.variant, self.modules = dict(variant), modules
        folder.mkdir(parents=True, exist_ok=True)
        self.log = Log(folder, quiet)
        self.stage, self.at, self.count = 0, 0, 0
        self.averages = Averages()
        self._optimizer_state: Any = None

    @abstractmethod
    def optimizer(self, stage: S) -> Optimizer:
        """A fresh one, of what this stage trains."""

    @abstractmethod
    def loss(self, stage: S) -> Tensor:
        """The loss of the step at which the run is; adds to the averages and to the count."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Save the model as it is now, for `from_pretrained`."""

    def first_seed(self, per_step: int) -> int:
        """The first seed of this step, where each step has so many."""
        return (self.variant["seed"] * MAX_STAGES + self.stage) * STAGE_SEEDS + self.at * per_step

    def resume(self) -> bool:
        """Go on where the checkpoint of the folder stopped; False if there is none."""
        if not self.path.exists():
            return False
        state = read_checkpoint(self.path)
        if state["variant"] != self.variant:
            raise WinnowError(
                f"{self.folder} holds a run with {state['variant']}; it cannot go on with {self.variant}. Give "
                "the same options, or another folder"
            )
        for name, module in self.modules.items():
            restore(module, state[name], self.path)
        self.stage, self.at, self.count = state["stage"], state["at"], state[self.counted]
        self.averages.pairs, self.averages.losses = state["pairs"], state["losses"]
        self._optimizer_state = state["optimizer"]
        return True

    def go(
        self,
        plan: Sequence[S],
        *,
        every: int,
        save: int,
        stop_after: int | None = None,
        stop_at: float | None = None,
    ) -> Path:
        """Run the stages that are left, and return the folder of the model.

        Args:
            every, save: steps between lines of the log, and between checkpoints.
            stop_after: steps after which to stop with a checkpoint; none: at the end.
            stop_at: `time.time()` after which to stop with a checkpoint.
        """
        left = math.inf if stop_after is None else stop_after
        optimizer: Optimizer | None = None
        for stage in plan[self.stage :]:
            if optimizer is None or self.anew:
                optimizer = self._restored(self.optimizer(stage))
            while self.at < stage.steps:
                if left == 0 or (stop_at is not None and time.time() > stop_at):
                    self._save(optimizer)
                    return self.folder / "model"
                self._step(stage, optimizer)
                left -= 1
                if self.at % every == 0 or self.at == stage.steps:
                    self.log.write(stage.name, self.at, self.averages.values(), **{self.counted: self.count})
                    if self._done(stage):
                        break
                if self.at % save == 0:
                    self._save(optimizer)
            self.stage, self.at, self.averages = self.stage + 1, 0, Averages()
            self._save(None if self.anew else optimizer)
        return self.folder / "model"

    def _restored(self, optimizer: Optimizer) -> Optimizer:
        if self._optimizer_state is not None:
            optimizer.load_state_dict(self._optimizer_state)
            self._optimizer_state = None
        return optimizer

    def _step(self, stage: S, optimizer: Optimizer) -> None:
        loss = self.loss(stage)
        loss.backward()
        warmup = self.warmup if self.anew or self.stage == 0 else 1
        optimizer.step(stage.rate * ramp(self.at, stage.steps, stage.decay, warmup))
        self.at += 1
        self.averages.add_loss("loss", loss.item())

    def _done(self, stage: S) -> bool:
        return not stage.decay and self.at >= stage.least and self.averages.reach(stage.gate)

    def _save(self, optimizer: Optimizer | None) -> None:
        """Write the checkpoint, and the model as it is now."""
        state = {
            "variant": self.variant,
            **{name: module.state_dict() for name, module in self.modules.items()},
            "stage": self.stage,
            "at": self.at,
            self.counted: self.count,
            "pairs": self.averages.pairs,
            "losses": self.averages.losses,
            "optimizer": None if optimizer is None else optimizer.state_dict(),
        }
        write_checkpoint(self.path, state)
        self.export(self.folder / "model")
        draw_curves(self.log.path, self.folder / "curves.png")
