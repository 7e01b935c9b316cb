"""Budgets: how many content tokens an item may keep. The one place where fractions become counts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from winnow.core.errors import WinnowError

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
        rounding: of a share: `half-up` or `floor`.
    """

    value: int | float | str = 0.25
    allow_empty: bool = False
    rounding: str = "half-up"

    def __post_init__(self) -> None:
        if isinstance(self.value, str) and self.value.strip().endswith("?"):
            object.__setattr__(self, "value", self.value.strip()[:-1])
            object.__setattr__(self, "allow_empty", True)
        kind, number = self._parsed()
        if isinstance(self.value, str):  # "64" is 64, ".5" is 0.5: equal budgets are equal however they are written
            text = self.value.strip()
            plain: int | float | str = text if text.endswith("%") else int(text) if kind == "tokens" else float(text)
            object.__setattr__(self, "value", plain)
        if number == 0 and not self.allow_empty:
            raise WinnowError(f"keep={self.value!r} keeps nothing; {_ALLOWED}; or Budget(0, allow_empty=True).")
        if kind == "tokens" and number < 0:
            raise WinnowError(f"keep={self.value!r} is negative; {_ALLOWED}.")
        if kind == "share" and not 0 <= number <= 1:
            raise WinnowError(f"keep={self.value!r} is outside (0, 1); {_ALLOWED}.")

    def _parsed(self) -> tuple[str, float]:
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise WinnowError(f"keep={value!r} is a {type(value).__name__}; {_ALLOWED}.")
        if isinstance(value, int):
            return "tokens", value
        if isinstance(value, float):
            if not math.isfinite(value) or not 0 <= value < 1:
                hint = " Say 1 for one token or '100%' for all." if value == 1 else ""
                raise WinnowError(f"keep={value!r} is not a share in (0, 1); {_ALLOWED}.{hint}")
            return "share", value
        text = value.strip()
        if re.fullmatch(r"\d+", text):
            return "tokens", int(text)
        if re.fullmatch(r"\d+(\.\d+)?%", text):
            return "share", float(text[:-1]) / 100
        if re.fullmatch(r"0?\.\d+", text):
            return "share", float(text)
        raise WinnowError(f"keep={value!r} cannot be read; {_ALLOWED}.")

    @property
    def is_count(self) -> bool:
        """Whether the budget is a number of tokens; otherwise it is a share."""
        return self._parsed()[0] == "tokens"

    def rounded(self, rounding: str) -> Budget:
        """The same budget under another rule of rounding."""
        return replace(self, rounding=rounding)

    @property
    def share(self) -> float | None:
        """The share as a number from 0 to 1; None for a number of tokens."""
        return None if self.is_count else self._parsed()[1]

    def of(self, at: object, *, rounding: str | None = None) -> int:
        """The count for an item: `at` is its number of content tokens at entry, or a view.

        At least 1, unless empty is allowed, and at most the number of content tokens.
        """
        n = at if isinstance(at, int) else at.entry  # type: ignore[attr-defined]
        kind, number = self._parsed()
        least = min(n, 0 if self.allow_empty else 1)
        if kind == "tokens":
            return min(n, max(least, int(number)))
        exact = number * n
        # 1e-9: a share such as 0.29 of 100 must not lose a token to its binary representation.
        count = math.floor(exact + 1e-9) if (rounding or self.rounding) == "floor" else math.floor(exact + 0.5 + 1e-9)
        return min(n, max(least, count))

    def __str__(self) -> str:
        return f"{self.value}?" if self.allow_empty else str(self.value)


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
