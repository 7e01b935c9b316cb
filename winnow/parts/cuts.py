"""Methods that cut in several layers of the LM: where, and how many tokens each cut leaves."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from winnow.core.budget import Budget, Rounding
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo

Each = TypeVar("Each")


def check_cuts(
    method: str,
    layers: Sequence[int] | None,
    budgets: Sequence[Budget],
    default: int | None = None,
    first: Literal[0, 1] = 1,
) -> None:
    """Cuts are made before ascending layers, one for each budget.

    Args:
        default: cuts where no layers are given; None: any number.
        first: the first layer that can be cut before: 1 for methods that need a layer that has run.

    Raises:
        WinnowError: they are not.
    """
    cuts = len(budgets)
    if layers is None and default is not None and cuts != default:
        raise WinnowError(f"{method}: {cuts} budgets without layers; allowed: {default}, or as many as `layers`.")
    if layers is not None and (
        len(layers) != cuts or list(layers) != sorted(set(layers)) or min(layers, default=first) < first
    ):
        raise WinnowError(
            f"{method}: layers={layers!r}; allowed: {cuts} ascending layers from {first}, one for each budget."
        )


def cuts_of(
    info: ModelInfo,
    layers: Sequence[int] | None,
    shares: Sequence[float],
    each: Sequence[Each],
    first: Literal[0, 1] = 1,
) -> dict[int, Each]:
    """What belongs to each layer before which a cut is made; on a shallow LM cuts coincide, and the deepest holds.

    Args:
        layers: as they were given; None: at these shares of the depth, from layer `first` on.
        each: of each cut, its budget or what else the method has.
    """
    found = layers or [max(first, info.at_depth(share)) for share in shares]
    return {info.lm_layer(layer): own for layer, own in zip(found, each, strict=True)}


def equal_parts(cuts: int) -> list[float]:
    """Shares of the depth that cut it into equal parts."""
    return [(cut + 1) / (cuts + 1) for cut in range(cuts)]


def geometric(budget: object, content: int, cuts: int, rounding: Rounding) -> tuple[Budget, ...]:
    """Budgets of equal steps down to the last, which is given."""
    last = Budget.parse(budget).rounded(rounding)  # type: ignore[arg-type]
    share = float(last.share(content))
    return _towards(last, content, cuts, lambda cut: share ** ((cut + 1) / cuts))


def stretched(budget: object, content: int, budgets: Sequence[Budget]) -> tuple[Budget, ...]:
    """Budgets at which each cut drops the same part of all that is dropped, down to the last, which is given."""
    last = Budget.parse(budget).rounded(budgets[-1].rounding)  # type: ignore[arg-type]
    gone = [1 - float(b.share(content)) for b in budgets]
    parts = [g / gone[-1] if gone[-1] else 0.0 for g in gone]
    return _towards(last, content, len(budgets), lambda cut: 1 - (1 - float(last.share(content))) * parts[cut])


def _towards(last: Budget, content: int, cuts: int, share: Callable[[int], float]) -> tuple[Budget, ...]:
    least = last.of(content)
    found: list[Budget] = []
    for part in map(share, range(cuts - 1)):
        value = max(1, least, round(part * content)) if last.is_count else f"{100 * max(part, 1e-6):.6g}%"
        found.append(Budget(value, rounding=last.rounding))
    return (*found, last)
