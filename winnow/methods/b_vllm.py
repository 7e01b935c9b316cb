"""B-VLLM (arXiv 2412.09919): choose frames by the question, join those chosen twice, and read each by a few queries.

Looks at: the projected tokens, and the tokens of the question. Cost: O(V · D · d + T · d²), d being the width of the
Q-Formers. How many frames are left depends on the data: one host read.

A Q-Former over the means of frames and the question gives rows; the softmax of a row's product with these means are
shares of the frames. Rows whose shares are alike (cosine, scaled to 0 … 1, above `threshold`) are one, their mean. A
second Q-Former reads each mixture of frames by a few queries, and ToMe merges what they find until all frames together
have at most `cap` tokens. They stand in the order of the frames that weigh most, from the first places of these.
Departs from the paper: the model stays frozen; small Q-Formers read its own embeddings of the question, and projected
tokens with the sines of row and column. The mean of a frame is its [CLS]. In training the seconds of the evidence teach
the shares; noise is in training alone. There are no more rows than frames, and no more tokens than places.
Departs from the released code: a duplicate of a duplicate joins the first of them; in the code it is lost
(`chains=lose`). Rows stay in the order of time; in the code in that of the queries (`order=queries`). Its positions are
contiguous (`positions=compact`), and it draws noise when it answers, which is never done here.
"""

from dataclasses import replace
from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

import winnow.contract as wn
from winnow.parts.balanced import (
    Balanced,
    duplicates_of,
    frames_apart,
    means_of_duplicates,
    merged_to,
    tokens_of_each,
)
from winnow.parts.cubes import sincos
from winnow.parts.evenly import evenly
from winnow.parts.frame_parts import rows_and_columns
from winnow.parts.frames import frame_slots
from winnow.parts.learned import in_fp32, learned


@wn.register("b-vllm")
class BVLLM(wn.Method):
    """Choose frames by the question, join those that are chosen twice, and read each by a few queries.

    Args:
        cap: tokens of the item at most; of each frame there is at least one.
        frames: rows that choose frames; of trained weights as many as they were trained with.
        queries: tokens of a frame before merging, likewise.
        threshold: likeness of two rows, from 0 to 1, above which they are one; at 1 none are.
        chains: of duplicates: they join the first of them, or are lost.
        order: of the frames.
        question: what the question is read from.
        weights: a file that `winnow train b-vllm` wrote, or `untrained`; default: those for the video model.
    """

    cap: Annotated[int, wn.Between(1)] = 576
    frames: Annotated[int, wn.Between(1)] = 16
    queries: Annotated[int, wn.Between(1)] = 32
    threshold: wn.Share = 0.75
    chains: Literal["join", "lose"] = "join"
    order: Literal["time", "queries"] = "time"
    question: wn.QuestionTokens = wn.QuestionTokens()
    weights: str | None = None

    across_frames = True
    identity = None
    released = {"chains": "lose", "order": "queries", "positions": "compact"}

    def build(self, info: wn.ModelInfo):
        def make(
            frames: int = self.frames, queries: int = self.queries, dim: int = 96, heads: int = 4, depth: int = 2
        ) -> Balanced:
            return Balanced(info.width, frames, queries, dim, heads, depth)

        return learned(self.slug, self.weights, info, make)

    def steps(self, info: wn.ModelInfo):
        return (wn.Step(wn.Point("projected"), lambda view, state: self.read(view), (self.question,)),)

    def read(self, view: wn.View) -> wn.Emit:
        """The tokens of the chosen frames."""
        t, slot = frame_slots(view, self.slug)
        order, wide = slot.argsort(1), torch.promote_types(view.tokens.dtype, torch.float32)
        broken = ~view.tokens.to(wide).sum(-1).isfinite()
        wn.count_broken(broken, view)
        x = view.tokens.to(wide).masked_fill(broken[..., None], 0)
        place = sincos(pad(rows_and_columns(view, order, view.n // t), (1, 0)), x.shape[2])
        lanes = zip(x, order, view[self.question].to(wide).nan_to_num(0, 0, 0), place, strict=True)
        made = [
            self.item(own[at].unflatten(0, (t, -1)), text, at, where, view.module) for own, at, text, where in lanes
        ]
        counts = tuple(len(tokens) for tokens, _, _ in made)
        tokens, share, at = (pad_sequence([*part], batch_first=True) for part in zip(*made, strict=True))
        found = wn.Reduction.mix(share, representative=at, ordered=self.order == "time")
        found = replace(found, counts=counts if len(set(counts)) > 1 else None)
        return wn.Emit(tokens.to(view.tokens.dtype), provenance=found)

    def item(
        self, x: Float[Tensor, "t p d"], text: Tensor, order: Int[Tensor, " n"], place: Tensor, module: Balanced
    ) -> tuple[Float[Tensor, "k d"], Float[Tensor, "k n"], Int[Tensor, " k"]]:
        """Of one video the tokens, the share of each token of the video in each, and the place of each."""
        (t, p, _), text = x.shape, text[None]
        rows = in_fp32(module.chooser, x.mean(1)[None], text)[0]
        rows = means_of_duplicates(rows, *duplicates_of(rows, self.threshold, self.chains == "join"))
        frames = rows.argmax(1).tolist()
        if self.order == "time":
            by = sorted(range(len(frames)), key=frames.__getitem__)
            rows, frames = rows[by], [frames[i] for i in by]
        rank = sorted(range(len(frames)), key=frames.__getitem__)
        apart = dict(zip(rank, frames_apart([frames[i] for i in rank], t), strict=True))
        mixed = torch.einsum("kt,tpd->kpd", rows, x)
        found, seen = in_fp32(module.reader, mixed, text.expand(len(rows), -1, -1), place.expand_as(mixed))
        count = tokens_of_each(self.cap, len(rows), found.shape[1], p)
        found, share = merged_to(found, count)
        share = torch.einsum("kt,kqp->kqtp", rows, share @ seen).flatten(2).flatten(0, 1)
        first = torch.tensor([apart[i] * p for i in range(len(rows))], device=x.device)
        at = order[(first[:, None] + evenly(p, count, x.device)).flatten()]
        return in_fp32(module.out, found).flatten(0, 1), share[:, order.argsort()], at
