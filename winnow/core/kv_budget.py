"""Budgets of the KV cache: how many slots a head of a layer keeps, said in tokens, shares, mass or bytes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from winnow.core.budget import Budget
from winnow.core.errors import WinnowError

KINDS = ("text", "image", "video", "audio")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_ALLOWED = (
    'allowed: slots of a head (512), their share (0.2, "20%"), bytes of the whole cache ("1.5GB"), a share of the '
    'score\'s mass ("mass=0.95"), slots for each layer ([512,256,…]), or shares by what was read '
    "([visual=10%,text=100%])"
)


@dataclass(frozen=True)
class KVBudget:
    """Slots of the KV cache that a head keeps.

    Args:
        value: a count or a share, as a `Budget` takes them, of the tokens that were read; bytes of all layers and
            samples together; `mass=p`, the fewest slots that hold a share p of the score; one count for each layer; or
            `kind=budget` for text, image, video, audio or visual (image and video), where what is not named is kept.
    """

    value: int | float | str | tuple[int | str, ...] = "20%"

    def __post_init__(self) -> None:
        value = self.value
        if isinstance(value, list):
            object.__setattr__(self, "value", value := tuple(value))
        if isinstance(value, tuple):
            if not value or (not self.is_layers and not self.is_kinds):
                raise WinnowError(f"keep={list(value)!r} cannot be read; {_ALLOWED}.")
            if self.is_layers and any(n < 1 for n in value):  # type: ignore[operator]
                raise WinnowError(f"keep={list(value)!r}: each layer keeps at least 1 slot; {_ALLOWED}.")
            if self.is_kinds:
                self.by_kind()
        elif self.is_bytes:
            if self.bytes < 1:
                raise WinnowError(f"keep={value!r} keeps nothing; {_ALLOWED}.")
        elif self.is_mass:
            if not 0 < self.mass <= 1:
                raise WinnowError(f"keep={value!r}: the mass is above 0 and at most 1; {_ALLOWED}.")
        else:
            try:
                plain = Budget(value).value
            except WinnowError:
                raise WinnowError(f"keep={value!r} cannot be read; {_ALLOWED}.") from None
            object.__setattr__(self, "value", plain)

    @staticmethod
    def parse(value: "KVBudget | Budget | int | float | str | Sequence[int | str]") -> "KVBudget":
        """A budget as it is, or from its value."""
        if isinstance(value, KVBudget):
            return value
        if isinstance(value, Budget):
            value = value.value
        return KVBudget(tuple(value) if isinstance(value, list) else value)  # type: ignore[arg-type]

    @property
    def is_layers(self) -> bool:
        """Whether each layer has its own count."""
        return isinstance(self.value, tuple) and all(isinstance(n, int) and n is not True for n in self.value)

    @property
    def is_kinds(self) -> bool:
        """Whether it says something of each kind of token."""
        return isinstance(self.value, tuple) and all(isinstance(n, str) and "=" in n for n in self.value)

    @property
    def is_bytes(self) -> bool:
        return isinstance(self.value, str) and re.fullmatch(r"[\d.]+\s*[KMG]?i?B", self.value.strip(), re.I) is not None

    @property
    def is_mass(self) -> bool:
        return isinstance(self.value, str) and self.value.strip().startswith("mass=")

    @property
    def bytes(self) -> int:
        """Of the whole cache."""
        number, unit = re.fullmatch(r"([\d.]+)\s*(\w+)", str(self.value).strip()).groups()  # type: ignore[union-attr]
        return int(_number(number) * _UNITS[unit.upper()])

    @property
    def mass(self) -> float:
        return float(_number(str(self.value).partition("=")[2]))

    @property
    def is_all(self) -> bool:
        """Whether nothing is ever dropped."""
        if self.is_kinds:
            return all(own.is_all for own in self.by_kind().values())
        return self.value == "100%"

    def by_kind(self) -> dict[str, "KVBudget"]:
        """The budget of each kind of token that is named."""
        found: dict[str, KVBudget] = {}
        for part in self.value:  # type: ignore[union-attr]
            name, _, amount = str(part).partition("=")
            names = ("image", "video") if name.strip() == "visual" else (name.strip(),)
            for kind in names:
                if kind not in KINDS or kind in found:
                    what = "is named twice" if kind in found else f"is not one of {', '.join(KINDS)}, visual"
                    raise WinnowError(f"keep={self}: {kind!r} {what}; {_ALLOWED}.")
                found[kind] = KVBudget(_none_or(amount.strip()))
                if found[kind].is_bytes or found[kind].is_mass:
                    raise WinnowError(f"keep={self}: a kind has a count or a share, not {amount!r}; {_ALLOWED}.")
        return found

    def of(self, n: int, fresh: int, *, layer: int, depth: int, slot_bytes: int = 0) -> int:
        """Slots that a head keeps.

        Args:
            n: slots that it holds now.
            fresh: how many of them were read in this forward. A share is one of these: what was kept before stays in
                number.
            layer, depth: of the language model.
            slot_bytes: of one slot of all heads and samples of this layer; needed for bytes.
        """
        if self.is_bytes:
            return max(1, min(n, self.bytes // max(1, slot_bytes * depth)))
        if self.is_layers:
            if len(self.value) != depth:  # type: ignore[arg-type]
                raise WinnowError(f"keep names {len(self.value)} layers; the model has {depth}.")  # type: ignore[arg-type]
            return min(n, self.value[layer])  # type: ignore[index,return-value]
        if self.is_mass or self.is_kinds:
            raise WinnowError(f"keep={self} is no number of slots before the scores are known.")
        budget = Budget(self.value, rounding="floor")  # type: ignore[arg-type]
        if budget.is_count:
            return budget.of(n)
        return n - fresh + (budget.of(fresh) if fresh else 0)

    def __str__(self) -> str:
        if isinstance(self.value, tuple):
            return "[" + ",".join(map(str, self.value)) + "]"
        return str(self.value)


def _number(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise WinnowError(f"{text!r} is no number; {_ALLOWED}.") from None


def _none_or(amount: str) -> str | int:
    """`0` and `0%` keep none of a kind; every other amount is as a budget takes it."""
    if re.fullmatch(r"0+(\.0*)?%?", amount):
        raise WinnowError("a kind keeps at least one token; name a small count or share, such as 1%; " + _ALLOWED + ".")
    return int(amount) if amount.isdigit() else amount
