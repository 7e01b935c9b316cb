"""OmniVid (arXiv 2403.17935): a few learned queries read each short clip of a video, and all clips are then joined.

Looks at: the projected tokens, and their frames, rows and columns. Cost: O(V · d · (D + Q · depth)) with Q queries for
each clip and a width of d = 96, then O((C · Q)² · d) for C clips.

Each clip of a few frames is read by the same queries, layer by layer; a transformer over the queries of all clips
follows ("late" fusion), and a matrix to the width of the language model. What a query says is added to the mean of the
tokens that it attends to. A query stands in the place of a token of its
clip, at equal distances. A picture is one clip.
Departs from the paper: the tower and the language model are frozen, so that times are written as text, and a query must
give what the model can read from the first, hence the mean; the vocabulary
of times and boxes is `winnow.parts.time_tokens`, and the connector learns it first, with a small encoder and decoder of
its own (`winnow.learn.grounding`). The queries are of the one kind that reads content: those of sentences and boxes,
and the joint form for tracking, are left out. A query sees those before it, so that the first ones alone are a set too.
Departs from the released code: a clip has 8 queries at most (code: 32), a width of 96, and layers of its own sizes.
"""

from typing import Annotated

import torch
from jaxtyping import Float

import winnow.contract as wn
from winnow.parts.chunks import Chunks, chunks_of
from winnow.parts.clip_queries import ClipQueries
from winnow.parts.evenly import evenly
from winnow.parts.learned import in_fp32, learned

MOST = 8


@wn.register("omnivid")
class OmniVid(wn.Method):
    """Read each clip of a few frames by a few learned queries.

    Args:
        queries: for each clip; no more than it has tokens.
        every: frames of a clip, of those that the tower gives.
        weights: a file that `winnow train omnivid` wrote, or `untrained`; default: those for the video reference model.
    """

    queries: Annotated[int, wn.Between(1, MOST)] = 4
    every: Annotated[int, wn.Between(1)] = 2
    weights: str | None = None

    identity = None
    across_frames = True

    def build(self, info: wn.ModelInfo):
        def make(width: int = 96, queries: int = MOST, depth: int = 2, fusion: int = 1, heads: int = 4) -> ClipQueries:
            return ClipQueries(info.width, width, queries, depth, fusion, heads)

        return learned(self.slug, self.weights, info, make, part="connect")

    def steps(self, info: wn.ModelInfo):
        return (wn.Step(wn.Point("projected"), self.emit),)

    def emit(self, view: wn.View, state: wn.State) -> tuple[wn.Emit, wn.State]:
        chunks = chunks_of(view, self.every, self.slug)
        each = zip(*(x.split(1) for x in (chunks.tokens, chunks.place, chunks.there)), strict=True)
        made = [in_fp32(view.module, *one, self.counts(chunks)) for one in each]
        tokens, weights = (torch.cat(parts) for parts in zip(*made, strict=True))
        return self.laid(view, chunks, tokens, weights), state

    def counts(self, chunks: Chunks) -> list[int]:
        """Queries of each clip."""
        return [min(self.queries, size) for size in chunks.sizes]

    def laid(
        self,
        view: wn.View,
        chunks: Chunks,
        tokens: Float[torch.Tensor, "b m d"],
        weights: Float[torch.Tensor, "b c q s"],
    ) -> wn.Emit:
        """What the queries say, in the order of the places that they take."""
        counts = self.counts(chunks)
        rows = torch.cat([weights[:, c, :k] for c, k in enumerate(counts)], 1)
        of = torch.cat([chunks.at[:, [c]].expand(-1, k, -1) for c, k in enumerate(counts)], 1)
        matrix = rows.new_zeros(*rows.shape[:2], view.n).scatter_add(2, of, rows)
        even = [evenly(n, k, of.device) for n, k in zip(chunks.sizes, counts, strict=True)]
        place, turn = torch.cat([chunks.at[:, c, own] for c, own in enumerate(even)], 1).sort(1)
        came = wn.Reduction.mix(matrix.gather(1, turn[..., None].expand_as(matrix)), representative=place)
        return wn.Emit(tokens.gather(1, turn[..., None].expand_as(tokens)).to(view.tokens.dtype), came)
