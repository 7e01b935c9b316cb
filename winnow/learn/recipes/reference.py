"""Train a reference model from nothing: tower pretraining, alignment, instruction stages with a curriculum.

Every picture is drawn for its step and used once, so the running accuracies of training are accuracies on unseen
scenes. A run is a chain of stages; it is checkpointed inside stages and resumes where it stopped.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from winnow.core.errors import WinnowError
from winnow.learn import attention, language, tower
from winnow.learn.optim import Optimizer, ramp
from winnow.learn.progress import Log, draw_curves
from winnow.learn.recipes.curriculum import LanguageStage, TowerStage, language_stages, tower_stages
from winnow.learn.targets import EXTENTS, Alignment
from winnow.learn.workers import average_gradients, launch, rank, total, world
from winnow.reference.build import make_model, make_processor
from winnow.reference.presets import Preset, preset
from winnow.world.names import TYPES
from winnow.world.scenes import SEEDS_PER_SPLIT

STAGE_SEEDS = 1 << 32  # scene seeds per stage, so that no stage sees a scene of another
MAX_STAGES = 64
MAX_SEED = SEEDS_PER_SPLIT // (STAGE_SEEDS * MAX_STAGES)


@dataclass(frozen=True)
class Options:
    """What a run needs besides its preset. `scale` multiplies all numbers of steps; batches are per process."""

    out: Path
    seed: int = 0
    scale: float = 1.0
    device: str = "cpu"
    tower_batch: int = 32
    text: int = 140  # tokens of questions and answers behind each picture
    every: int = 25  # steps between log lines
    save: int = 200  # steps between checkpoints
    tower_rates: tuple[float, float] = (3e-3, 1.5e-3)  # Muon, AdamW
    language_rates: tuple[float, float] = (3e-3, 1.5e-3)
    quiet: bool = False


def train(
    name: str = "small",
    out: str | Path = "runs/reference",
    *,
    resume: bool = False,
    device: str = "cpu",
    processes: int = 1,
    seed: int = 0,
    scale: float = 1.0,
    **more: Any,
) -> Path:
    """Train the preset into `out` and return the folder of the finished model.

    `out` holds checkpoint.pt, log.jsonl, curves.png and model/ (a folder for `from_pretrained`, renewed at each
    checkpoint). `processes` share a CPU's cores, one thread each. `resume` continues the run that `out` holds.
    """
    folder = Path(out)
    if device != "cpu" and processes != 1:
        raise WinnowError(f"{processes} processes on {device!r}; several processes are for CPUs, use processes=1")
    if (folder / "checkpoint.pt").exists() and not resume:
        raise WinnowError(f"{folder} already holds a run; continue it with resume, or choose another folder")
    if not 0 <= seed < MAX_SEED:
        raise WinnowError(f"seed {seed} is outside 0 … {MAX_SEED - 1}")
    folder.mkdir(parents=True, exist_ok=True)
    options = Options(folder, seed=seed, scale=scale, device=device, **more)
    launch(_run, processes, preset(name), options)
    return folder / "model"


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
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.places.load_state_dict(state["places"])
        self.stage, self.at, self.images = state["stage"], state["at"], state["images"]
        self.optimizer_state = state["optimizer"]

    def save(self, optimizer: Optimizer | None) -> None:
        """Write the checkpoint whole or not at all, and the model as it is now."""
        if rank():
            return
        state = {
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

    def seeds(self, step: int, batch: int) -> int:
        """The first scene seed of this process's batch."""
        start = (self.options.seed * MAX_STAGES + self.stage) * STAGE_SEEDS
        return start + (step * world() + rank()) * batch

    def optimizer(self, modules: list[torch.nn.Module], rates: tuple[float, float]) -> Optimizer:
        optimizer = Optimizer(modules, *rates)
        if self.optimizer_state is not None:
            optimizer.load_state_dict(self.optimizer_state)
            self.optimizer_state = None
        return optimizer

    def finish_stage(self) -> None:
        self.stage, self.at = self.stage + 1, 0
        self.save(None)


def export(model: LlavaForConditionalGeneration, sizes: Preset, folder: Path) -> None:
    """Save the model in bfloat16 with its processor, for `from_pretrained`."""
    copy = make_model(sizes)
    copy.load_state_dict(model.state_dict())
    copy.bfloat16().save_pretrained(folder)
    make_processor(sizes).save_pretrained(folder)


def _run(sizes: Preset, options: Options) -> None:
    run = Run(sizes, options)
    stages: list[TowerStage | LanguageStage] = [*tower_stages(options.scale), *language_stages(options.scale)]
    while run.stage < len(stages):
        stage = stages[run.stage]
        if isinstance(stage, TowerStage):
            _train_tower(run, stage)
        else:
            _train_language(run, stage)


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


def _loop(
    run: Run,
    stage: TowerStage | LanguageStage,
    optimizer: Optimizer,
    one_step: Callable[[int, Averages], Tensor],
    done: Callable[[int, Averages], bool],
    batch: int,
) -> None:
    """The steps of a stage: seeds, gradients over the processes, update, log, checkpoint."""
    averages = Averages()
    for step in range(run.at, stage.steps):
        torch.manual_seed((run.options.seed * MAX_STAGES + run.stage) * (1 << 24) + step * world() + rank())
        loss = one_step(step, averages)
        loss.backward()
        average_gradients(optimizer.parameters)
        optimizer.step(ramp(step, stage.steps, stage.decay))
        run.at = step + 1
        run.images += batch * world()
        averages.add_loss("loss", loss.item())
        if run.at % run.options.every == 0:
            run.log.write(stage.name, run.at, averages.values(), images=run.images)
            if done(run.at, averages):
                break
        if run.at % run.options.save == 0:
            run.save(optimizer)
    run.finish_stage()


def _train_tower(run: Run, stage: TowerStage) -> None:
    options, sizes = run.options, run.sizes
    vision = run.model.model.vision_tower
    vision.train()
    optimizer = run.optimizer([vision, run.heads], options.tower_rates)
    keep = None if stage.keep is None else round(stage.keep * sizes.visual_tokens)

    def one_step(step: int, averages: Averages) -> Tensor:
        batch = tower.make_batch(run.seeds(step, options.tower_batch), options.tower_batch, sizes.image, sizes.grid)
        batch = tower.Batch(*(x.to(run.device) for x in (batch.images, batch.targets, batch.bags)))
        parts: dict[str, Tensor] = {}
        with torch.autocast(run.device.type, torch.bfloat16):
            loss = tower.loss(vision, run.heads, batch, keep, parts)
        for name, pair in parts.items():
            averages.add(name, pair)
        return loss

    _loop(run, stage, optimizer, one_step, lambda *_: False, options.tower_batch)


def _train_language(run: Run, stage: LanguageStage) -> None:
    options, sizes, inner = run.options, run.sizes, run.model.model
    language.frozen([inner.vision_tower])
    optimizer = run.optimizer([inner.language_model, inner.multi_modal_projector, run.places], options.language_rates)
    alignment = Alignment.make()

    def one_step(step: int, averages: Averages) -> Tensor:
        first = run.seeds(step, stage.batch)
        batch = language.make_batch(sizes, stage.mix, first, stage.batch, options.text)
        loss, parts, right = language.step(run.model, run.places, batch, alignment, stage.keep, random.Random(first))
        for name, value in parts.items():
            averages.add_loss(name, value)
        for kind, pair in zip(TYPES, total(right), strict=False):
            averages.add(kind, pair)
        return loss

    def done(step: int, averages: Averages) -> bool:
        passed = all(averages.accuracy(kind) >= least for kind, least in stage.gate.items())
        return bool(stage.gate) and step >= stage.least and passed

    _loop(run, stage, optimizer, one_step, done, stage.batch)
