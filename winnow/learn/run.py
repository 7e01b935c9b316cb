"""A training run of the reference model: its options, and its model with its place in the chain of stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from winnow.core.errors import WinnowError
from winnow.learn import attention, tower
from winnow.learn.checkpoint import CHECKPOINT, read_checkpoint, restore, save_model, write_checkpoint
from winnow.learn.optim import Optimizer
from winnow.learn.progress import Log, draw_curves
from winnow.learn.stages import MAX_STAGES, STAGE_SEEDS
from winnow.learn.targets import EXTENTS
from winnow.learn.workers import give_memory_back, rank, world
from winnow.models.load import load
from winnow.reference.build import make_model, make_processor
from winnow.reference.presets import Preset
from winnow.world.scenes import SEEDS_PER_SPLIT

_OTHER = "another preset; name the preset they belong to"
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
        self.path = options.out / CHECKPOINT

    def resume(self) -> None:
        """Go on where the checkpoint of this run's folder stopped."""
        state = read_checkpoint(self.path)
        for name, value in self.options.variant.items():
            if state["variant"][name] != value:
                raise WinnowError(
                    f"{self.path.parent} holds a run with {name} {state['variant'][name]!r}; it cannot go on with "
                    f"{value!r}. Give the same options, or another folder"
                )
        restore(self.model, state["model"], self.path, of=_OTHER)
        restore(self.heads, state["heads"], self.path, of=_OTHER)
        restore(self.places, state["places"], self.path, of=_OTHER)
        self.stage, self.at, self.images = state["stage"], state["at"], state["images"]
        self.optimizer_state = state["optimizer"]

    def take_tower(self, folder: Path, first: int) -> None:
        """Begin at stage `first` with the pretrained tower of the run, or of the saved model, in `folder`."""
        path, before = folder / CHECKPOINT, "model.vision_tower."
        if path.exists():
            state = read_checkpoint(path)
            if state["stage"] < first:
                raise WinnowError(f"the run in {folder} is still in its tower's pretraining; let it finish that first")
            own = state["model"]
        else:
            path, own = folder, _saved(folder)
        weights = {name.removeprefix(before): v for name, v in own.items() if name.startswith(before)}
        restore(self.model.model.vision_tower, weights, path, of=_OTHER)
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
        write_checkpoint(self.path, state)
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


def _saved(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the reference model that was saved in `folder`."""
    if not (folder / "config.json").exists():
        raise WinnowError(f"{folder} holds no run to take a tower from, nor a saved model; give the folder of either")
    model, _ = load(folder, device="cpu", dtype="float32")
    return model.state_dict()


def export(model: LlavaForConditionalGeneration, sizes: Preset, folder: Path) -> None:
    """Save the model in bfloat16 with its processor, for `from_pretrained`."""
    save_model(model, make_model(sizes), make_processor(sizes), folder)
