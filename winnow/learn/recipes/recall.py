"""Train the recall model from nothing: short texts with few facts first, then longer ones with more.

Looking a name up is learned fastest on a few facts in a few dozen words, and carries over. Hence the order, and the
gates on accuracy instead of fixed lengths. Every text is drawn for its step and used once, so the running accuracies of
training are accuracies on unseen texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from winnow.learn import attention, recall, stages
from winnow.learn.checkpoint import check_start, save_model
from winnow.learn.optim import Optimizer
from winnow.learn.recall import Texts
from winnow.learn.stages import Chain
from winnow.reference import text
from winnow.world.recall import TASKS

SEEDS = 1 << 16  # of runs
STEP_SEEDS = 1 << 12
RATES = (8e-3, 4e-3)  # Muon, AdamW


@dataclass(frozen=True)
class Stage(stages.Stage):
    """Steps on these texts, in batches of so many tokens."""

    texts: Texts
    tokens: int = 6144


MIX = {"pairs": 4, "several": 4, "copy": 2, "echo": 1, "needle": 1, "filler": 0.5}
FACTS = {"pairs": 5, "several": 5, "needle": 1, "filler": 1}
LOOK_UP = {"pairs": 0.92, "several": 0.9}


def full_plan(scale: float = 1.0) -> list[Stage]:
    """Contexts of at most 64 tokens, then of 96 and 512."""

    def steps(count: int) -> int:
        return max(4, round(count * scale))

    return [
        Stage("64", steps(100), Texts(MIX, (32, 48, 64), full=0.7, room=64), tokens=4096, rate=0.5),
        Stage(
            "96", steps(100), Texts(MIX, (48, 64, 96), full=0.7, room=64), gate=LOOK_UP, least=steps(25), tokens=4096
        ),
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
        plan: stages in place of `full_plan(scale)`.
        every, save, stop_after: see `Chain.go`.
    """
    folder = Path(out)
    check_start(folder, resume=resume, device=device, seed=seed, seeds=SEEDS, scale=scale)
    run = _Run(folder, seed, scale, sizes or text.config(), torch.device(device), quiet)
    run.resume()
    return run.go(plan or full_plan(scale), every=every, save=save, stop_after=stop_after)


class _Run(Chain[Stage]):
    """One optimizer goes through all stages."""

    counted = "tokens"
    warmup = 20
    anew = False

    def __init__(
        self, folder: Path, seed: int, scale: float, sizes: LlamaConfig, device: torch.device, quiet: bool
    ) -> None:
        self.sizes, self.model = sizes, text.make_model(sizes, seed)
        self.model.to(device)  # type: ignore[arg-type]
        if device.type == "cpu":
            attention.use(self.model)
        super().__init__(folder, {"seed": seed, "scale": scale, "recipe": "recall"}, {"model": self.model}, quiet)

    def optimizer(self, stage: Stage) -> Optimizer:
        return Optimizer([self.model], *RATES)

    def loss(self, stage: Stage) -> Tensor:
        rows = recall.make_rows(stage.texts, self.first_seed(STEP_SEEDS), stage.tokens)
        loss, parts, right = recall.step(self.model, rows)
        self.count += rows.ids.numel()
        for name, value in parts.items():
            self.averages.add_loss(name, value)
        for task, pair in zip(TASKS, right, strict=True):
            self.averages.add(task, pair)
        return loss

    def export(self, folder: Path) -> None:
        save_model(self.model, text.make_model(self.sizes), text.make_tokenizer(), folder)
