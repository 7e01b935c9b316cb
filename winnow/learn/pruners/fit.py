"""Fit a learned method: record what the frozen model shows once, train the method's module on it, write its weights.

A run is a folder: `cache/` (what was recorded, a file for each few questions), `checkpoint.pt`, `log.jsonl`, and at the
end SLUG.safetensors with SLUG.json beside it. It goes on where it stopped; its seed decides everything, on one thread.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from winnow.core.errors import WinnowError
from winnow.core.plan import Plan
from winnow.engine.compress import compress
from winnow.learn.progress import Log
from winnow.learn.pruners import trainable
from winnow.learn.pruners.frozen import APART, FIRST, Example, Frozen, questions
from winnow.learn.run import read_checkpoint
from winnow.models.load import load
from winnow.parts.learned import untrained

LEAST = 16  # questions
CHUNK = 48  # questions in a file of the cache
HELD_OUT = 8  # the last of so many parts of the questions is measured and not trained on
MAX_SEED = 1024

Record = dict[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """Steps with one loss.

    Args:
        loss: from the module and the numbers of the examples of a batch.
    """

    name: str
    steps: int
    batch: int
    rate: float
    loss: Callable[[nn.Module, list[int]], Tensor]


class Recipe(Protocol):
    """How one method is trained. A module of this package defines `Recipe(frozen, scale)`.

    Attributes:
        frozen: the model.
        questions: how many it wants.
        sizes: of the module, as its `make` takes them; they are written beside the weights.
        settings: of the method for which the weights are.
    """

    frozen: Frozen
    questions: int
    sizes: dict[str, int]
    settings: dict[str, Any]

    def record(self, example: Example) -> Record:
        """What is kept of one question."""

    def make(self) -> nn.Module:
        """The module, of these sizes."""

    def phases(self, records: Sequence[Record]) -> list[Phase]:
        """What is done, one after the other."""

    def measure(self, module: nn.Module, records: Sequence[Record]) -> dict[str, float]:
        """Figures of a module on questions that it was not trained on."""


def fit(
    slug: str,
    out: str | Path | None = None,
    *,
    model: str | None = None,
    resume: bool = False,
    seed: int = 0,
    scale: float = 1.0,
    data: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    save: int = 100,
    quiet: bool = False,
) -> Path:
    """Train a learned method on a frozen model, and return the file of its weights.

    Args:
        out: the folder of the run; default: runs/SLUG.
        model: an id or a folder of a checkpoint; None is the bundled reference model.
        scale: share of the recipe's questions and steps.
        data: questions as JSON lines, as `winnow bench --data` takes them; default: scenes of winnow's world.
        save: steps between checkpoints.
    """
    if slug not in trainable():
        raise WinnowError(f"{slug!r} is not trained by winnow; these are: {', '.join(trainable())}.")
    folder = Path(out) if out is not None else Path("runs") / slug
    if not 0 < scale < math.inf or not 0 <= seed < MAX_SEED:
        raise WinnowError(f"scale {scale}, seed {seed}; scale is above 0, and seed is 0 … {MAX_SEED - 1}.")
    if (folder / "cache").exists() and not resume:
        raise WinnowError(f"{folder} already holds a run; continue it with resume, or choose another folder.")
    torch.set_num_threads(1)
    built, processor = load(model, device=device, dtype=dtype)
    built.set_attn_implementation("eager")  # gradients reach its masks and its weights
    recipes = importlib.import_module(f"winnow.learn.pruners.{slug.replace('-', '_')}")
    with compress(built, Plan(()), processor=processor) as handle:
        count = max(LEAST, round(recipes.Recipe.questions * scale))
        task = questions(count, seed, None if data is None else Path(data))
        recipe: Recipe = recipes.Recipe(Frozen(handle, processor, task), scale)
        variant = {
            "method": slug,
            "model": handle.info.fingerprint(),
            "seed": seed,
            "scale": scale,
            "questions": task.settings["hash"],
        }
        (folder / "cache").mkdir(parents=True, exist_ok=True)
        run = Run(folder, recipe, variant, Log(folder, quiet), save, recipe.frozen.examples, handle.bound.device)
        records = run.recorded(len(task.questions))
        module = run.trained(records)
        return run.export(module, records, _facts(slug, model, seed, scale, data))


def _facts(slug: str, model: str | None, seed: int, scale: float, data: str | Path | None) -> dict[str, str]:
    """How the weights can be made again."""
    given = {"model": model, "seed": seed or None, "scale": None if scale == 1 else scale, "data": data}
    command = f"winnow train {slug}" + "".join(f" --{k} {v}" for k, v in given.items() if v is not None)
    return {
        "command": command,
        "name": model or "bundled reference model",
        "data": str(data) if data is not None else f"scenes of the train split from {FIRST + seed * APART} on",
    }


@dataclass
class Run:
    """A run in its folder.

    Attributes:
        examples: what is recorded, from a number to another.
        device: where the module is trained.
    """

    folder: Path
    recipe: Recipe
    variant: dict[str, Any]
    log: Log
    save: int
    examples: Callable[[int, int], Iterable[Any]]
    device: torch.device

    def __post_init__(self) -> None:
        said = self.folder / "variant.json"
        if said.exists() and json.loads(said.read_text(encoding="utf-8")) != self.variant:
            raise WinnowError(f"{self.folder} holds a run of other options; give the same ones, or another folder.")
        said.write_text(json.dumps(self.variant), encoding="utf-8")

    def recorded(self, count: int) -> list[Record]:
        """What is kept of each question; what an earlier call has recorded is read."""
        records: list[Record] = []
        for start in range(0, count, CHUNK):
            path = self.folder / "cache" / f"{start // CHUNK:05d}.safetensors"
            if not path.exists():
                examples = self.examples(start, min(count, start + CHUNK))
                made = [self.recipe.record(example) for example in examples]
                flat = {f"{i}.{name}": x.contiguous().cpu() for i, own in enumerate(made) for name, x in own.items()}
                part = path.with_suffix(".partial")
                save_file(flat, part)
                os.replace(part, path)
                self.log.write("record", start + len(made), {})
            own: dict[int, Record] = {}
            for key, x in load_file(path).items():
                number, _, name = key.partition(".")
                own.setdefault(int(number), {})[name] = x
            records += [own[i] for i in sorted(own)]
        return records

    def trained(self, records: list[Record]) -> nn.Module:
        """The module after all phases."""
        seed = self.variant["seed"]
        module = untrained(self.recipe.make, seed).to(self.device).train()
        mine = range(first_held_out(records))
        phases, path = self.recipe.phases(records), self.folder / "checkpoint.pt"
        done, at, state = 0, 0, None
        if path.exists():
            saved = read_checkpoint(path)
            module.load_state_dict(saved["module"])
            done, at, state = saved["phase"], saved["at"], saved["optimizer"]
        for number, phase in enumerate(phases):
            if number < done:
                continue
            optimizer = torch.optim.AdamW(module.parameters(), lr=phase.rate, weight_decay=0.01, betas=(0.9, 0.98))
            if state is not None:
                optimizer.load_state_dict(state)
            average = 0.0
            for step in range(at, phase.steps):
                chosen = torch.Generator().manual_seed((seed * 8 + number) * (1 << 24) + step)
                batch = [mine[i] for i in torch.randint(len(mine), (phase.batch,), generator=chosen).tolist()]
                for group in optimizer.param_groups:
                    group["lr"] = phase.rate * cosine(step, phase.steps)
                loss = phase.loss(module, batch)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
                average = loss.item() if step == at else 0.95 * average + 0.05 * loss.item()
                if (step + 1) % 25 == 0:
                    self.log.write(phase.name, step + 1, {"loss": average})
                if (step + 1) % self.save == 0:
                    self._checkpoint(path, module, optimizer, number, step + 1)
            at, state = 0, None
            self._checkpoint(path, module, None, number + 1, 0)
        return module.eval()

    def _checkpoint(self, path: Path, module: nn.Module, optimizer: Any, phase: int, at: int) -> None:
        state = {
            "variant": self.variant,
            "module": module.state_dict(),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "phase": phase,
            "at": at,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def export(self, module: nn.Module, records: list[Record], facts: dict[str, Any]) -> Path:
        """The weights in bfloat16, and what is known of them, measured as they are then."""
        target = self.folder / f"{self.variant['method']}.safetensors"
        weights = {name: x.bfloat16().contiguous().cpu() for name, x in module.state_dict().items()}
        save_file(weights, target)
        module.cpu().load_state_dict({name: x.float() for name, x in weights.items()})
        others = records[first_held_out(records) :]
        figures = {
            name: {key: round(value, 4) for key, value in self.recipe.measure(own.eval(), others).items()}
            for name, own in (("trained", module), ("untrained", untrained(self.recipe.make, self.variant["seed"])))
        }
        said = {
            **self.variant,
            **facts,
            "sizes": self.recipe.sizes,
            "settings": self.recipe.settings,
            "records": len(records),
            "held_out": len(others),
            "measured": figures,
        }
        said |= describe(module) if (describe := getattr(self.recipe, "describe", None)) else {}
        target.with_suffix(".json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        return target


def first_held_out(records: Sequence[Record]) -> int:
    """The first of the records that are measured and not trained on."""
    return len(records) * (HELD_OUT - 1) // HELD_OUT


def cosine(step: int, steps: int, warmup: int = 30, floor: float = 0.02) -> float:
    """The share of the rate at a step: warm-up, then half a cosine down to `floor`."""
    return min((step + 1) / warmup, max(floor, 0.5 + 0.5 * math.cos(math.pi * step / steps)))
