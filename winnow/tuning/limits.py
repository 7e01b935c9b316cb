"""What a plan may cost: lost answers, milliseconds to the first token, bytes of the KV cache."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from winnow.core.errors import WinnowError

UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Limits:
    """Limits that hold together; None is no limit.

    With `lose` the fastest plan is looked for that keeps all of them, without it the one that loses fewest answers.

    Attributes:
        lose: answers lost less answers gained, as a share of all questions.
        prefill_ms: from the pixels to the first token: encoder, projector, selection and the LM's prefill.
        kv_bytes: of the KV cache behind the prompt, for each question.
    """

    lose: float | None = None
    prefill_ms: float | None = None
    kv_bytes: int | None = None

    @staticmethod
    def of(lose: Any = None, prefill_ms: Any = None, kv_bytes: Any = None) -> Limits:
        """Limits as a user writes them: `"1%"` or `0.01`, `40` or `"40ms"`, `2_000_000` or `"2MB"`."""
        if lose is None and prefill_ms is None and kv_bytes is None:
            raise WinnowError(
                "No limit was given; say what may be lost (1%), how long the first token may take (40ms), or what the "
                "KV cache may hold (2MB)."
            )
        return Limits(
            None if lose is None else _share(lose),
            None if prefill_ms is None else _number("prefill", prefill_ms, "ms", "milliseconds such as 40"),
            None if kv_bytes is None else _bytes(kv_bytes),
        )

    def __str__(self) -> str:
        parts = []
        if self.lose is not None:
            parts.append(f"at most {100 * self.lose:.3g} % of the answers lost")
        if self.prefill_ms is not None:
            parts.append(f"at most {self.prefill_ms:g} ms to the first token")
        if self.kv_bytes is not None:
            parts.append(f"at most {self.kv_bytes:,} bytes of KV cache")
        return ", ".join(parts)

    def costs_too_much(self, ms: float, kv_bytes: float) -> bool:
        """Whether a plan that takes so long, or holds so much, is outside."""
        slow = self.prefill_ms is not None and ms > self.prefill_ms
        return slow or (self.kv_bytes is not None and kv_bytes > self.kv_bytes)


def _share(given: Any) -> float:
    text = str(given).strip()
    scale = 100 if text.endswith("%") else 1
    value = _number("lose", text.removesuffix("%"), "", "a share such as 1% or 0.01") / scale
    if value >= 1:
        raise WinnowError(f"lose={given!r} allows any loss; allowed: from 0 to below 100%, such as 1% or 0.01.")
    return value


def _bytes(given: Any) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(given).lower())
    unit = UNITS.get((match[2] or "b") if match else "")
    value = 0 if match is None or unit is None else round(float(match[1]) * unit)
    if value < 1:
        raise WinnowError(f"kv_bytes={given!r}; allowed: a number of bytes such as 2000000, 2MB or 2MiB.")
    return value


def _number(name: str, given: Any, unit: str, example: str) -> float:
    try:
        value = float(str(given).strip().removesuffix(unit))
    except ValueError:
        value = math.nan
    if isinstance(given, bool) or not math.isfinite(value) or value < 0 or (value == 0 and unit):
        raise WinnowError(f"{name}={given!r}; allowed: {example}.")
    return value
