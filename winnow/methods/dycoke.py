"""DyCoke (arXiv 2411.15024): of repeated frames keep what changed, and decode with the visual slots that matter now.

Looks at: the projected tokens; for each decoded token, its attention in one LM layer. Cost: O(V · D), once; then one
row of attention and a copy of the slots that are read, for each token. How many slots are visual is a host read.

Frames come in windows of four. The first is whole. Of the second and the third those tokens stay that have the lowest
cosine to their place in the first one, of the fourth those with the lowest to the third: 1 − k of each. While decoding,
the attention of the layer before `layer`, over heads and visual slots, is compared with that of the token before. Where
their cosine is below `similar`, the share 1 − p with the most attention is chosen anew. Layers from `layer` on read
these and all text. Nothing is dropped: what is not read now can be read for the next token.
Departs from the paper: "merging" drops tokens there as well.
Departs from the released code: it leaves the third frame of the last window whole, loses the last of an odd number of
frames (`tail=released`), and fails on fewer than five. It lists the tokens of a cut frame by similarity (`order=rank`),
and reads all slots where the cosine is not below `similar` (`reuse=false`); here what was chosen before is read then.
It takes the last visual token and the newline for text. Positions are kept by default, as for all methods of winnow;
the code numbers them anew.
"""

from typing import Annotated, Literal

import torch
from torch.nn.functional import cosine_similarity, normalize

import winnow.contract as wn
from winnow.parts.frames import frame_grid, whole_clip

VISUAL = (1, 2)  # kinds of slots: image, video


@wn.register("dycoke")
class DyCoke(wn.Method):
    """Of repeated frames keep what changed, and decode with the visual slots that matter now.

    Args:
        k: share of a cut frame that goes.
        p: share of the visual slots that are not read while decoding; 0: all are read.
        layer: the first LM layer that reads few slots; the one before says which.
        similar: cosine of two tokens' attention from which on the choice of the earlier one stays.
        reuse: whether a choice that stays is read, or all slots are.
        order: of the tokens of a cut frame: `raster`, or by `rank`, the least similar first.
        tail: whether the last window is cut like others, or as the released code does.
    """

    k: wn.Share = 0.7
    p: wn.Share = 0.7
    layer: Annotated[int, wn.Between(1)] = 3
    similar: Annotated[float, wn.Between(-1, 2)] = 0.9
    reuse: bool = True
    order: Literal["raster", "rank"] = "raster"
    tail: Literal["cut", "released"] = "cut"

    identity = {"k": 0.0, "p": 0.0}
    released = {"reuse": False, "order": "rank", "tail": "released", "positions": "compact"}
    across_frames = True

    def steps(self, info: wn.ModelInfo):
        steps = [wn.Step(wn.Point("projected"), self._one_step)]
        if self.p and "kv" in info.points:
            info.lm_layer(self.layer)
            steps.append(wn.KVStep(wn.Point("kv", self.layer - 1), self.decode, when=("decode",), kinds=True))
        return tuple(steps)

    def reduce(self, view: wn.View) -> wn.Reduction:
        frames = frame_grid(view.layout, view.ids.device).frames
        pairs = self.pairs(frames)
        if not pairs:
            return wn.Reduction.select(torch.arange(view.n, device=view.ids.device).expand(view.b, -1), view.n)
        clip = whole_clip(view, "dycoke")
        places = clip.tokens.shape[2]
        x = clip.tokens.to(torch.promote_types(clip.tokens.dtype, torch.float32))
        broken = ~x.sum(-1).isfinite()
        wn.count_broken(broken, view)
        cut, like = list(pairs), list(pairs.values())
        # The code takes the lengths off twice where neighbours are compared: its roundings decide among near equals.
        a, b, near = x[:, cut], x[:, like], frames // 2
        first, second = (normalize(part[:, :near], dim=-1) for part in (a, b))
        third = cosine_similarity(a[:, near:], b[:, near:], dim=-1)
        alike = torch.cat([cosine_similarity(first, second, dim=-1), third], 1)
        stay = (-alike.masked_fill(broken[:, like], -2)).masked_fill(broken[:, cut], -torch.inf)
        best = stay.sort(dim=-1, descending=True, stable=True).indices[..., : int((1 - self.k) * places)]
        whole = torch.arange(places, device=best.device).expand(view.b, -1)
        last = frames - frames % 2 if self.tail == "released" else frames
        parts = [(best[:, cut.index(t)] if t in pairs else whole) + t * places for t in range(last)]
        chosen = clip.slot.argsort(1).gather(1, torch.cat(parts, 1))
        if self.order == "rank":
            return wn.Reduction.select(chosen, view.n, ordered=False)
        return wn.Reduction.select(chosen.sort(1).values, view.n)

    def pairs(self, frames: int) -> dict[int, int]:
        """For each frame that is cut, the one that it is compared with."""
        third = range(2, frames - 2 if self.tail == "released" else frames, 4)
        return {t: t - 1 for t in range(1, frames, 2)} | {t: t - 2 for t in third}

    def decode(self, view: wn.KVView, state: wn.State):
        """For a decoded token: what later layers read."""
        visual = (view.kinds[:, 0] == VISUAL[0]) | (view.kinds[:, 0] == VISUAL[1])  # type: ignore[index]
        count = int(visual[0].sum())
        if not count:
            return wn.Observe(), state
        seen = view.attention(1).mean(1)[:, 0].masked_fill(~visual, 0)
        best = wn.rank_of(wn.comparable(seen).masked_fill(~visual, -torch.inf)) < int(count * (1 - self.p))
        kept = best & visual
        if "seen" in state.token:
            stays = cosine_similarity(seen, state.token["seen"][:, 0], dim=1)[:, None] >= self.similar
            kept = torch.where(stays, state.token["kept"][:, 0] if self.reuse else visual, kept)
        remembered = {name: x[:, None].expand(-1, view.heads, -1) for name, x in (("seen", seen), ("kept", kept))}
        return wn.Attend(wn.Reduction.select(kept | ~visual)), wn.State(remembered)
