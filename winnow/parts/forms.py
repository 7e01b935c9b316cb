"""Forms: what a tensor of the cache is stored as, and blocks of keys and values in such forms."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Self

from jaxtyping import Float
from torch import Tensor

Along = Literal["tokens", "channels"]


class Form:
    """A frozen dataclass of tensors whose first axis is the batch, of other forms, and of plain facts."""

    def read(self) -> Tensor:
        """What was stored, as near as the form allows."""
        raise NotImplementedError

    def rows(self, move: Callable[[Tensor], Tensor]) -> Self:
        """Moved samples."""
        changes = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Form):
                changes[field.name] = value.rows(move)
            elif isinstance(value, Tensor):
                changes[field.name] = move(value)  # type: ignore[assignment]
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def tensors(self) -> Iterator[Tensor]:
        """All that is held."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Form):
                yield from value.tensors()
            elif isinstance(value, Tensor):
                yield value


@dataclass(frozen=True, eq=False)
class Both:
    """A block of the cache: keys in one form, values in another."""

    keys: Form
    values: Form
    length: int

    def read(self) -> tuple[Tensor, Tensor]:
        return self.keys.read(), self.values.read()

    def rows(self, move: Callable[[Tensor], Tensor]) -> "Both":
        return Both(self.keys.rows(move), self.values.rows(move), self.length)

    def tensors(self) -> Iterator[Tensor]:
        yield from self.keys.tensors()
        yield from self.values.tensors()


@dataclass(frozen=True, eq=False)
class Plain(Form):
    """A tensor as it is."""

    x: Tensor

    def read(self) -> Tensor:
        return self.x


@dataclass(frozen=True, eq=False)
class Lines(Form):
    """A tensor `[b, G, n, d]` whose lines are in another form.

    Attributes:
        form: of the lines.
        heads: G.
        along: what a line runs along: the tokens of one channel, or the channels of all heads of one token.
    """

    form: Form
    heads: int
    along: Along

    def read(self) -> Float[Tensor, "b g n d"]:
        lines = self.form.read()
        if self.along == "tokens":
            return lines.unflatten(1, (self.heads, -1)).transpose(2, 3)
        return lines.unflatten(2, (self.heads, -1)).transpose(1, 2)


def lines_of(x: Float[Tensor, "b g n d"], along: Along) -> Float[Tensor, "b lines length"]:
    """The lines of a tensor."""
    return x.transpose(2, 3).flatten(1, 2) if along == "tokens" else x.transpose(1, 2).flatten(2)
