"""The reference that the engine is compared with: one sample at a time, unpadded, layer by layer, with its own cache.

Nothing here imports winnow. Attentions come from an eager copy of the model or from a matrix product written out.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import zoo
from quick import copied
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_window_index


@dataclass(frozen=True)
class Entry:
    """One sample as it enters the LM.

    Attributes:
        embeds: `[1, n, D]` rows.
        held: `[n]` the logical position of each row.
        positions: `[1, S]` or `[3, 1, S]` position ids of the whole prompt.
        items: for each picture, the logical positions of its tokens (separators included).
        content: for each picture, the logical positions of its content tokens.
        cells: for each picture, the tower's output token behind each content token.
    """

    embeds: Tensor
    held: Tensor
    positions: Tensor
    items: tuple[Tensor, ...]
    content: tuple[Tensor, ...]
    cells: tuple[Tensor, ...]


@dataclass(frozen=True)
class Seen:
    """What entered one LM layer in prefill: rows `[1, n, D]`, and the logical position of each."""

    hidden: Tensor
    held: Tensor


@dataclass
class Trace:
    """What a run gave.

    Attributes:
        logits: `[T, vocabulary]` after the last prompt token and after each forced one.
        layers: what each layer read in prefill.
        hidden: `[1, n, D]` the prompt's rows after the last layer and the final norm.
        cache: its own.
    """

    logits: Tensor
    layers: list[Seen]
    hidden: Tensor
    cache: DynamicCache

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each layer read."""
        return tuple(len(seen.held) for seen in self.layers)

    def kept(self, entry: Entry) -> list[Tensor]:
        """For each picture, the content ids that the last layer still read."""
        return [torch.isin(content, self.layers[-1].held).nonzero()[:, 0] for content in entry.content]


Cut = Callable[[Sequence[Seen]], Seen]
"""What a layer is to read, from what each layer before it read and (last) what would enter it."""

Choice = Callable[[int, Tensor, Sequence[Seen]], Tensor]
"""For a picture's number, the rows where its content stands, and what was seen: the rows that stay."""


def cut(entry: Entry, choose: Choice, *, separators: bool = True) -> Cut:
    """The cut that keeps the content rows that are chosen, and everything else; newlines go with the last content."""

    def apply(seen: Sequence[Seen]) -> Seen:
        now = seen[-1]
        stay = torch.ones(len(now.held), dtype=torch.bool)
        for number, (item, content) in enumerate(zip(entry.items, entry.content, strict=True)):
            rows = torch.isin(now.held, content).nonzero()[:, 0]
            if not len(rows):
                continue
            chosen = choose(number, rows, seen)
            if not separators or not len(chosen):
                stay[torch.isin(now.held, item)] = False
            stay[rows] = False
            stay[chosen] = True
        return Seen(now.hidden[:, stay], now.held[stay])

    return apply


@dataclass(frozen=True)
class Read:
    """What rows read beside the sequence in one layer: `[n, W]` that is added to what they carry, for one sample.

    Attributes:
        heads: of what the heads give `[n, H · d]`, the rows' queries `[H, n, d]`, and their logical positions (None of
            a decoded token).
        states: of the states behind the attention `[n, D]`, and these positions.
    """

    heads: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None
    states: Callable[[Tensor, Tensor | None], Tensor] | None = None


@dataclass(frozen=True)
class Hand:
    """A method worked out for one sample: what enters the LM, and what is cut before and read in which layer."""

    entry: Entry
    cuts: dict[int, Cut] = field(default_factory=dict)
    reads: dict[int, Read] = field(default_factory=dict)


def keeping(entry: Entry, kept: Sequence[Tensor]) -> Cut:
    """The cut at the LM's door that leaves these content ids of each picture."""
    return cut(entry, lambda number, rows, seen: rows[kept[number]])


def share(keep: int | str, n: int, rounding: str = "up") -> int:
    """Tokens of a budget: a number, or a percentage of n, halves `up`, to `even`, or rounded `down`; from 1 to n."""
    if isinstance(keep, str):
        exact = float(keep.rstrip("%")) * n / 100
        keep = {"up": int(exact + 0.5 + 1e-9), "even": round(exact), "down": int(exact + 1e-9)}[rounding]
    return max(1, min(n, keep))


def top(scores: Tensor, count: int) -> Tensor:
    """`[N]` → the indices of the largest, ascending; the first among equals. With lists, to be plainly right."""
    values = scores.tolist()
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return torch.tensor(sorted(ranked[:count]), dtype=torch.int64)


@dataclass(frozen=True)
class Vision:
    """What the tower did with the pictures of one sample, for each block and picture; `[H, cells]`, without [CLS].

    Attributes:
        received: mean over the queries of the attention window of the attention that each cell receives.
        cls: attention from [CLS]; empty where there is none.
        keys: `[cells (+ 1 for [CLS], first), head width]`, mean over heads; towers of CLIP and SigLIP only.
        features: for each picture `[tiles, N, C]` what the projector is given, [CLS] included.
    """

    received: list[list[Tensor]]
    cls: list[list[Tensor]]
    keys: list[list[Tensor]]
    features: list[Tensor]


class Reference:
    """A plain copy of a model, and an eager one; neither is ever touched by what is tested."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = copied(model)
        self.lm = self.model.model.language_model
        self.mrope = hasattr(self.model.model, "rope_deltas")
        vision = getattr(model.config, "vision_config", None)  # a model that hears has none
        self.tile = getattr(vision, "image_size", 0)  # pixels along a side of a tile; grids have no tiles
        self.cells = (self.tile // getattr(vision, "patch_size", 1)) ** 2

    @functools.cached_property
    def eager(self) -> Any:
        model: Any = copied(self.model)
        model.set_attn_implementation("eager")
        return model

    @torch.no_grad()
    def entry(self, sample: dict[str, Tensor]) -> Entry:
        """What enters the LM for one sample, read at its door."""
        box: dict[str, Tensor] = {}
        hook = self.lm.register_forward_pre_hook(lambda m, a, k: box.update(k), with_kwargs=True)
        self.model.model(**sample, use_cache=False)
        hook.remove()
        embeds = box["inputs_embeds"]
        positions = box.get("position_ids")
        if positions is None:
            positions = torch.arange(embeds.shape[1])[None]
            positions = positions.expand(3, 1, -1) if self.mrope else positions
        items = _runs(sample["input_ids"][0])
        orders = [self._order(sample, i, len(item)) for i, item in enumerate(items)]
        return Entry(
            embeds,
            torch.arange(embeds.shape[1]),
            positions,
            items,
            tuple(item[order >= 0] for item, order in zip(items, orders, strict=True)),
            tuple(order[order >= 0] for order in orders),
        )

    def _order(self, sample: dict[str, Tensor], picture: int, length: int) -> Tensor:
        """The tower's output token behind each token of a picture; −1 for newlines. The model packs an index map."""
        if "image_sizes" not in sample:
            return torch.arange(length)
        size = sample["image_sizes"][picture : picture + 1]
        cells = torch.arange(self._tiles(size[0]) * self.cells, dtype=torch.float64).reshape(-1, self.cells, 1)
        newline = torch.tensor([-1.0], dtype=torch.float64)
        (packed,), _ = self.model.model.pack_image_features([cells], size, "default", image_newline=newline)
        return packed[:, 0].long()

    def _tiles(self, size: Tensor) -> int:
        """Tiles of a picture of this height and width, the thumbnail included."""
        height, width = size.tolist()
        return 1 + -(-height // self.tile) * -(-width // self.tile)

    @torch.no_grad()
    def run(
        self,
        entry: Entry,
        forced: Sequence[int] = (),
        cuts: dict[int, Cut] | None = None,
        compact: bool = False,
        reads: dict[int, Read] | None = None,
    ) -> Trace:
        """Prefill and one step for each forced token.

        Args:
            cuts: for a layer, what it and all later ones read.
            compact: a layer numbers its rows 0 … n − 1 and goes on from there; else rows keep their true positions.
            reads: for a layer, what its rows read beside the sequence.
        """
        reads = reads or {}
        seen: list[Seen] = []
        cache = DynamicCache(config=self.lm.config)
        hidden, held = entry.embeds, entry.held
        for i, layer in enumerate(self.lm.layers):
            if cuts and i in cuts:
                chosen = cuts[i]([*seen, Seen(hidden, held)])
                hidden, held = chosen.hidden, chosen.held
            seen.append(Seen(hidden, held))
            at = self._at(entry, held, compact)
            if i in reads:
                hidden = self._reading(layer, hidden, at, cache, reads[i], held)
            else:
                hidden = self._layer(layer, hidden, at, cache)
        prompt = self.lm.norm(hidden)
        logits = [self.model.lm_head(prompt[:, -1])]
        for step, token in enumerate(forced):
            hidden = self.model.get_input_embeddings()(torch.tensor([[token]]))
            for i, (layer, was) in enumerate(zip(self.lm.layers, seen, strict=True)):
                start = len(was.held) if compact else int(entry.positions[..., -1].max()) + 1
                at = self._numbered(torch.tensor([start + step]))
                if i in reads:
                    hidden = self._reading(layer, hidden, at, cache, reads[i], None)
                else:
                    hidden = self._layer(layer, hidden, at, cache)
            logits.append(self.model.lm_head(self.lm.norm(hidden)[:, -1]))
        return Trace(torch.cat(logits), seen, prompt, cache)

    def _layer(
        self, layer: nn.Module, hidden: Tensor, positions: Tensor, cache: DynamicCache, mask: Tensor | None = None
    ) -> Tensor:
        rope = self.lm.rotary_emb(hidden, positions)
        held = {_cache_keyword(layer): cache}
        return layer(hidden, attention_mask=mask, position_embeddings=rope, use_cache=True, **held)

    def _reading(
        self, layer: Any, hidden: Tensor, positions: Tensor, cache: DynamicCache, read: Read, held: Tensor | None
    ) -> Tensor:
        """A layer written out by its parts, with what its rows read beside the sequence."""
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        cos, sin = self.lm.rotary_emb(hidden, positions)
        q = attention.q_proj(normed).unflatten(-1, (-1, attention.head_dim))[0].transpose(0, 1)
        half = q.shape[-1] // 2
        q = q * cos[0] + torch.cat([-q[..., half:], q[..., :half]], -1) * sin[0]

        def more(module: nn.Module, args: tuple) -> tuple:
            return (args[0] if read.heads is None else args[0] + read.heads(args[0][0], q, held),)

        hook = attention.o_proj.register_forward_pre_hook(more)
        of_cache = {_cache_keyword(attention): cache}
        out = attention(hidden_states=normed, attention_mask=None, position_embeddings=(cos, sin), **of_cache)[0]
        hook.remove()
        hidden = hidden + out
        if read.states is not None:
            hidden = hidden + read.states(hidden[0], held)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def _at(self, entry: Entry, held: Tensor, compact: bool) -> Tensor:
        return self._numbered(torch.arange(len(held))) if compact else entry.positions[..., held]

    def _numbered(self, numbers: Tensor) -> Tensor:
        return numbers.expand(3, 1, -1) if self.mrope else numbers[None]

    @torch.no_grad()
    def lm_attention(self, layer: int, seen: Seen, entry: Entry, compact: bool = False) -> Tensor:
        """`[H, n, n]` what an LM layer's eager attention gives on these rows."""
        block = self.eager.model.language_model.layers[layer]
        n = len(seen.held)
        mask = torch.full((n, n), torch.finfo(seen.hidden.dtype).min, dtype=seen.hidden.dtype).triu(1)[None, None]
        rope = self.lm.rotary_emb(seen.hidden, self._at(entry, seen.held, compact))
        _, weights = block.self_attn(
            hidden_states=block.input_layernorm(seen.hidden), attention_mask=mask, position_embeddings=rope
        )
        return weights[0]

    @torch.no_grad()
    def vision(self, sample: dict[str, Tensor]) -> Vision:
        """Attentions, keys and features of the tower for the pictures of one sample (or for its videos)."""
        if "image_grid_thw" in sample:
            return self._windowed(sample["pixel_values"], sample["image_grid_thw"])
        if "video_grid_thw" in sample:
            return self._windowed(sample["pixel_values_videos"], sample["video_grid_thw"])
        pixels = "pixel_values" in sample or "pixel_values_videos" in sample
        return self._tower(sample) if pixels else Vision([], [], [], [])

    def _tower(self, sample: dict[str, Tensor]) -> Vision:
        """CLIP and SigLIP: one attention matrix for each tile, or for each frame, whose cells are pooled."""
        model = self.eager.model
        blocks = model.vision_tower.encoder.layers
        weights: list[Tensor] = []
        keys: list[Tensor] = []
        hooks = [b.self_attn.register_forward_hook(lambda m, a, out: weights.append(out[1])) for b in blocks]
        hooks += [b.self_attn.k_proj.register_forward_hook(lambda m, a, out: keys.append(out)) for b in blocks]
        videos, sizes = sample.get("pixel_values_videos"), sample.get("image_sizes")
        pictures = {k: v for k, v in sample.items() if k in ("pixel_values", "image_sizes")}
        encode = model.get_image_features if videos is None else model.get_video_features
        out = encode(**(pictures if videos is None else {"pixel_values_videos": videos}), return_dict=True)
        for hook in hooks:
            hook.remove()
        if videos is not None:
            tiles = [videos.shape[1]] * len(videos)
        else:
            tiles = [1] * len(sample["pixel_values"]) if sizes is None else [self._tiles(size) for size in sizes]
        prefix = weights[0].shape[-1] - self.cells
        heads = weights[0].shape[1]
        pooled = (lambda x: x) if videos is None else self._pooled
        received = [pooled(w.mean(2)[..., prefix:]) for w in weights]
        cls = [pooled(w[:, :, 0, prefix:]) for w in weights] if prefix else []
        mean_keys = [k.unflatten(-1, (heads, -1)).mean(-2) for k in keys]
        features = out.hidden_states[self.model.config.vision_feature_layer]
        return Vision(
            [[part.transpose(0, 1).flatten(1) for part in block.split(tiles)] for block in received],
            [[part.transpose(0, 1).flatten(1) for part in block.split(tiles)] for block in cls],
            [list(block.split(tiles)) for block in mean_keys],
            list(features.split(tiles)),
        )

    def _pooled(self, values: Tensor) -> Tensor:
        """`[…, cells]` → `[…, tokens]`: the means of squares of a frame."""
        side, stride = int(self.cells**0.5), self.model.config.spatial_pool_stride
        down = values.unflatten(-1, (side // stride, stride, side // stride, stride))
        return down.mean((-3, -1)).flatten(-2)

    def _windowed(self, pixels: Tensor, grids: Tensor) -> Vision:
        """Qwen2.5-VL: patches in window order, one attention matrix for each window, or for each frame."""
        visual = self.model.model.visual
        received: list[Tensor] = []

        def listen(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            q, k, _ = module.qkv(hidden).unflatten(-1, (3, module.num_heads, -1)).permute(1, 0, 2, 3)
            q, k = apply_rotary_pos_emb_vision(q, k, *kwargs["position_embeddings"])
            ends = kwargs["cu_seqlens"].tolist()
            parts = []
            for start, end in itertools.pairwise(ends):
                logits = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * module.scaling
                parts.append(logits.softmax(-1).mean(1))
            received.append(torch.cat(parts, -1))

        hooks = [b.attn.register_forward_pre_hook(listen, with_kwargs=True) for b in visual.blocks]
        visual(pixels, grid_thw=grids)
        for hook in hooks:
            hook.remove()
        vision = self.model.config.vision_config
        order, _ = get_vision_window_index(
            grids, spatial_merge_size=2, window_size=vision.window_size, patch_size=vision.patch_size
        )
        lengths = (grids.prod(-1) // 4).tolist()
        units = [block.unflatten(-1, (-1, 4)).mean(-1)[:, torch.argsort(order)] for block in received]
        return Vision([list(block.split(lengths, -1)) for block in units], [], [], [])


def _cache_keyword(layer: nn.Module) -> str:
    """`cache` since transformers 5.24."""
    return _cache_keyword_of(type(layer).forward)


@functools.cache
def _cache_keyword_of(forward: Any) -> str:
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def _runs(ids: Tensor) -> tuple[Tensor, ...]:
    """The positions of each unbroken run of placeholders."""
    at = ((ids == zoo.IMAGE) | (ids == zoo.VIDEO)).nonzero()[:, 0]
    if not len(at):
        return ()
    breaks = (at.diff() > 1).nonzero()[:, 0] + 1
    return tuple(at.tensor_split(breaks))
