"""Signals: what a method looks at. A signal owns its site, its reading, and how it follows reductions.

A new signal is one class. It says where it listens (`site`) and what it makes of what passes there (`read`); the engine
brings both together without losing fused attention, and hands the method `view[signal]` in the tokens of the moment.
"""

import functools
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.reduction import Reduction

Stack = Literal["pixels", "vision", "sound", "projector", "text", "lm"]
Shows = Literal["attention", "hidden", "entry"]


@dataclass(frozen=True, order=True)
class Site:
    """Where a signal listens.

    Attributes:
        stack: `pixels` (what the encoder is given), `vision` (a block of the tower), `sound` (a layer of the encoder of
            sounds), `projector`, `text` (the question, as it enters the language model), or `lm` (a layer).
        index: block or layer, from 0; 0 for the others.
        shows: `attention`, the queries, keys and values of the block; `hidden`, what goes in and comes out of it; in
            the language model also `entry`: what is about to go into the layer before which a step acts.
    """

    stack: Stack
    index: int = 0
    shows: Shows = "attention"


@dataclass(frozen=True)
class Signal:
    """Base of all signals. Equal settings are the same signal, so two methods share one computation.

    Class attributes:
        per: `token` (values for each token of the item) or `item` (one value for each item).
        covers_prefix: whether, at the tower's side, there are values for [CLS] too.
        reads_text: whether it depends on the text, so that it must be known where the question is.
        needs_text_encoder: whether it needs the text tower that belongs to the model's vision tower, handed over.
        beside: whether it is one of the sound that belongs to a video, and not of the video's own tokens. It is `per`
            item then: `[b, A, …]`, a row for each of A tokens of the sound, in their order; A is 0 where there is none.
    """

    per: ClassVar[Literal["token", "item"]] = "token"
    covers_prefix: ClassVar[bool] = False
    reads_text: ClassVar[bool] = False
    needs_text_encoder: ClassVar[bool] = False
    beside: ClassVar[bool] = False

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for name, hint in signal_types(kind).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal and value not in get_args(hint):
                allowed = ", ".join(map(repr, get_args(hint)))
                raise WinnowError(f"{type(self).__name__}: {name} is one of {allowed}; got {value!r}.")

    @property
    def reads_question(self) -> bool:
        """Whether the signal depends on where the question begins and ends."""
        return False

    @property
    def queries(self) -> Literal["all", "question", "last"]:
        """Whose queries the signal of an LM layer needs. A probe may compute those alone, which makes it cheap."""
        return "all"

    def _with(self, **changes: Any) -> Self:
        return replace(self, **changes)

    def resolve(self, info: ModelInfo) -> Self:
        """The signal with its settings made definite for this model.

        Raises:
            UnsupportedError: a model of this kind cannot give the signal.
        """
        return self

    def site(self, info: ModelInfo) -> Site:
        """Where a resolved signal listens."""
        raise NotImplementedError(f"{type(self).__name__} does not say where it listens: define site(info)")

    def read(self, seen: Any) -> Tensor:
        """The signal from what passed at its site; see `winnow.signals` for what each stack shows.

        Returns:
            At `vision`, `sound`, `projector` and `pixels`: `[calls, N, …]`, a row for each token that the site showed.
            At `lm`: `[B, P, …]`, a row for each slot, or `[B, …]` where the signal is `per` item. At `text`, for one
            item alone: `[N, …]`, a row for each of its tokens, or any shape where the signal is `per` item.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it reads: define read(seen)")

    def carry(self, values: Tensor, reduction: Reduction) -> Tensor:
        """The values `[N, …]` of one item after a reduction: an output has those of its representative."""
        return values[reduction.representatives] if self.per == "token" else values

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        """Random values for tests without a model: `[b, n, …]`, or `[b, …]` where the signal is `per` item.

        By default positive values that sum to one over the tokens, as attention does; one number for each item.
        """
        if self.per == "item":
            return torch.rand(b, generator=generator) * 0.2
        return torch.randn(b, n, generator=generator).mul(2).softmax(-1)


def signal_types(kind: Any) -> dict[str, Any]:
    """The types of a signal's settings."""
    return _signal_types(kind)


@functools.cache
def _signal_types(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}


def block_index(layer: int | str, depth: int, what: str) -> int:
    """A block number from a signal's `layer`: 0-based, negative from the end."""
    if not isinstance(layer, int) or isinstance(layer, bool) or not -depth <= layer < depth:
        raise WinnowError(f"{what} has blocks 0 … {depth - 1} (or −{depth} … −1); got layer={layer!r}.")
    return layer % depth
