"""Retrieval heads (CompressKV): heads that look at a needle while it is written, and layers that evictions hurt.

Both are measured once for a model, on prompts that hide a needle and ask for it, and kept in a small JSON file.
"""

import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from winnow.core.errors import WinnowError


@dataclass(frozen=True, eq=False)
class Trace:
    """A prompt with a needle, and what a model wrote behind it.

    Attributes:
        prompt, written: tokens.
        needle: where in the prompt it starts and ends.
        window: of each layer, attention of the prompt's last tokens, `[H, w, n]`.
        rows: of each written token, for each layer, the attention that led to it, `[H, n]`.
        values: of each layer `[G, N, e]`, of the prompt and of what was written.
        project: (layer, what its heads read, `[H·e]`) → the output of its attention, `[D]`.
    """

    prompt: Sequence[int]
    needle: tuple[int, int]
    written: Sequence[int]
    window: Sequence[Float[Tensor, "h w n"]]
    rows: Sequence[Sequence[Float[Tensor, "h _"]]]
    values: Sequence[Float[Tensor, "g _ e"]]
    project: Callable[[int, Tensor], Tensor]

    @property
    def recall(self) -> float:
        """Share of the needle's tokens that were written, each as often as it was."""
        start, end = self.needle
        wanted = Counter(self.prompt[start:end])
        return sum((wanted & Counter(self.written)).values()) / max(1, end - start)


@dataclass(frozen=True)
class Calibration:
    """What was measured of a model.

    Attributes:
        heads: of each layer its query heads, the best retriever first.
        shares: of each layer, its part of the error that evictions make; they sum to 1.
    """

    heads: tuple[tuple[int, ...], ...]
    shares: tuple[float, ...]

    def save(self, path: str | Path) -> None:
        facts = {"heads": {str(layer): own for layer, own in enumerate(self.heads)}, "shares": self.shares}
        Path(path).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> "Calibration":
        """Read a file.

        Raises:
            WinnowError: it is missing, or is none.
        """
        try:
            stat = Path(path).stat()
            return _read(str(path), stat.st_mtime_ns, stat.st_size)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WinnowError(
                f"calibration={str(path)!r} cannot be read as one ({type(error).__name__}: {error}); it is JSON with "
                '"heads", {"0": [3, 1], …} of every layer, and "shares", a number ≥ 0 for each layer. Make it with '
                "calibrate(run, path=…), or leave calibration unset."
            ) from None


@functools.lru_cache(maxsize=8)
def _read(path: str, changed: int, size: int) -> Calibration:
    facts = json.loads(Path(path).read_text(encoding="utf-8"))
    shares = [float(x) for x in facts["shares"]]
    heads = tuple(tuple(facts["heads"][str(layer)]) for layer in range(len(shares)))
    if len(facts["heads"]) != len(shares) or not all(own and len(set(own)) == len(own) for own in heads):
        raise ValueError("each layer has a list of heads, and a share")
    if not all(type(head) is int and head >= 0 for own in heads for head in own):
        raise ValueError("heads are numbers from 0")
    if not all(math.isfinite(x) and x >= 0 for x in shares) or not sum(shares) > 0:
        raise ValueError("shares are numbers ≥ 0, and not all 0")
    return Calibration(heads, tuple(x / sum(shares) for x in shares))


def head_scores(traces: Iterable[Trace], least: float = 0.5) -> Float[Tensor, "l h"]:
    """What each head gives to the whole needle while one of its tokens is written, mean over traces.

    Args:
        least: traces that recall no more of their needle than this do not count.
    """
    found = []
    for trace in traces:
        if trace.recall > least:
            start, end = trace.needle
            wanted = set(trace.prompt[start:end])
            rows = [row for token, row in zip(trace.written, trace.rows, strict=True) if token in wanted]
            found.append(
                torch.stack([torch.stack([x[:, start:end].float().sum(1) for x in row]) for row in rows]).sum(0)
            )
    if not found:
        raise WinnowError(
            f"in none of the prompts did the model write more than {least:.0%} of the needle's tokens, so its heads "
            "cannot be told apart; use prompts that it answers."
        )
    return torch.stack(found).mean(0)


@torch.no_grad()
def layer_shares(traces: Iterable[Trace], kept: Callable[[int, Float[Tensor, "h w n"]], Tensor]) -> Float[Tensor, " l"]:
    """The part of each layer in the error of attention outputs when only some of the prompt's slots are left.

    Args:
        kept: (layer, attention of the window) → indices of the slots of the prompt that stay.
    """
    found = []
    for trace in traces:
        errors = torch.zeros(len(trace.window), dtype=torch.float64)
        for layer, window in enumerate(trace.window):
            n = window.shape[2]
            stays = torch.zeros(n, dtype=torch.bool, device=window.device)
            stays[kept(layer, window)] = True
            for row in trace.rows:
                errors[layer] += _error(trace, layer, row[layer].float(), stays)
        found.append(errors / errors.sum().clamp_min(1e-30))
    mean = torch.stack(found).mean(0)
    return mean / mean.sum().clamp_min(1e-30)


def _error(trace: Trace, layer: int, row: Tensor, stays: Tensor) -> float:
    """‖compressed − full‖ / ‖full‖ of one attention output."""
    left = row.clone()
    left[:, : stays.shape[0]] *= stays
    left = left / left.sum(1, keepdim=True).clamp_min(1e-30)
    values = trace.values[layer][:, : row.shape[1]].float()
    values = values.repeat_interleave(row.shape[0] // values.shape[0], 0)
    full, less = (trace.project(layer, (weights[:, None] @ values).flatten()).float() for weights in (row, left))
    return float((less - full).norm() / (full.norm() + 1e-5))


@functools.lru_cache(maxsize=64)
def layer_budgets(shares: tuple[float, ...], average: int, floor: int = 32) -> tuple[int, ...]:
    """Slots of each layer, `average` in the mean: at least `floor`, at most thrice the average, more where errors are.

    Rounding and bounds are made good one slot at a time, by the layers with the largest shares first where slots are
    to be added, and by those with the smallest where they are to go.
    """
    depth, floor = len(shares), min(floor, average)
    total, most = depth * average, 3 * average
    found = [min(most, max(floor, floor + round(share * (total - floor * depth)))) for share in shares]
    order = sorted(range(depth), key=lambda layer: -shares[layer])
    missing = total - sum(found)
    step = 1 if missing > 0 else -1
    while missing:
        for layer in order[::step]:
            if missing and floor <= found[layer] + step <= most:
                found[layer] += step
                missing -= step
    return tuple(found)
