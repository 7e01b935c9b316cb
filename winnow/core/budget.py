"""Budgets: how many content tokens an item may keep. The one place where shares become counts."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, get_args

from winnow.core.errors import WinnowError

Rounding = Literal["half-up", "half-even", "floor", "ceil"]

_ALLOWED = (
    "allowed: an int ≥ 1 (tokens), a float in (0, 1) (share of the item's content tokens), "
    'a percentage such as "25%" or "100%", a count such as "64"'
)


@dataclass(frozen=True)
class Budget:
    """Content tokens that an item keeps.

    Args:
        value: an `int` is tokens; a `float` in (0, 1) is a share of the item's content tokens at entry; a string is
            a count ("64") or a percentage ("25%", "100%"). `1.0` is refused because it reads as both.
        allow_empty: permits 0, which removes the item; as a string, a question mark behind the value ("1%?").
        rounding: of a share; a method binds its own rule to its settings. A share is taken as the decimal that was
            typed: 0.29 of 100 tokens are 29, whatever the nearest binary number is.
    """

    value: int | float | str = 0.25
    allow_empty: bool = False
    rounding: Rounding = "half-up"

    def __post_init__(self) -> None:
        if self.rounding not in get_args(Rounding):
            raise WinnowError(f"rounding={self.rounding!r}; allowed: {', '.join(get_args(Rounding))}.")
        if isinstance(self.value, str) and self.value.strip().endswith("?"):
            object.__setattr__(self, "value", self.value.strip()[:-1])
            object.__setattr__(self, "allow_empty", True)
        number = self._number()
        if isinstance(self.value, str):  # "64" is 64, ".5" is 0.5: equal budgets are equal however they are written
            text = self.value.strip()
            plain: int | float | str = text if text.endswith("%") else number if self.is_count else float(text)  # type: ignore[assignment]
            object.__setattr__(self, "value", plain)
        if number == 0 and not self.allow_empty:
            raise WinnowError(f"keep={self.value!r} keeps nothing; {_ALLOWED}; or Budget(0, allow_empty=True).")
        if self.is_count and number < 0:
            raise WinnowError(f"keep={self.value!r} is negative; {_ALLOWED}.")
        if not self.is_count and not 0 <= number <= 1:
            raise WinnowError(f"keep={self.value!r} is outside (0, 1); {_ALLOWED}.")

    @property
    def is_count(self) -> bool:
        """Whether the budget is a number of tokens; otherwise it is a share."""
        return isinstance(self._number(), int)

    def _number(self) -> int | Fraction:
        """A count as an int, a share as an exact fraction."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise WinnowError(f"keep={value!r} is a {type(value).__name__}; {_ALLOWED}.")
        if isinstance(value, int):
            return value
        if isinstance(value, float):
            if not math.isfinite(value) or not 0 <= value < 1:
                hint = " Say 1 for one token or '100%' for all." if value == 1 else ""
                raise WinnowError(f"keep={value!r} is not a share in (0, 1); {_ALLOWED}.{hint}")
            return Fraction(repr(float(value)))
        text = value.strip()
        if re.fullmatch(r"\d+", text):
            return int(text)
        if re.fullmatch(r"\d+(\.\d+)?%", text):
            return Fraction(text[:-1]) / 100
        if re.fullmatch(r"0?\.\d+", text):
            return Fraction(text)
        raise WinnowError(f"keep={value!r} cannot be read; {_ALLOWED}.")

    @staticmethod
    def parse(value: "Budget | int | float | str") -> "Budget":
        """A budget as it is, or from its value."""
        return value if isinstance(value, Budget) else Budget(value)

    def share(self, n: int) -> Fraction:
        """The share of n tokens that the budget is, before any rounding."""
        number = self._number()
        return Fraction(self.of(n), n) if isinstance(number, int) else number

    def rounded(self, rounding: Rounding) -> "Budget":
        """The same budget under another rule of rounding."""
        return self if rounding == self.rounding else replace(self, rounding=rounding)

    def of(self, at: object) -> int:
        """The count for an item: `at` is its number of content tokens at entry, or a view.

        At least 1, unless empty is allowed, and at most the number of content tokens.
        """
        n = at if isinstance(at, int) else at.n_visual  # type: ignore[attr-defined]
        number = self._number()
        least = min(n, 0 if self.allow_empty else 1)
        count = number if isinstance(number, int) else round_share(number * n, self.rounding)
        return min(n, max(least, count))

    def __str__(self) -> str:
        return f"{self.value}?" if self.allow_empty else str(self.value)


def round_share(exact: Fraction, rounding: Rounding) -> int:
    """A fraction of tokens as a whole number of them."""
    match rounding:
        case "half-up":
            return math.floor(exact + Fraction(1, 2))
        case "half-even":
            return round(exact)
        case "floor":
            return math.floor(exact)
        case _:
            return math.ceil(exact)


def split_evenly(total: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """`total` tokens over groups of the given sizes, as equally as their sizes allow; earlier groups get the rest."""
    if total > sum(sizes):
        raise WinnowError(f"Cannot take {total} tokens from groups of {tuple(sizes)}.")
    share = [0] * len(sizes)
    left = total
    while left:
        open_groups = [i for i, size in enumerate(sizes) if share[i] < size]
        each = left // len(open_groups)
        for i in open_groups if each else open_groups[:left]:  # fewer left than groups: one to each of the first
            more = min(sizes[i] - share[i], max(each, 1))
            share[i] += more
            left -= more
    return tuple(share)
