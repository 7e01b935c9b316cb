"""Small models with a world of their own, on which methods are tried that act in no language model.

A toy is also its recipe: it says what is recorded of an example, and how the model is trained on the records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from winnow.core.info import ModelInfo
from winnow.learn.fitting import Phase, Record
from winnow.learn.options import RunOptions
from winnow.parts.learned import SHIPPED, learned

APART = 1 << 32  # numbers of examples between two seeds of a run

M = TypeVar("M", bound=nn.Module)


class Toy(Generic[M]):
    """A model of winnow's own, trained by `winnow train SLUG`.

    Attributes:
        slug: names the command and the file of the weights.
        kind: of the model, in one word.
        name: of the model, in its facts.
        model: its class, which takes `sizes`.
        examples: how many it is trained on.
        told: what they are, behind their number.
        scale: share of the examples and steps.
    """

    slug: ClassVar[str]
    kind: ClassVar[str]
    name: ClassVar[str]
    examples: ClassVar[int]
    told: ClassVar[str]
    sizes: ClassVar[dict[str, int]]
    settings: ClassVar[dict[str, Any]] = {}
    model: Callable[..., M]

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def make(self) -> M:
        return self.model(**self.sizes)

    def record(self, number: int) -> Record:
        """What is kept of the example of a number."""
        raise NotImplementedError

    def phases(self, records: Sequence[Record]) -> list[Phase]:
        """What is done, one after the other."""
        raise NotImplementedError

    def measure(self, module: Any, records: Sequence[Record]) -> dict[str, float]:
        """Figures on examples that the module was not trained on."""
        raise NotImplementedError

    @classmethod
    def load(cls, weights: str | Path | None = None) -> M:
        """The model with trained weights.

        Args:
            weights: a file that `winnow train` wrote, or `untrained`; default: those that winnow ships.
        """
        given = SHIPPED / f"{cls.slug}.safetensors" if weights is None else weights
        module: Any = learned(cls.slug, str(given), ModelInfo(), cls.model)
        return module.eval()

    @classmethod
    def train(
        cls,
        out: str | Path | None = None,
        *,
        resume: bool = False,
        seed: int = 0,
        scale: float = 1.0,
        save: int = 100,
        quiet: bool = False,
    ) -> Path:
        """Train the model, and return the file of the weights.

        Args:
            out: the folder of the run; default: runs/SLUG.
            save: steps between checkpoints.
        """
        options = RunOptions(cls.slug, out, resume, seed, scale, save=save, quiet=quiet)
        options.begin()
        count, first = options.count(cls.examples), seed * APART

        def numbers(start: int, end: int) -> Iterable[int]:
            return range(first + start, first + end)

        facts = {"name": cls.name, "data": f"{count} {cls.told} from {first} on"}
        return options.made(cls(scale), numbers, count, variant={"model": cls.kind}, facts=facts)


def stacked(records: Sequence[Record]) -> dict[str, Tensor]:
    """Records of equal shapes as one batch."""
    return {name: torch.stack([own[name] for own in records]) for name in records[0]}
