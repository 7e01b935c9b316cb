"""Forms: what a tensor of the cache is stored as, and blocks of keys and values in such forms."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

Along = Literal["tokens", "channels"]
Move = Callable[[Tensor], Tensor]


class Form:
    """A frozen dataclass of tensors whose first axis is the batch, of other forms, and of plain facts."""

    def read(self) -> Tensor:
        """What was stored, as near as the form allows."""
        raise NotImplementedError

    def _parts(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}  # type: ignore[arg-type]

    def rows(self, move: Move) -> Self:
        """Moved samples."""
        changes: dict[str, Any] = {}
        for name, value in self._parts().items():
            if isinstance(value, Form):
                changes[name] = value.rows(move)
            elif isinstance(value, Tensor):
                changes[name] = move(value)
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def tensors(self) -> Iterator[Tensor]:
        """All that is held."""
        for value in self._parts().values():
            if isinstance(value, Form):
                yield from value.tensors()
            elif isinstance(value, Tensor):
                yield value

    def fits(self, other: "Form") -> bool:
        """Whether another form differs in its numbers, and in the size of its batch, alone."""
        if type(self) is not type(other):
            return False
        for own, its in zip(self._parts().values(), other._parts().values(), strict=True):
            if isinstance(own, Form):
                same = own.fits(its)
            elif isinstance(own, Tensor):
                same = isinstance(its, Tensor) and (own.shape[1:], own.dtype) == (its.shape[1:], its.dtype)
            else:
                same = own == its
            if not same:
                return False
        return True

    def beside(self, other: Self, count: int) -> Self:
        """One more form that fits, for each sample behind the `count` ones that are in the batch already."""
        changes: dict[str, Any] = {}
        for name, value in self._parts().items():
            its = getattr(other, name)
            if isinstance(value, Form):
                changes[name] = value.beside(its, count)
            elif isinstance(value, Tensor):
                changes[name] = torch.cat([value.unflatten(0, (-1, count)), its[:, None]], 1).flatten(0, 1)
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class Both:
    """A block of the cache: keys in one form, values in another.

    Attributes:
        each: slots of one part.
        count: parts, which lie side by side in the batch: many small blocks are read at once.
    """

    keys: Form
    values: Form
    each: int
    count: int = 1

    @property
    def length(self) -> int:
        return self.each * self.count

    def read(self) -> tuple[Tensor, Tensor]:
        keys, values = self.keys.read(), self.values.read()
        if self.count == 1:
            return keys, values
        return tuple(x.unflatten(0, (-1, self.count)).transpose(1, 2).flatten(2, 3) for x in (keys, values))

    def joined(self, later: Any) -> "Both | None":
        """This block and a later one as one; None where they do not fit."""
        if (later.each, later.count) != (self.each, 1) or not self.keys.fits(later.keys):
            return None
        if not self.values.fits(later.values):
            return None
        keys, values = (a.beside(b, self.count) for a, b in ((self.keys, later.keys), (self.values, later.values)))
        return Both(keys, values, self.each, self.count + 1)

    def rows(self, move: Move) -> "Both":
        def parts(x: Tensor) -> Tensor:
            return move(x.unflatten(0, (-1, self.count))).flatten(0, 1)

        own = move if self.count == 1 else parts
        return Both(self.keys.rows(own), self.values.rows(own), self.each, self.count)

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
