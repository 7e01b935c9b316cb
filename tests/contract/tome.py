"""ToMe (arXiv 2210.09461): merging between attention and MLP of every vision block, with sizes that bias attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn.functional import normalize

from winnow.core.layout import CLS
from winnow.core.method import Method
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.step import Action, Observe, Reduce, State, Step
from winnow.core.view import View
from winnow.signals.vision import VisionKeys


@dataclass(frozen=True)
class ToMe(Method):
    """Merge the r most similar pairs of even and odd tokens, weighted by how many patches each stands for."""

    r: int = 3
    proportional: bool = True

    def steps(self, info):
        if self.r == 0:
            return ()
        keys = [VisionKeys(layer=i) for i in range(info.vision_depth)]
        return tuple(Step(Point("blocks", i, "mlp"), partial(self.merge, k), (k,)) for i, k in enumerate(keys))

    def merge(self, keys: VisionKeys, view: View, state: State) -> tuple[Action, State]:
        r = min(self.r, (view.n - 1) // 2)
        size = state.summed.get("size", torch.ones(view.b, view.n, dtype=view.tokens.dtype))
        state = replace(state, summed=state.summed | {"size": size})
        if r <= 0:
            return Observe(), state
        k = normalize(view[keys], dim=-1)
        even, odd = torch.arange(0, view.n, 2), torch.arange(1, view.n, 2)
        scores = k[:, even] @ k[:, odd].transpose(1, 2)
        kind = torch.tensor(view.layout.kind)[view.ids]
        scores.masked_fill_((kind[:, even] == CLS)[..., None], -torch.inf)
        best, partner = scores.max(-1)
        ranked = best.argsort(dim=-1, descending=True)
        stays = ranked[:, r:].sort(-1).values
        # Outputs: the even tokens that stay, ascending ([CLS] first), then all odd ones.
        cluster = torch.empty(view.b, view.n, dtype=torch.int64)
        cluster[:, odd] = torch.arange(len(odd)) + stays.shape[-1]
        into = (partner + stays.shape[-1]).scatter(-1, stays, torch.arange(stays.shape[-1]).expand_as(stays))
        cluster[:, even] = into
        m = view.n - r
        total = torch.zeros(view.b, m, dtype=size.dtype).scatter_add(-1, cluster, size)
        representative = torch.cat([even[stays], odd.expand(view.b, -1)], -1)
        weight = size / total.gather(-1, cluster)
        reduction = Reduction.assign(cluster, weight, m=m, representative=representative, ordered=False)
        return Reduce(reduction, log_bias=total.log() if self.proportional else None), state
