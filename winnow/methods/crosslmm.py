"""CrossLMM (arXiv 2505.17020): pooled frames enter the LM; they and the text read all tokens, which stay beside it.

Looks at: the projected tokens. Cost: keys and values of V tokens once for each kind of row and each layer that reads;
O(V / T · H · d) for each pooled row and O(V · H · d) for each row of text in such a layer.

Each frame is pooled to `grid` × `grid` tokens. In every 4th layer, behind its attention, rows read the full tokens X:
h += tanh(g) · Out(Attn(Q norm(h), K (norm(X) + e), V norm(X))), where e says the frame, row and column of a token by
sines and cosines. Pooled rows read their own frame (`scope`), rows of text all frames, decoded ones as well; nothing is
causal. Both kinds have weights and a gate of their own; gates are 0 before training, so that the model starts as the
pooled one.
Departs from the paper: it was not at hand; what is not in its abstract and in public reviews of it is a choice of ours:
the layers, `scope`, the embedding, separate gates (`shared_gate`), the output projection, a mean over windows of nearly
equal size as pooling, and that only what reads is trained, on a frozen model. A picture in tiles, and one of which an
earlier method has removed tokens, is not pooled.
Departs from the released code: no code has been released.
"""

from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

import winnow.contract as wn
from winnow.parts.cross_attention import GatedStates, gated, joined, kept_beside, placed
from winnow.parts.frames import frame_grid, frame_sides, frame_slots
from winnow.parts.learned import UNTRAINED
from winnow.parts.windows_of_frames import squares


@wn.register("crosslmm")
class CrossLMM(wn.Method):
    """Pooled frames enter the LM, and pooled and text rows read all tokens by gated cross-attention in some layers.

    Args:
        grid: tokens along a side of a pooled frame; none: frames are not pooled.
        queries: which rows read.
        scope: what pooled rows read: their own frame, or all.
        shared_gate: whether pooled rows take the gate of the text.
        layers: LM layers in which rows read; default: every 4th from 0 on.
        gate: gates of untrained weights; 0: nothing is read.
        weights: a file that `winnow train crosslmm` wrote, or `untrained`; default: those for the video reference
            model, which were trained with `grid=1`.
    """

    grid: Annotated[int, wn.Between(1)] | None = 3
    queries: Literal["both", "text", "visual"] = "both"
    scope: Literal["frame", "all"] = "frame"
    shared_gate: bool = False
    layers: tuple[wn.Layer, ...] | None = None
    gate: Annotated[float, wn.Between(-4, 4)] = 0.0
    weights: str | None = None

    identity = {"grid": None, "gate": 0.0, "weights": UNTRAINED}
    across_frames = True

    def resolve(self, info: wn.ModelInfo):
        layers = range(0, info.depth, 4) if self.layers is None else map(info.lm_layer, self.layers)
        return self.replace(layers=tuple(layers))

    def build(self, info: wn.ModelInfo):
        def make() -> nn.ModuleDict:
            sizes = info.width, info.heads, info.kv_heads, info.head_dim
            names = [f"{kind}{layer}" for layer in self.layers or () for kind in ("text", "visual")]
            return nn.ModuleDict({name: GatedStates(*sizes) for name in names})

        return gated(self.slug, self.weights, self.gate, info, make)

    def kinds(self) -> tuple[Literal["text", "visual"], ...]:
        """The rows that read."""
        return ("text", "visual") if self.queries == "both" else (self.queries,)

    def steps(self, info: wn.ModelInfo):
        return (wn.Step(wn.Point("projected"), self.split),)

    def cross_reads(self, info: wn.ModelInfo):
        at = [(k, kind) for k in self.layers or () for kind in self.kinds()]
        return tuple(wn.CrossRead(k, kind, "residual", partial(self.read, kind, k)) for k, kind in at)

    def split(self, view: wn.View, state: wn.State) -> tuple[wn.Reduction, wn.State]:
        """Pooled tokens, and beside them keys and values of all, frame by frame."""
        order = frame_slots(view, self.slug)[1].argsort(1)[..., None]
        x = view.tokens.gather(1, order.expand_as(view.tokens))
        place = placed(view).gather(1, order.expand_as(view.tokens))
        readers = {name: own for name, own in (view.module or {}).items() if name.startswith(self.kinds())}
        pooled = self.reduce(view)
        entered = torch.ones(view.b, pooled.m, dtype=torch.bool, device=x.device)
        item = {**state.item, **kept_beside(readers, x, view, place), "entered": entered}
        return pooled, replace(state, item=item)

    def read(self, kind: str, layer: int, rows: wn.Rows) -> Float[Tensor, "n w"]:
        name, h = f"{kind}{layer}", rows.carried
        reader, gate = rows.module[name], rows.module[f"text{layer}"].gate if self.shared_gate else None
        k, v, seen = joined(rows, name)
        if kind == "text" or self.scope == "all":
            return reader(h, k, v, seen, gate)
        grid = frame_grid(rows.layout, k.device)
        if len(h) == rows.memory[0]["entered"].shape[0]:  # as many rows of each frame
            k, v, seen = (x.unflatten(1, (grid.frames, -1)).transpose(0, 1) for x in (k, v, seen))
            return reader(h.unflatten(0, (grid.frames, -1)), k, v, seen, gate).flatten(0, 1)
        own = torch.div(grid.slot[rows.ids], grid.places, rounding_mode="floor")
        theirs = torch.arange(seen.shape[1], device=k.device) * grid.frames // seen.shape[1]
        return reader(h, k, v, seen & (own[:, None] == theirs), gate)

    def reduce(self, view: wn.View) -> wn.Reduction:
        """The pooled tokens."""
        (frames, slot), sides = frame_slots(view, self.slug), frame_sides(view.layout)
        order = slot.argsort(1)
        if self.grid is None or (frames == 1 and (sides is None or view.n < view.layout.n_content)):  # as it is
            return wn.Reduction.select(torch.arange(view.n, device=order.device).expand(view.b, -1), view.n)
        if sides is None:
            raise wn.WinnowError(f"{self.slug} pools frames that fill one grid of rows and columns; use grid=none.")
        found = squares(frames, *sides, self.grid, order.device)
        target, weight = (x.expand(view.b, -1) for x in (found.target, found.weight))
        m, anchor = len(found.anchor), order[:, found.anchor]
        return wn.Reduction.edges(order[:, found.source], target, weight, n=view.n, m=m, representative=anchor)
