"""Train a reference model from nothing: tower pretraining, alignment, instruction stages with a curriculum.

Every picture is drawn for its step and used once, so the running accuracies of training are accuracies on unseen
scenes. A run is a chain of stages; it is checkpointed inside stages and resumes where it stopped.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.learn import language, tower
from winnow.learn.checkpoint import check_start
from winnow.learn.language import ALL_TOKENS
from winnow.learn.optim import Optimizer, ramp
from winnow.learn.progress import Averages
from winnow.learn.recipes.curriculum import LanguageStage, TowerStage, language_stages, tower_stages
from winnow.learn.run import MAX_SEED, Options, Run
from winnow.learn.stages import MAX_STAGES
from winnow.learn.targets import Alignment
from winnow.learn.workers import average_gradients, launch, rank, total, world
from winnow.reference.presets import Preset, preset
from winnow.world.names import TYPES


def train(
    name: str = "small",
    out: str | Path = "runs/reference",
    *,
    resume: bool = False,
    device: str = "cpu",
    processes: int = 1,
    seed: int = 0,
    scale: float = 1.0,
    dropout: bool = True,
    cls_objective: bool = True,
    tower: str | Path | None = None,
    until: str = "",
    **more: Any,
) -> Path:
    """Train the preset into `out` and return the folder of the finished model.

    `out` holds checkpoint.pt, log.jsonl, curves.png and model/ (a folder for `from_pretrained`, renewed at each
    checkpoint). `processes` share a CPU's cores, one thread each, and each batch. `resume` continues the run that `out`
    holds; `until` names the last stage to run now.

    Two switches are for controls: without `dropout` the language model is always shown all visual tokens, without
    `cls_objective` the tower learns to name its patches and nothing from [CLS]. `tower` is the folder of a run,
    or of a saved reference model, whose pretrained tower to begin with.
    """
    folder = Path(out)
    check_start(folder, resume=resume, device=device, seed=seed, seeds=MAX_SEED, scale=scale)
    sizes, stages = preset(name), _stages(scale)
    names = [stage.name for stage in stages]
    if device != "cpu" and processes != 1:
        raise WinnowError(f"{processes} processes on {device!r}; several processes are for CPUs, use processes=1")
    if until and until not in names:
        raise WinnowError(f"unknown stage {until!r}; the stages are {', '.join(names)}")
    options = Options(
        folder,
        seed=seed,
        scale=scale,
        dropout=dropout,
        cls_objective=cls_objective,
        tower=None if tower is None else Path(tower),
        until=until,
        device=device,
        **more,
    )
    for batch in (options.tower_batch, *(stage.batch for stage in stages if isinstance(stage, LanguageStage))):
        if batch % processes:
            raise WinnowError(f"batches of {batch} scenes cannot be shared by {processes} processes; use a divisor")
    _start(sizes, options)  # here too, so that the process that the user started reports a mistake
    folder.mkdir(parents=True, exist_ok=True)
    launch(_run, processes, sizes, options)
    return folder / "model"


def _stages(scale: float) -> list[TowerStage | LanguageStage]:
    return [*tower_stages(scale), *language_stages(scale)]


def _start(sizes: Preset, options: Options) -> Run:
    """The run of these options where it has to begin or go on."""
    run = Run(sizes, options)
    if run.path.exists():
        run.resume()
    elif options.tower is not None:
        run.take_tower(options.tower, first=len(tower_stages(options.scale)))
    return run


def _run(sizes: Preset, options: Options) -> None:
    run = _start(sizes, options)
    stages = _stages(options.scale)
    last = options.until or stages[-1].name
    end = [stage.name for stage in stages].index(last) + 1
    for stage in stages[run.stage : end]:
        if isinstance(stage, TowerStage):
            _train_tower(run, stage)
        else:
            _train_language(run, stage)


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
        run.images += batch
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
    count = run.share(options.tower_batch)

    def one_step(step: int, averages: Averages) -> Tensor:
        batch = tower.make_batch(run.seeds(step, options.tower_batch), count, sizes.image, sizes.grid)
        batch = tower.Batch(*(x.to(run.device) for x in (batch.images, batch.targets, batch.bags)))
        parts: dict[str, Tensor] = {}
        with torch.autocast(run.device.type, torch.bfloat16):
            loss = tower.loss(vision, run.heads, batch, keep, parts, options.cls_objective)
        for name, pair in parts.items():
            averages.add(name, pair)
        return loss

    _loop(run, stage, optimizer, one_step, lambda *_: False, options.tower_batch)


def _train_language(run: Run, stage: LanguageStage) -> None:
    options, sizes, inner = run.options, run.sizes, run.model.model
    language.frozen([inner.vision_tower])
    optimizer = run.optimizer([inner.language_model, inner.multi_modal_projector, run.places], options.language_rates)
    alignment = Alignment.make()
    count = run.share(stage.batch)
    keep = stage.keep if options.dropout or stage.keep is None else ALL_TOKENS

    def one_step(step: int, averages: Averages) -> Tensor:
        first = run.seeds(step, stage.batch)
        batch = language.make_batch(sizes, stage.mix, first, count, options.text)
        loss, parts, right = language.step(run.model, run.places, batch, alignment, keep, random.Random(first))
        for name, value in parts.items():
            averages.add_loss(name, value)
        for kind, pair in zip(TYPES, total(right), strict=False):
            averages.add(kind, pair)
        return loss

    def done(step: int, averages: Averages) -> bool:
        return step >= stage.least and averages.reach(stage.gate)

    _loop(run, stage, optimizer, one_step, done, stage.batch)
