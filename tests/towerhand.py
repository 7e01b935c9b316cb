"""The vision tower by hand: one sample, one tile after the other, block by block in halves, with plain attention.

Nothing here imports winnow. A tile is a crop, a thumbnail or a frame; its tokens are rows of the tower, for Qwen units
of 2 × 2 patches. What a method does is given as a function of a point and a tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from byhand import Entry, Hand, Reference, cut
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_window_index


@dataclass
class Tile:
    """Tokens of one tile.

    Attributes:
        x: `[n, C]`, or `[n, 4, C]` for units of four patches.
        ids: `[n]` which token of the tile each one is, or stands for; [CLS] is 0 where there is one.
        groups: the tokens that have gone into each.
        prefix: tokens before the patches.
        bias: `[n]` added to the logits of each token as a key.
        keys: `[n, d]` of the block that has attended last, mean over heads (and patches).
        received: `[H, n]` attention that each token received there, mean over the queries.
        from_first: `[H, n]` attention of the first token there ([CLS]); towers of CLIP and SigLIP only.
    """

    x: Tensor
    ids: list[int]
    groups: list[set[int]] = field(default_factory=list)
    prefix: int = 0
    bias: Tensor | None = None
    keys: Tensor | None = None
    received: Tensor | None = None
    from_first: Tensor | None = None

    def __post_init__(self) -> None:
        self.groups = self.groups or [{i} for i in self.ids]

    def take(self, rows: list[int], x: Tensor | None = None) -> None:
        """Go on with these rows, or with new ones that stand for them."""
        self.x = self.x[rows] if x is None else x
        self.ids = [self.ids[row] for row in rows]
        self.groups = [self.groups[row] for row in rows]
        self.bias = None if self.bias is None else self.bias[rows]


Act = Callable[[str, Tile], None]
"""What happens to a tile at `blocks[i]` or `blocks[i].mlp`."""


def attention(q: Tensor, k: Tensor, v: Tensor, scaling: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`[n, H, d]` → `[n, H·d]` and the weights `[H, n, n]`."""
    logits = torch.einsum("qhd,khd->hqk", q, k) * scaling
    weights = (logits if bias is None else logits + bias).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1), weights


@torch.no_grad()
def tiles_of(reference: Reference, sample: dict[str, Tensor], act: Act) -> list[list[Tile]]:
    """For each picture its tiles behind the block that feeds the projector."""
    if "pixel_values" not in sample and "pixel_values_videos" not in sample:
        return []
    if "image_grid_thw" in sample or "video_grid_thw" in sample:
        return _windowed(reference, sample, act)
    return _clip(reference, sample, act)


def _clip(reference: Reference, sample: dict[str, Tensor], act: Act) -> list[list[Tile]]:
    base, layer = reference.model.model, reference.model.config.vision_feature_layer
    tower = base.vision_tower
    blocks = list(tower.encoder.layers)
    blocks = blocks if layer == -1 else blocks[: layer + 1]
    prefix = int(hasattr(tower.embeddings, "class_embedding"))
    pictures = []
    sizes = sample.get("image_sizes")
    for number, pixels in enumerate(sample["pixel_values"]):
        pixels = pixels[None] if sizes is None else pixels[: reference._tiles(sizes[number])]
        tiles = []
        for one in pixels:
            x = tower.embeddings(one[None])
            x = (tower.pre_layrnorm(x) if prefix else x)[0]
            tile = Tile(x, list(range(len(x))), prefix=prefix)
            for i, block in enumerate(blocks):
                act(f"blocks[{i}]", tile)
                u, own = block.layer_norm1(tile.x), block.self_attn
                q, k, v = (f(u).unflatten(-1, (own.num_heads, -1)) for f in (own.q_proj, own.k_proj, own.v_proj))
                made, weights = attention(q, k, v, own.scale, tile.bias)
                tile.x = tile.x + own.out_proj(made)
                tile.keys, tile.received, tile.from_first = k.mean(1), weights.mean(1), weights[:, 0]
                act(f"blocks[{i}].mlp", tile)
                tile.x = tile.x + block.mlp(block.layer_norm2(tile.x))
            tiles.append(tile)
        pictures.append(tiles)
    return pictures


def _windowed(reference: Reference, sample: dict[str, Tensor], act: Act) -> list[list[Tile]]:
    """A unit attends in the window, or in the frame, of the unit that it stands for, and is rotated as that one."""
    visual, vision = reference.model.model.visual, reference.model.config.vision_config
    kind = "image" if "image_grid_thw" in sample else "video"
    grids = sample[f"{kind}_grid_thw"]
    calls: list[tuple[Tensor, dict]] = []
    hooks = [
        b.register_forward_pre_hook(lambda m, a, k: calls.append((a[0], k)), with_kwargs=True) for b in visual.blocks
    ]
    visual(sample["pixel_values" if kind == "image" else "pixel_values_videos"], grid_thw=grids)
    for hook in hooks:
        hook.remove()
    order = torch.arange(int(grids.prod(-1).sum()) // 4)
    if hasattr(vision, "window_size"):
        order, _ = get_vision_window_index(
            grids, spatial_merge_size=2, window_size=vision.window_size, patch_size=vision.patch_size
        )
    place = torch.argsort(order)  # of each unit in the sequence of the tower
    start = calls[0][0].unflatten(0, (-1, 4))
    pictures, first = [], 0
    for t, h, w in grids.tolist():
        tiles = []
        for _ in range(t):
            home = place[first : first + h * w // 4]
            tile = Tile(start[home], list(range(len(home))))
            for i, (block, (_, given)) in enumerate(zip(visual.blocks, calls, strict=True)):
                act(f"blocks[{i}]", tile)
                tile.x = _block(block, tile, home, given, lambda i=i, tile=tile: act(f"blocks[{i}].mlp", tile))
            tiles.append(tile)
            first += len(home)
        pictures.append(tiles)
    return pictures


def _block(block: nn.Module, tile: Tile, home: Tensor, given: dict, between: Callable[[], None]) -> Tensor:
    ends, rope = given["cu_seqlens"].tolist(), [x.unflatten(0, (-1, 4)) for x in given["position_embeddings"]]
    at = home[tile.ids]
    made, keys, received = torch.zeros_like(tile.x), None, None
    for a, b in itertools.pairwise(ends):
        rows = ((at >= a // 4) & (at < b // 4)).nonzero()[:, 0]
        if not len(rows):
            continue
        u, own = block.norm1(tile.x[rows].flatten(0, 1)), block.attn
        q, k, v = own.qkv(u).unflatten(-1, (3, own.num_heads, -1)).permute(1, 0, 2, 3)
        q, k = apply_rotary_pos_emb_vision(q, k, *(x[at[rows]].flatten(0, 1) for x in rope))
        bias = None if tile.bias is None else tile.bias[rows].repeat_interleave(4)
        out, weights = attention(q, k, v, own.scaling, bias)
        made[rows] = own.proj(out).unflatten(0, (-1, 4))
        if keys is None:
            keys, received = torch.zeros(len(at), k.shape[-1]), torch.zeros(len(weights), len(at))
        keys[rows] = k.mean(1).unflatten(0, (-1, 4)).mean(1)
        received[:, rows] = weights.mean(1).unflatten(-1, (-1, 4)).mean(-1)
    tile.keys, tile.received = keys, received
    tile.x = tile.x + made
    between()
    return tile.x + block.mlp(block.norm2(tile.x.flatten(0, 1))).unflatten(0, (-1, 4))


def in_tower(act: Act) -> Callable[[Reference, dict[str, Tensor], Entry], Hand]:
    """What a method that acts in the tower leaves for the LM: its tokens at the places that they stand for."""

    def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry) -> Hand:
        embeds, kept = entry.embeds.clone(), []
        for picture, tiles in enumerate(tiles_of(reference, sample, act)):
            own: list[int] = []
            cells = entry.cells[picture].tolist()
            for number, tile in enumerate(tiles):
                for row, token in enumerate(tile.ids):
                    cell = token - tile.prefix
                    content = _content(reference, cells, number, cell, len(tiles))
                    if cell >= 0 and content is not None:
                        own.append(content)
                        embeds[0, entry.content[picture][content]] = projected(reference, tile.x[row])
            kept.append(torch.tensor(sorted(own), dtype=torch.int64))
        return Hand(replace(entry, embeds=embeds), {0: cut(entry, lambda number, rows, seen: rows[kept[number]])})

    return by_hand


def _content(reference: Reference, cells: list[int], tile: int, cell: int, tiles: int) -> int | None:
    size = reference.cells if reference.tile else len(cells) // tiles
    return cells.index(tile * size + cell) if tile * size + cell in cells else None


def projected(reference: Reference, row: Tensor) -> Tensor:
    """One token behind the projector, or behind the merger of its four patches."""
    base = reference.model.model
    with torch.no_grad():
        return base.visual.merger(row)[0] if row.ndim == 2 else base.multi_modal_projector(row[None, None])[0, 0]
