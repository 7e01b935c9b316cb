"""FlowCut (arXiv 2505.19536): cut the patches while the vision encoder runs, by what flows to [CLS] over the blocks.

Looks at: the [CLS] row and the values of each block up to the feature block. Cost: O(V · D) for each; blocks behind a
cut run on fewer tokens, which is where it saves.

In each block a patch scores (r + s) · |v|: r is its share of the attention of [CLS], mean over heads; s its share of
the softmax of the products of its value and that of [CLS], mean over heads; |v| the sum of the absolute entries of its
value, mean over heads. Scores run on as half of the old and half of the new. With l blocks left to the last one that
cuts, every second block, ending with it, drops round((N − T)/√l · (1 − h²)) of N patches, those with the lowest running
score, and the last one all but T: h is the entropy of r over the largest possible one. The last cut is before the
feature block. These steps are those of the code for LLaVA-1.5; the paper's text says that the ratio adapts to the
entropy of the attention, that three criteria are multiplied and added, and that they are accumulated.
A tile cannot see the others while the tower runs: each keeps `tile` patches, and before the LM the item keeps `keep`
of them, by the running scores; patches that unpadding removes take part, and those that are kept are then lost. One
host read for each cut but the last: how many go depends on the picture.
Departs from the paper: for towers without [CLS] it takes the mean of the patches; this form needs [CLS].
Departs from the released code: each tile is cut as far as it alone asks for, where the code takes the most that any
tile of the batch asks for. On LLaVA-NeXT the code keeps half of the budget in a tile (`tile` says so here) and cuts
again behind two LM layers, by what the last prompt token attends to and by values of the LM, which are not seen here.
Positions are kept by default, as for all methods of winnow; the code numbers them anew.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float

import winnow.contract as wn


@dataclass(frozen=True)
class Flow(wn.VisionAttention):
    """What [CLS] sees of each token in one block times how much its value holds, `[b, N]`; 0 for [CLS]."""

    def read(self, seen: wn.TowerAttention) -> Float[torch.Tensor, "t n"]:
        values = seen.v.to(torch.promote_types(seen.v.dtype, torch.float32))
        alike = (values[:, :, :1] @ values.mT).softmax(-1)[:, :, 0].mean(1)[:, 1:]
        attended = super().read(replace(seen, prefix=1))
        size = values.mean(1).abs().sum(-1)[:, 1:]
        score = (attended / attended.sum(1, keepdim=True) + alike / alike.sum(1, keepdim=True)) * size
        return torch.cat([torch.zeros_like(score[:, :1]), score], 1)[:, seen.prefix :]


@wn.register("flowcut")
class FlowCut(wn.Method):
    """Cut patches in every second vision block, by a running score of what flows to [CLS].

    Args:
        keep: content tokens of the item.
        tile: what each of its tiles keeps in the tower; default: as much as the item.
    """

    keep: wn.Budget = wn.Budget(128)
    tile: wn.Budget | None = None

    released = {"positions": "compact"}

    def steps(self, info: wn.ModelInfo):
        cuts = wn.VisionAttention().block(info)  # the last cut is before the feature block
        if not cuts:
            raise wn.UnsupportedError("its tower has no block before the one that is projected.")
        return *(self._behind(block, cuts - 1 - block) for block in range(cuts)), self._at_the_end(cuts - 1)

    def _behind(self, block: int, left: int) -> wn.Step:
        row, flow = wn.VisionAttention(block), Flow(block)
        return wn.Step(
            wn.Point("blocks", block + 1),
            lambda view, state: self.flow(view, state, view[row], view[flow], left),
            (row, flow),
        )

    def _at_the_end(self, block: int) -> wn.Step:
        flow = Flow(block)

        def run(view: wn.View, state: wn.State) -> wn.Reduction:
            score = state.token["flow"] if "flow" in state.token else view[flow]
            return wn.top_k(score, self.keep.of(view), view)

        return wn.Step(wn.Point("projected"), run, (flow,))

    def flow(
        self, view: wn.View, state: wn.State, row: torch.Tensor, flow: torch.Tensor, left: int
    ) -> tuple[wn.Observe | wn.Reduction, wn.State]:
        """What happens behind a block, `left` blocks before the last that cuts; [CLS] is the first token."""
        score = wn.comparable(flow, view)
        if "flow" in state.token:
            score = wn.comparable((state.token["flow"] + score) / 2)
        state = replace(state, token={**state.token, "flow": score})
        if left % 2:
            return wn.Observe(), state
        n, target = view.n - 1, (self.tile or self.keep).of(view)
        kept = (
            [min(n, target)] * view.b
            if not left
            else [max(min(n, target), n - cut) for cut in _cuts(row, target, left)]
        )
        place = wn.rank_of(score[:, 1:])
        chosen = place < torch.tensor(kept, device=place.device)[:, None]
        chosen = torch.cat([torch.ones_like(chosen[:, :1]), chosen], 1)
        return wn.Reduction.select(chosen, counts=[1 + k for k in kept]), state


def _cuts(row: Float[torch.Tensor, "b n"], target: int, left: int) -> list[int]:
    """How many patches go: the fewer, the more evenly [CLS] attends to them."""
    attended = row[:, 1:].to(torch.promote_types(row.dtype, torch.float32))
    n, share = attended.shape[1], attended / attended.sum(1, keepdim=True)
    evenness = -torch.xlogy(share, share).sum(1) / math.log(n) if n > 1 else share.sum(1)
    cut = max(0, n - target) / left**0.5 * (1 - evenness**2)
    return cut.nan_to_num(0, 0, 0).round().int().tolist()
