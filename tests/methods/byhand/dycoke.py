"""Of windows of four frames the first is whole; of the others stays what is least like an earlier frame.

Decoding: layers from one on read few visual slots, which the attention of the layer before chooses.
"""

from __future__ import annotations

from typing import Any

import torch
from byhand import Entry, Hand, Reference, keeping, top
from torch import Tensor

from methods.byhand import frames_of

SETTINGS = {"k": 0.6, "p": 0.0}
BUILDS = ("qwen2_5_vl", "llava_next_video")
ROWS = {
    "qwen2_5_vl": ("3 W 6", "9", "2 X 4 W 5", "4 A 2"),
    "llava_next_video": ("3 W 6", "9", "2 W 4 W 5"),
}
EXTRA = {"llava_next_video": (("3 X 6", "2 X 5"),)}


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, k: float, p: float) -> Hand:
    kept = []
    for picture, content in enumerate(entry.content):
        x, (frames, places) = entry.embeds[0, content].double(), frames_of(sample, entry, picture)
        stay = int((1 - k) * places)
        chosen = []
        for t in range(frames):
            own = torch.arange(t * places, (t + 1) * places)
            like = {0: t, 1: t - 1, 2: t - 2, 3: t - 1}[t % 4]
            if like < t:
                alike = torch.cosine_similarity(x[own], x[own - (t - like) * places], dim=1)
                own = own[top(-alike, stay)]
            chosen.append(own)
        kept.append(torch.cat(chosen))
    return Hand(entry, {0: keeping(entry, kept)})


class ReadingFew(Reference):
    """Decodes with few visual slots.

    Args:
        visual: `[n]` which rows of the prompt are visual.
        first: the first layer that reads few; `similar` and `reuse` are those of the method.

    Attributes:
        read: the visual slots that were read for each token.
    """

    def __init__(self, model: Any, visual: Tensor, first: int, p: float, similar: float, reuse: bool) -> None:
        super().__init__(model)
        self.visual, self.first, self.p, self.similar, self.reuse = visual, first, p, similar, reuse
        self.before: Tensor | None = None
        self.read: list[Tensor] = []

    def _layer(self, layer: Any, hidden: Tensor, positions: Tensor, cache: Any, mask: Any = None) -> Tensor:
        index, n = layer.self_attn.layer_idx, cache.get_seq_length()
        if hidden.shape[1] == 1 and index >= self.first:
            gone = torch.zeros(cache.layers[0].keys.shape[2], dtype=torch.bool)
            gone[: len(self.visual)] = self.visual
            gone[self.read[-1]] = False
            mask = torch.zeros(1, 1, 1, len(gone)).masked_fill(gone, torch.finfo(hidden.dtype).min)
        out = super()._layer(layer, hidden, positions, cache, mask)
        if hidden.shape[1] == 1 and n and index == self.first - 1:
            self._choose(self._attention(layer, hidden, positions, cache.layers[index].keys))
        return out

    def _attention(self, layer: Any, hidden: Tensor, positions: Tensor, keys: Tensor) -> Tensor:
        """`[n]` of this token to all slots, the mean over heads: its query times all keys, head by head."""
        own = layer.self_attn
        query = own.q_proj(layer.input_layernorm(hidden))[0, 0].unflatten(0, (-1, keys.shape[3]))
        # A decoded token has one position; M-RoPE has it on three axes.
        cos, sin = (x.reshape(-1, keys.shape[3])[0] for x in self.lm.rotary_emb(hidden, positions))
        query = query * cos + torch.cat([-query[:, keys.shape[3] // 2 :], query[:, : keys.shape[3] // 2]], 1) * sin
        group = len(query) // keys.shape[1]
        logits = [keys[0, h // group] @ q * own.scaling for h, q in enumerate(query)]
        return torch.stack([one.softmax(0) for one in logits]).mean(0)

    def _choose(self, attention: Tensor) -> None:
        slots = self.visual.nonzero()[:, 0]
        seen = attention[slots]
        alike = -1.0 if self.before is None else float(torch.cosine_similarity(seen, self.before, dim=0))
        if alike < self.similar:
            self.read.append(slots[top(seen, int(len(slots) * (1 - self.p)))])
        else:
            self.read.append(self.read[-1] if self.reuse else slots)
        self.before = seen
