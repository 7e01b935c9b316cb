"""Token Transforming (arXiv 2506.05709): a few blocks mix all patches into those that are kept, by their similarity.

Looks at: attention and keys of three vision blocks. Cost: O(M · N · D) in each of them.

Pruning maps one token to one, merging many to one; here many go to many. In a stage, between attention and MLP, the
patches with the most attention from [CLS] (or from all queries) are kept. Each patch divides itself among them by a
softmax of the cosines of keys; an output is the mean of what it is given. Its mass, all that it was given, weighs it in
the attention of later blocks. [CLS] neither gives nor takes.
Departs from the paper: the idea is that of its abstract; matrix, temperature and stages are winnow's. The stages are
those of earlier work on 12 blocks: in the 4th, 7th and 10th, at 70 % of the patches each. The temperature is low,
because keys are alike: far above it shares become so even that outputs are all the same.
Departs from the released code: no code has been released.
"""

from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

import torch

import winnow.contract as wn
from winnow.parts.cosine import unit
from winnow.parts.merge import weights_by_size
from winnow.parts.transform import shares, transform


@wn.register("token-transforming")
class TokenTransforming(wn.Method):
    """Mix all patches into those that are kept, in a few blocks of the vision tower.

    Args:
        ratios: budgets of the stages, all of the patches of a tile.
        blocks: vision blocks in which the stages act, ascending; default: equal parts of the depth.
        tau: temperature of the softmax; towards 0 each patch goes to the most similar.
        anchor: whether a patch that is kept gives nothing away.
        form: `transform` (many to many), `merge` (each patch to the most similar) or `prune`.
        proportional: whether outputs weigh by their mass as keys of later blocks.
    """

    ratios: tuple[wn.Budget, ...] = (wn.Budget(0.7), wn.Budget(0.49), wn.Budget(0.343))
    blocks: tuple[wn.Count, ...] | None = None
    tau: Annotated[float, wn.Between(0.001)] = 0.02
    anchor: bool = True
    form: Literal["transform", "merge", "prune"] = "transform"
    proportional: bool = True

    identity = {"ratios": ("100%", "100%", "100%")}
    pairwise = True

    def check(self) -> None:
        stages, blocks = len(self.ratios), self.blocks
        if blocks is not None and (len(blocks) != stages or list(blocks) != sorted(set(blocks))):
            raise wn.WinnowError(
                f"token-transforming: blocks={blocks!r}; allowed: {stages} ascending blocks, one for each ratio."
            )

    def at_budget(self, budget, content: int):
        """Equal steps down to the budget: at 34.3 % these are the default ones."""
        share, stages = float(wn.Budget.parse(budget).share(content)), len(self.ratios)
        return self.replace(ratios=[f"{100 * share ** ((i + 1) / stages):.8f}%" for i in range(stages)])

    def resolve(self, info: wn.ModelInfo):
        stages, depth = len(self.ratios), wn.VisionKeys().block(info) + 1
        blocks = self.blocks or [depth * (i + 1) // (stages + 1) for i in range(stages)]
        last = dict(zip((wn.VisionKeys(block).block(info) for block in blocks), self.ratios, strict=True))
        return self.replace(ratios=tuple(last.values()), blocks=tuple(last))  # in a very shallow tower stages coincide

    def steps(self, info: wn.ModelInfo):
        return tuple(map(self._step, self.blocks or (), self.ratios))

    def _step(self, block: int, budget: wn.Budget) -> wn.Step:
        looks = wn.VisionAttention(block, query="auto"), wn.VisionKeys(block)
        return wn.Step(wn.Point("blocks", block, "mlp"), partial(self.stage, *looks, budget), looks)

    def reduce(self, view: wn.View) -> wn.Reduction:
        """The map of a first stage; its signals are those of the feature block."""
        looks = wn.VisionAttention(query="auto"), wn.VisionKeys()
        return self.stage(*looks, self.ratios[0], view, wn.State())[0].reduction

    def stage(
        self, row: wn.VisionAttention, keys: wn.VisionKeys, budget: wn.Budget, view: wn.View, state: wn.State
    ) -> tuple[wn.Reduce, wn.State]:
        """Mix into as many patches as the budget says; `state.token` holds the mass of each."""
        prefix = int(view.layout.kind[0] == wn.CLS)
        m = min(view.n, prefix + budget.of(view))
        score = wn.comparable(view[row], view)
        score[:, :prefix] = torch.inf
        kept = wn.ranked(score)[:, :m].sort(1).values
        if m == view.n or self.form == "prune":
            return wn.Reduce(wn.Reduction.select(kept, view.n)), state
        x, broken = unit(view[keys])
        wn.count_broken(broken, view)
        mass = state.token.get("mass", x[0].new_ones(view.b, view.n))
        anchor = self.anchor or self.form == "merge"
        share = shares(x, kept, self.tau, anchor=anchor, first_stays=bool(prefix), broken=broken)
        if self.form == "merge":
            cluster = share.argmax(1)
            weight, total = weights_by_size(cluster, mass, m)
            reduction = wn.Reduction.assign(cluster, weight, m=m, representative=kept)
        else:
            matrix, total = transform(share, mass)
            reduction = wn.Reduction.mix(matrix, representative=kept)
        after = replace(state, token={**state.token, "mass": mass.scatter(1, kept, total)})
        return wn.Reduce(reduction, log_bias=total.log() if self.proportional else None), after
