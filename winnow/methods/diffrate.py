"""DiffRate (arXiv 2305.17997): prune and merge in every block of the vision tower, as many as a learned schedule says.

Looks at: the [CLS] row of every vision block and the tokens themselves. Cost: O(N² / 4 · D) at most in each block.

In each block, between attention and MLP, patches are ranked by attention from [CLS]. The last ones are pruned; of the
others the lower ones go to the most similar of the upper ones, as a plain mean. What a token weighs as a key of later
blocks grows by what is merged into it, times its similarity. A schedule is two lists of counts, the same for all
pictures; without one, every block but the first takes away as many, half by pruning and half by merging: the uniform
schedule, which the learned one is compared with. `winnow train diffrate` learns one for a model.
Departs from the paper: nothing in what a schedule does. In the search for one, merged tokens carry the mask of pruning,
because both start alike; even so, the one that is shipped merges nothing.
Departs from the released code: counts are patches (code: [CLS] too); a block that takes nothing away does not sort; a
weight that unlike tokens bring down to 0 stays above it (code: NaN). It has no language model behind it.
"""

from dataclasses import replace
from functools import partial

import torch

import winnow.contract as wn
from winnow.parts.cosine import product, unit
from winnow.parts.learned import learned
from winnow.parts.learned_budget import Schedule


@wn.register("diffrate")
class DiffRate(wn.Method):
    """Prune and merge patches in every block of the vision tower, by a schedule of counts.

    Args:
        prune: patches of a tile that each block in turn leaves when it has pruned; blocks behind the list keep all.
        merge: those that it leaves when it has merged.
        left: without a schedule, patches of a tile that are left behind the last block.
        proportional: whether tokens weigh by what was merged into them as keys of later blocks.
        weights: a file that `winnow train diffrate` wrote, or `shipped`: the learned schedule for the reference model.
    """

    prune: tuple[wn.Budget, ...] | None = None
    merge: tuple[wn.Budget, ...] | None = None
    left: wn.Budget = wn.Budget(0.35)
    proportional: bool = True
    weights: str | None = None

    identity = {"prune": None, "merge": None, "left": "100%", "weights": None}
    released = {"proportional": True, "positions": "keep"}

    def check(self) -> None:
        if (None in (self.prune, self.merge)) != (self.prune is self.merge):
            raise wn.WinnowError("diffrate: one of prune and merge; allowed: both, or neither.")
        if len(self.prune or ()) != len(self.merge or ()):
            raise wn.WinnowError(f"diffrate: prune={self.prune!r}, merge={self.merge!r}; allowed: lists of one length.")

    def at_budget(self, budget, content: int):
        """The uniform schedule down to the budget; as a share, because tiles do not know of each other."""
        share = float(100 * wn.Budget.parse(budget).share(content))
        return self.replace(left=f"{share:.8f}%", prune=None, merge=None, weights=None)

    def resolve(self, info: wn.ModelInfo):
        """A learned schedule becomes plain counts."""
        if self.weights is None:
            return self
        make = partial(Schedule, patches=256, blocks=wn.VisionAttention().block(info) + 1)
        module = learned(self.slug, None if self.weights == "shipped" else self.weights, info, make)
        prune, merge = module.counts()  # type: ignore[operator]
        return self.replace(prune=prune, merge=merge, weights=None)

    def steps(self, info: wn.ModelInfo):
        rows = [wn.VisionAttention(block) for block in range(wn.VisionAttention().block(info) + 1)]
        at = [wn.Point("blocks", block, "mlp") for block in range(len(rows))]
        return tuple(wn.Step(at[i], partial(self._step, row, i, len(rows)), (row,)) for i, row in enumerate(rows))

    def counts(self, view: wn.View, block: int, blocks: int) -> tuple[int, int]:
        """Patches that a block leaves when it has pruned, and when it has merged."""
        now, start = view.n - 1, view.n_visual
        if self.prune is not None and self.merge is not None:
            given = [(self.prune[block].of(view), self.merge[block].of(view))] if block < len(self.prune) else []
            pruned, merged = given[0] if given else (now, now)
        else:
            # The first block takes nothing, unless it is the only one.
            gone = (start - self.left.of(view)) * (block if blocks > 1 else 1) // max(1, blocks - 1)
            merged = start - gone
            pruned = (min(now, start) + merged + 1) // 2
        pruned = min(now, pruned)
        return pruned, min(pruned, merged)

    def reduce(self, view: wn.View) -> wn.Reduction:
        """The map of a first block, or of an only one where there is no schedule."""
        return self.act(view, wn.State(), wn.VisionAttention(), *self.counts(view, 0, 1))[0].reduction

    def _step(self, row: wn.VisionAttention, block: int, blocks: int, view: wn.View, state: wn.State):
        return self.act(view, state, row, *self.counts(view, block, blocks))

    def act(
        self, view: wn.View, state: wn.State, row: wn.VisionAttention, pruned: int, merged: int
    ) -> tuple[wn.Reduce, wn.State]:
        """Leave so many patches; `state.token` holds what each token weighs."""
        x, broken = unit(view.tokens)
        wn.count_broken(broken, view)
        score = wn.comparable(view[row], view).masked_fill_(broken, -torch.inf)
        score[:, 0] = torch.inf
        if merged == view.n - 1:
            everything = torch.arange(view.n, device=view.tokens.device).expand(view.b, -1)
            return wn.Reduce(wn.Reduction.select(everything, view.n)), state
        kept, gone = wn.ranked(score)[:, : 1 + pruned].split([1 + merged, pruned - merged], dim=1)
        likeness = product([a[i] for a, i in zip(x, gone, strict=True)], [a[i] for a, i in zip(x, kept, strict=True)])
        likeness.masked_fill_(broken.gather(1, kept)[:, None], -1)[..., 0] = -torch.inf  # nothing goes into [CLS]
        best, target = likeness.max(-1)
        cluster = torch.full((view.b, view.n), -1, device=kept.device)
        cluster.scatter_(1, kept, torch.arange(1 + merged, device=kept.device).expand_as(kept)).scatter_(
            1, gone, target
        )
        members = torch.ones_like(score[:, : 1 + merged]).scatter_add_(1, target, torch.ones_like(best))
        weight = 1 / members.gather(1, cluster.clamp_min(0))
        reduction = wn.Reduction.assign(cluster, weight, m=1 + merged, representative=kept, ordered=False)
        size = state.token.get("size", torch.ones_like(score))
        total = size.gather(1, kept).scatter_add_(1, target, (size.gather(1, gone) * best))
        total = total.clamp_min(torch.finfo(total.dtype).tiny)
        after = replace(state, token={**state.token, "size": size.scatter(1, kept, total)})
        return wn.Reduce(reduction, log_bias=total.log() if self.proportional else None), after
