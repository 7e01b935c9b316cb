"""Slow-Fast (arXiv 2504.01328): means over frames enter the LM; its text reads all tokens, which stay beside it.

Looks at: the projected tokens. Cost: keys and values of V tokens once, O(V · D · G · d) for each of the layers that
read, and O(V · H · d) for each row of text and each such layer; nothing is quadratic in V.

Fast: the mean of every `stride` frames at each place, in the sequence. Slow: all tokens, never in the sequence. In
every 8th layer (`layers`) each row of text, decoded ones as well, attends with its own rotated query to keys K(norm(V))
and values V(norm(V)) of the slow tokens, without positions and without a causal mask. What it reads is added to what
the heads of the layer give, times tanh(Linear(o)) · tanh(w): o is what they give, and w is 0 before training, so that
the model starts as the one on fast tokens.
Departs from the paper: a model of less than 16 layers reads in four of them, at equal distances.
Frames are not sampled and there is no spatial pooling (both are off there). A picture has one frame, and stays as it
is; so does one of which an earlier method has removed tokens. Keys and values have a norm of their own, in which that
of the layer is a start. The base is frozen: only what reads is trained.
Departs from the released code: a last window that is not full repeats its last frame; the code fills it with zeros
(`pad=zeros`). Keys and values start as those of the layer, where the code reads the two stacked weights in another
order than they were stacked. Positions are kept; the code numbers what enters anew. Keys and values are made once for
a request, where the code makes them for each token.
"""

from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import nn

import winnow.contract as wn
from winnow.parts.cross_attention import GatedHeads, gated, joined, kept_beside
from winnow.parts.frames import frame_slots
from winnow.parts.learned import UNTRAINED
from winnow.parts.windows_of_frames import in_time


@wn.register("slow-fast-video-mllm")
class SlowFast(wn.Method):
    """Means over frames enter the LM, and its text reads all tokens by gated cross-attention in some layers.

    Args:
        stride: frames of a window.
        least: frames that are left of a video at least, if it has as many; fewer would be made that many.
        pad: what fills the last window.
        layers: LM layers in which text reads; default: every 8th from 0 on.
        gate: w of untrained weights; 0: nothing is read.
        weights: a file that `winnow train slow-fast-video-mllm` wrote, or `untrained`; default: those for the video
            reference model.
    """

    stride: Annotated[int, wn.Between(1)] = 4
    least: Annotated[int, wn.Between(1)] = 16
    pad: Literal["repeat", "zeros"] = "repeat"
    layers: tuple[wn.Layer, ...] | None = None
    gate: Annotated[float, wn.Between(-4, 4)] = 0.0
    weights: str | None = None

    identity = {"stride": 1, "gate": 0.0, "weights": UNTRAINED}
    released = {"pad": "zeros", "positions": "compact"}
    across_frames = True

    def resolve(self, info: wn.ModelInfo):
        every = 8 if info.depth >= 16 else max(1, info.depth // 4)
        layers = range(0, info.depth, every) if self.layers is None else map(info.lm_layer, self.layers)
        return self.replace(layers=tuple(layers))

    def build(self, info: wn.ModelInfo):
        def make() -> nn.ModuleDict:
            sizes = info.width, info.heads, info.kv_heads, info.head_dim
            return nn.ModuleDict({str(layer): GatedHeads(*sizes) for layer in self.layers or ()})

        return gated(self.slug, self.weights, self.gate, info, make)

    def steps(self, info: wn.ModelInfo):
        return (wn.Step(wn.Point("projected"), self.split),)

    def cross_reads(self, info: wn.ModelInfo):
        return tuple(wn.CrossRead(k, "text", "heads", partial(self.read, str(k))) for k in self.layers or ())

    def split(self, view: wn.View, state: wn.State) -> tuple[wn.Reduction, wn.State]:
        """Fast tokens, and beside them keys and values of slow ones."""
        beside = kept_beside(view.module, view.tokens, view)
        return self.reduce(view), replace(state, item={**state.item, **beside})

    def read(self, layer: str, rows: wn.Rows) -> Float[torch.Tensor, "n hd"]:
        return rows.module[layer](rows.carried, rows.queries, *joined(rows, layer))

    def reduce(self, view: wn.View) -> wn.Reduction:
        """The fast tokens."""
        frames, slot = frame_slots(view, self.slug)
        order = slot.argsort(1)
        if frames == 1 or self.stride == 1:
            return wn.Reduction.select(torch.arange(view.n, device=order.device).expand(view.b, -1), view.n)
        found = in_time(frames, view.n // frames, self.stride, self.least, self.pad == "zeros", order.device)
        target, weight = (x.expand(view.b, -1) for x in (found.target, found.weight))
        m, anchor = len(found.anchor), order[:, found.anchor]
        return wn.Reduction.edges(order[:, found.source], target, weight, n=view.n, m=m, representative=anchor)
