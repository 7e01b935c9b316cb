"""HICom (arXiv 2503.16036): pool blocks of a video by how much they match the instruction, and read all by queries.

Looks at: the projected tokens and the question's LM input embeddings. Cost: O(V · D²) for what is learned of tokens.

Local: each block of 4 frames × 3 × 3 tokens (a picture's has one frame) becomes one token, the mean of its values by
weights softmax(q · k); q is the instruction itself (`guide=direct`) or the block's mean, scaled and shifted by it
(`coarse`). Text, keys, values and outputs go through (1 − α) x + α LN(MLP(x)), with α from 0 on. Global: learned
queries, scaled and shifted by the instruction, attend to all tokens, to which their frame, row and column are added as
sines and cosines; their outputs stand behind the local ones. How many tokens are left follows from the shape alone.
Untrained and with `queries=0` this is pooling by similarity to the question, which needs no training.
Departs from the paper: it acts behind the projector, so that values, keys and readouts are as wide as the language
model; the instruction is the mean of the question's LM input embeddings, and similarity is that of projected tokens to
it (`text=lm`). The space of a CLIP that is handed over (`text=clip`) takes the place of both, as it is, in the local
branch. Block means, no trilinear resize, are guided by `coarse`; guidance by cross-attention is left out.
Departs from the released code: see above, and `text=clip`. Where a side is no multiple of a block's, its rule gives
blocks of unequal sizes for some sides; here blocks are spread evenly. There are no newline tokens. A local token has
the position of its block's middle, a global one that of a token in between; with positions=compact they are numbered
anew, as in the code.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

import winnow.contract as wn
from winnow.parts.finite import finite, finite_mean
from winnow.parts.guided_pooling import Connector
from winnow.parts.learned import in_fp32, learned
from winnow.parts.sinusoid import places
from winnow.parts.spacetime import Blocks, blocks_of

QUERIES = 32


@wn.register("hicom")
class HICom(wn.Method):
    """Pool blocks of frames, rows and columns by similarity to the question, and add queries that read everything.

    Args:
        frames, side: of a block, in frames and in tokens.
        queries: global tokens; none: as many as were trained, and 32 untrained ones. The local ones leave them places.
        guide: what asks in a block: the instruction (`direct`), or the block's mean guided by it (`coarse`).
        scale: of cosines in a block; 0: products over the root of the width are taken.
        text: similarity in the language model's embeddings (`lm`), or in the space of a CLIP that was handed over.
        weights: a file that `winnow train hicom` wrote, or `untrained`; default: those for the reference model.
        question: what is the instruction.
        patches, words: what a block is pooled by, for `clip`.
    """

    frames: Annotated[int, wn.Between(1)] = 4
    side: Annotated[int, wn.Between(1)] = 3
    queries: wn.Count | None = None
    guide: Literal["direct", "coarse"] = "direct"
    scale: Annotated[float, wn.Between(0)] = 0.0
    text: Literal["lm", "clip"] = "lm"
    weights: str | None = None
    question: wn.QuestionTokens = wn.QuestionTokens()
    patches: wn.ClipPatches = wn.ClipPatches()
    words: wn.ClipText = wn.ClipText(pool="pieces")

    separators = "drop"
    identity = None
    released = {"text": "clip", "positions": "compact"}
    across_frames = True

    def check(self) -> None:
        if self.text == "clip" and self.guide == "coarse":
            raise wn.WinnowError("hicom: text=clip asks with the instruction itself; allowed: guide=direct.")

    def build(self, info: wn.ModelInfo):
        def make(queries: int = max(QUERIES, self.queries or 0)) -> Connector:
            return Connector(info.width, queries, self.guide == "coarse")

        return learned(self.slug, self.weights, info, make)

    def steps(self, info: wn.ModelInfo):
        needs = (self.question, self.patches, self.words) if self.text == "clip" else (self.question,)
        return (wn.Step(wn.Point("projected"), lambda view, state: self.act(view), needs),)

    def act(self, view: wn.View) -> wn.Emit:
        """Local tokens in the places of their blocks' middles, and global ones in places between them."""
        blocks = blocks_of(view, self.frames, self.side)
        x, there = finite(view.tokens)
        wn.count_broken(~there, view)
        items = [self.item(view, lane, blocks, x[lane], there[lane]) for lane in range(view.b)]
        made, weights = (torch.stack(own) for own in zip(*items, strict=True))
        count = made.shape[1] - len(blocks.middle)
        spread = torch.arange(count, device=x.device) * len(blocks.others) // max(1, count)
        at = torch.cat([blocks.middle, blocks.others[spread]]).expand(view.b, -1)
        came = wn.Reduction.mix(weights, representative=at, ordered=False)
        return wn.Emit(made.to(view.tokens.dtype), provenance=came, separators=self.separators)

    def item(self, view: wn.View, lane: int, blocks: Blocks, x: Float[Tensor, "n d"], there: Tensor):
        """The new tokens of an item, `[m, D]`, and the weights of its tokens in them, `[m, N]`."""
        asked = finite_mean(view[self.question][lane])
        clip = self.text == "clip"
        space = (finite(view[self.patches][lane, None])[0][0], finite_mean(view[self.words][lane])) if clip else ()
        inside = torch.cat([there, there.new_zeros(1)])[blocks.rows]
        keys = [rows_at(part, blocks.rows)[None] for part in space[:1]]
        scale = torch.full((), self.scale, device=x.device)
        pooled, share = in_fp32(
            view.module.local, rows_at(x, blocks.rows)[None], inside[None], scale, *(space[1:] or (asked,)), *keys
        )
        flat = share.new_zeros(len(share[0]), len(x) + 1)
        made, weights = [pooled[0]], [flat.scatter_add(1, blocks.rows, share[0])[:, :-1]]
        most = len(blocks.others) if self.queries is None else min(self.queries, len(blocks.others))
        if most:
            where = places(view.layout, x.shape[1], x.device)[view.ids[lane]]
            read, share = in_fp32(view.module.overall, x[None], where, there[None], asked)
            made, weights = [*made, read[0][:most]], [*weights, share[0][:most]]
        return torch.cat(made), torch.cat(weights)


def rows_at(x: Float[Tensor, "n d"], rows: Int[Tensor, "w s"]) -> Float[Tensor, "w s d"]:
    """Zeros where a row is n."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])[rows]
