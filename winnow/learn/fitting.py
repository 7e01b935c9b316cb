"""A run of training in its folder: what is recorded once, a module that is trained on it, and its weights in a file.

The folder holds `cache/` (what was recorded, a file for each few examples), `checkpoint.pt`, `log.jsonl`, and at the
end SLUG.safetensors with SLUG.json beside it. It goes on where it stopped; its seed decides everything, on one thread.
"""

from __future__ import annotations

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
from winnow.learn.progress import Log
from winnow.learn.run import read_checkpoint
from winnow.parts.learned import untrained

CHUNK = 48  # examples in a file of the cache
HELD_OUT = 8  # the last of so many parts of the examples is measured and not trained on

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
    """How one module is trained.

    Attributes:
        sizes: of the module, as its `make` takes them; they are written beside the weights.
        settings: of the method for which the weights are.

    It may also define `start(module)`, which changes what training begins with, and `describe(module)`, which gives
    more to write beside the weights.
    """

    @property
    def sizes(self) -> dict[str, int]: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    def record(self, example: Any) -> Record:
        """What is kept of one example."""

    def make(self) -> nn.Module:
        """The module, of these sizes."""

    def phases(self, records: Sequence[Record]) -> list[Phase]:
        """What is done, one after the other."""

    def measure(self, module: Any, records: Sequence[Record]) -> dict[str, float]:
        """Figures of a module on examples that it was not trained on."""


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
        (self.folder / "cache").mkdir(parents=True, exist_ok=True)
        said = self.folder / "variant.json"
        if said.exists() and json.loads(said.read_text(encoding="utf-8")) != self.variant:
            raise WinnowError(f"{self.folder} holds a run of other options; give the same ones, or another folder.")
        said.write_text(json.dumps(self.variant), encoding="utf-8")

    def made(self, count: int, facts: dict[str, Any]) -> Path:
        """The file of the weights, from so many examples."""
        records = self.recorded(count)
        return self.export(self.trained(records), records, facts)

    def recorded(self, count: int) -> list[Record]:
        """What is kept of each example; what an earlier call has recorded is read."""
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
        module = untrained(self.recipe.make, seed)
        if start := getattr(self.recipe, "start", None):
            start(module)
        module = module.to(self.device).train()
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
