"""A training run: its options, its model with its place in the chain of stages, its checkpoint, its averages."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from winnow.core.errors import WinnowError
from winnow.learn import attention, tower
from winnow.learn.optim import Optimizer
from winnow.learn.progress import Log, draw_curves
from winnow.learn.targets import EXTENTS
from winnow.learn.workers import give_memory_back, rank, world
from winnow.reference.build import make_model, make_processor
from winnow.reference.presets import Preset
from winnow.world.scenes import SEEDS_PER_SPLIT

STAGE_SEEDS = 1 << 32  # scene seeds per stage, so that no stage sees a scene of another
MAX_STAGES = 64
MAX_SEED = SEEDS_PER_SPLIT // (STAGE_SEEDS * MAX_STAGES)


@dataclass(frozen=True)
class Options:
    """What a run needs besides its preset. `scale` multiplies all numbers of steps."""

    out: Path
    seed: int = 0
    scale: float = 1.0
    dropout: bool = True  # False: every step of the language stages keeps all visual tokens
    cls_objective: bool = True  # False: the tower learns to name its patches, and nothing from [CLS]
    tower: Path | None = None  # a run whose pretrained tower to begin with
    until: str = ""  # the last stage to run; all when empty
    device: str = "cpu"
    tower_batch: int = 64  # scenes, shared among the processes
    text: int = 140  # tokens of questions and answers behind each picture
    every: int = 25  # steps between log lines
    save: int = 200  # steps between checkpoints
    tower_rates: tuple[float, float] = (3e-3, 1.5e-3)  # Muon, AdamW
    language_rates: tuple[float, float] = (3e-3, 1.5e-3)
    quiet: bool = False

    @property
    def variant(self) -> dict[str, Any]:
        """What must not change when a run goes on."""
        return {
            "seed": self.seed,
            "scale": self.scale,
            "dropout": self.dropout,
            "cls_objective": self.cls_objective,
        }


class Run:
    """A model with its place in the chain of stages."""

    def __init__(self, sizes: Preset, options: Options) -> None:
        self.sizes, self.options = sizes, options
        self.device = torch.device(options.device)
        self.model: LlavaForConditionalGeneration = make_model(sizes, options.seed)
        self.model.to(self.device)  # type: ignore[arg-type]
        if self.device.type == "cpu":
            attention.use(self.model)
        self.heads = tower.Heads(sizes.width, sizes.grid).to(self.device)
        self.places = torch.nn.Linear(sizes.width, 2 * sizes.grid + len(EXTENTS) + 1).to(self.device)
        self.log = Log(options.out, options.quiet)
        self.stage, self.at = 0, 0
        self.images = 0
        self.optimizer_state: Any = None
        self.path = options.out / "checkpoint.pt"

    def resume(self) -> None:
        """Go on where the checkpoint of this run's folder stopped."""
        state = read_checkpoint(self.path)
        for name, value in self.options.variant.items():
            if state["variant"][name] != value:
                raise WinnowError(
                    f"{self.path.parent} holds a run with {name} {state['variant'][name]!r}; it cannot go on with "
                    f"{value!r}. Give the same options, or another folder"
                )
        _restore(self.model, state["model"], self.path)
        _restore(self.heads, state["heads"], self.path)
        _restore(self.places, state["places"], self.path)
        self.stage, self.at, self.images = state["stage"], state["at"], state["images"]
        self.optimizer_state = state["optimizer"]

    def take_tower(self, folder: Path, first: int) -> None:
        """Begin at stage `first` with the pretrained tower of the run in `folder`."""
        path = folder / "checkpoint.pt"
        if not path.exists():
            raise WinnowError(f"{folder} holds no run to take a tower from; give the folder of a training run")
        state = read_checkpoint(path)
        if state["stage"] < first:
            raise WinnowError(f"the run in {folder} is still in its tower's pretraining; let it finish that first")
        before = "model.vision_tower."
        weights = {name.removeprefix(before): v for name, v in state["model"].items() if name.startswith(before)}
        _restore(self.model.model.vision_tower, weights, path)
        self.stage = first

    def save(self, optimizer: Optimizer | None) -> None:
        """Write the checkpoint whole or not at all, and the model as it is now."""
        if rank():
            return
        state = {
            "variant": self.options.variant,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "places": self.places.state_dict(),
            "stage": self.stage,
            "at": self.at,
            "images": self.images,
            "optimizer": optimizer.state_dict() if optimizer else None,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)
        export(self.model, self.sizes, self.options.out / "model")
        draw_curves(self.log.path, self.options.out / "curves.png")

    def share(self, batch: int) -> int:
        """How many of a batch's scenes this process draws."""
        return batch // world()

    def seeds(self, step: int, batch: int) -> int:
        """The first scene seed of this process's share of the batch."""
        start = (self.options.seed * MAX_STAGES + self.stage) * STAGE_SEEDS
        return start + step * batch + rank() * self.share(batch)

    def optimizer(self, modules: list[torch.nn.Module], rates: tuple[float, float]) -> Optimizer:
        optimizer = Optimizer(modules, *rates)
        if self.optimizer_state is not None:
            optimizer.load_state_dict(self.optimizer_state)
            self.optimizer_state = None
        return optimizer

    def finish_stage(self) -> None:
        self.stage, self.at = self.stage + 1, 0
        self.save(None)
        give_memory_back()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `Run.save` wrote."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        state["variant"]
    except Exception:  # what a damaged file raises depends on where it is damaged
        raise WinnowError(f"{path} is not a whole checkpoint of a training run; begin a new one elsewhere") from None
    return state


def _restore(module: torch.nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError:
        raise WinnowError(f"{path} holds the weights of another preset; name the preset they belong to") from None


def export(model: LlavaForConditionalGeneration, sizes: Preset, folder: Path) -> None:
    """Save the model in bfloat16 with its processor, for `from_pretrained`."""
    copy = make_model(sizes)
    copy.load_state_dict(model.state_dict())
    copy.bfloat16().save_pretrained(folder)
    make_processor(sizes).save_pretrained(folder)


class Averages:
    """Running averages of pairs (right, asked) and of losses, forgetting by `decay` a step."""

    def __init__(self, decay: float = 0.97) -> None:
        self.decay = decay
        self.pairs: dict[str, Tensor] = {}
        self.losses: dict[str, float] = {}

    def add(self, name: str, pair: Tensor) -> None:
        self.pairs[name] = self.pairs.get(name, torch.zeros(2)) * self.decay + pair

    def add_loss(self, name: str, value: float) -> None:
        self.losses[name] = self.losses.get(name, value) * self.decay + value * (1 - self.decay)

    def accuracy(self, name: str) -> float:
        right, asked = self.pairs.get(name, torch.zeros(2)).tolist()
        return right / asked if asked else 0.0

    def values(self) -> dict[str, float]:
        return self.losses | {name: self.accuracy(name) for name, pair in self.pairs.items() if pair[1] > 0}
