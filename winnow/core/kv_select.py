"""From scores of slots to the slots that stay, under every kind of budget."""

import torch
from jaxtyping import Float
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.core.kv import KVView
from winnow.core.kv_budget import KINDS, KVBudget
from winnow.core.reduction import Reduction
from winnow.core.select import comparable, ranked
from winnow.core.step import KVReduce


def keep_slots(chosen: Reduction) -> KVReduce:
    """The same slots for keys and values."""
    return KVReduce(chosen, chosen)


def best_slots(
    scores: Float[Tensor, "b g n"], keep: KVBudget, view: KVView, *, first: int = 0, last: int = 0
) -> KVReduce | None:
    """The slots with the highest scores, in their order; None where all stay.

    Equal scores: the earlier slot. NaN counts as the lowest score.

    Args:
        first, last: slots at either end that stay whatever they score (sinks, and a window). They count in the budget,
            and where it is smaller than they are, they win.
    """
    if keep.is_all:
        return None
    scores = comparable(scores.flatten(0, 1)).view_as(scores)
    n = view.n
    ends = torch.zeros(n, dtype=torch.bool, device=scores.device)
    ends[:first] = True
    ends[max(0, n - last) :] = True
    if keep.is_kinds:
        return _by_kind(scores, keep, view, ends)
    count = _of_mass(scores, keep.mass, view, ends) if keep.is_mass else view.budget(keep)
    count = max(count, int(ends.sum()))
    if count >= n:
        return None
    return keep_slots(Reduction.select(top_slots(scores.masked_fill(ends, torch.inf), count), n))


def top_slots(scores: Float[Tensor, "b g n"], count: int) -> Tensor:
    """`[b, G, count]` the slots with the highest scores, ascending."""
    return _ranked(scores)[..., :count].sort(-1).values


def _ranked(scores: Float[Tensor, "b g n"]) -> Tensor:
    return ranked(scores.flatten(0, 1)).view_as(scores)


def _of_mass(scores: Tensor, mass: float, view: KVView, ends: Tensor) -> int:
    """The fewest slots that hold a share of the score, averaged over heads; the most that any sample needs."""
    whole = scores.clamp_min(0).nan_to_num(0, posinf=0).mean(1)
    total = whole.sum(-1, keepdim=True)
    if bool((total <= 0).any()):
        raise WinnowError("keep=mass=… needs scores that are not negative, such as attention; use a count or a share.")
    held = whole.sort(-1, descending=True).values.cumsum(-1) / total
    need = (held < mass - 1e-6).sum(-1) + 1
    return min(view.n, max(int(need.max()), int(ends.sum())))


def _by_kind(scores: Tensor, keep: KVBudget, view: KVView, ends: Tensor) -> KVReduce | None:
    """Each kind that is named keeps its own best; the samples of a view have as many of each, as have its heads."""
    if view.kinds is None:
        raise WinnowError(f"keep={keep} asks what each token is, and that is not known here.")
    budgets, stays = keep.by_kind(), torch.ones_like(scores, dtype=torch.bool)
    for kind, own in budgets.items():
        mine = view.kinds == KINDS.index(kind)
        n = int(mine[0, 0].sum())
        fresh = min(n, int(mine[0, 0, view.n - view.fresh :].sum()))
        count = own.of(n, fresh, layer=view.layer, depth=view.depth) if n else 0
        count = max(count, int((ends & mine[0, 0]).sum()))
        if count >= n:
            continue
        order = _ranked(scores.masked_fill(ends, torch.inf).masked_fill(~mine, -torch.inf))[..., :count]
        stays &= ~mine | torch.zeros_like(stays).scatter_(-1, order, True)
    if bool(stays.all()):
        return None
    left = tuple(stays.flatten(0, 1).sum(-1).tolist())
    return keep_slots(Reduction.select(stays, counts=left))
