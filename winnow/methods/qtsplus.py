"""QTSplus (arXiv 2511.11910): keep as many tokens as the question needs, those it attends to, and re-encode them.

Looks at: the projected tokens and the question's LM input embeddings. Cost: O(L · N · D) for L tokens of the question,
O(n² · D) for n tokens that are re-encoded.

A trained cross-attention layer reads the tokens from the question; a token scores r, the most that any head of any
token of the question attends to it. From the mean question, log N, the largest r and the entropy of r a small network
predicts a share ρ, and the best ⌈ρN⌉ tokens stay in their order (one host read; `keep` makes the count exact). Blocks
of self-attention without causal order then let them see one another: tokens that the language model gets are new.
Departs from the paper: the paper says that re-encoding knows absolute time, and does not say how; here the number of a
token's frame, as sines and cosines, is added to what attends, not to the token.
Departs from the released code: there is no time (`time=false`). One scoring layer, of which only the attention counts,
so that its values and its network are not made; keys have as many heads as queries. Batches are worked out item by
item; the code pads with a token that others then attend to. In training its gate keeps another number of tokens than
was asked for (see `winnow.parts.counted_gate`).
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import winnow.contract as wn
from winnow.parts.finite import finite
from winnow.parts.frames import frame_of
from winnow.parts.learned import in_fp32, learned
from winnow.parts.query_aware import Tokenizer
from winnow.parts.sinusoid import sinusoid


@wn.register("qtsplus")
class QTSplus(wn.Method):
    """Keep the tokens that the question attends to, as many as a trained network predicts, and re-encode them.

    Args:
        keep: content tokens of the item; none: as many as are predicted.
        least, most: between which shares the prediction lies.
        cap: tokens that a prediction never goes beyond.
        reencode: whether what is kept attends to one another.
        time: whether it knows its frames then.
        weights: a file that `winnow train qtsplus` wrote, or `untrained`; default: those for the reference model.
        question: which of its words score.
    """

    keep: wn.Budget | None = None
    least: wn.Share = 0.05
    most: wn.Share = 0.5
    cap: Annotated[int, wn.Between(1)] = 2560
    reencode: bool = True
    time: bool = True
    weights: str | None = None
    question: wn.QuestionTokens = wn.QuestionTokens()

    rounding = "ceil"
    identity = {"keep": "100%", "reencode": False}
    released = {"keep": None, "time": False, "positions": "keep"}
    across_frames = True

    def check(self) -> None:
        if self.least > self.most:
            raise wn.WinnowError(f"qtsplus: least={self.least}, most={self.most}; allowed: least ≤ most.")

    def build(self, info: wn.ModelInfo):
        def make(heads: int = info.heads, hidden: int = 256, blocks: int = 1) -> Tokenizer:
            return Tokenizer(info.width, heads, hidden, blocks)

        return learned(self.slug, self.weights, info, make)

    def steps(self, info: wn.ModelInfo):
        return (wn.Step(wn.Point("projected"), lambda view, state: self.act(view), (self.question,)),)

    def act(self, view: wn.View) -> wn.Reduction | wn.Emit:
        """What is kept, re-encoded or as it is."""
        x, there = finite(view.tokens)
        r = self.scores(view, x, there)
        counts = self.counts(view, r)
        order = wn.ranked(wn.comparable(r.masked_fill(~there, torch.nan), view))
        kept = [order[lane, :n].sort().values for lane, n in enumerate(counts)]
        chosen = wn.Reduction.select(pad_sequence(kept, batch_first=True), view.n, counts=counts)
        return wn.Emit(self.encoded(view, x, kept), provenance=chosen) if self.reencode else chosen

    def scores(self, view: wn.View, x: Float[Tensor, "b n d"], there: Bool[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """How much the question attends to each token, at most; item by item, so that a batch is its items."""
        items = zip(view[self.question].split(1), x.split(1), there.split(1), strict=True)
        return torch.cat([in_fp32(view.module.scorer, *item) for item in items])

    def shares(self, view: wn.View, r: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
        """The share of its tokens that each item needs."""
        items = zip(view[self.question].split(1), r.split(1), strict=True)
        logits = torch.cat([in_fp32(view.module.share, *item) for item in items])
        return self.least + (self.most - self.least) * logits.sigmoid()

    def counts(self, view: wn.View, r: Float[Tensor, "b n"]) -> tuple[int, ...]:
        """How many tokens of each item stay."""
        if self.keep is not None:
            return (self.keep.of(view),) * view.b
        return tuple((self.shares(view, r) * view.n).ceil().clamp(1, min(self.cap, view.n)).long().tolist())

    def encoded(self, view: wn.View, x: Float[Tensor, "b n d"], kept: Sequence[Tensor]) -> Float[Tensor, "b m d"]:
        """What is kept of each item after it has attended to one another, padded with zeros."""
        frame, made = frame_of(view), []
        for lane, index in enumerate(kept):
            time = sinusoid(frame[lane, index], x.shape[2]) * self.time
            made.append(in_fp32(view.module, x[lane, index][None], time[None])[0])
        return pad_sequence(made, batch_first=True).to(view.tokens.dtype)
