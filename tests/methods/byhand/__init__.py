"""What each built-in method keeps, by hand: one file for each, found by the name of the slug.

A file says `SETTINGS` of the method, and `by_hand(reference, sample, entry, **settings)`, which gives what
`Reference.run` needs: lists and loops over eager attentions or hidden states, for one sample. `BUILDS` are those that
the method runs on, where these are not all; `ROWS` the batch of a build, where it is not the one that all methods are
given (`{"qwen2_5_vl": ("3 W 6", "9")}`), and `EXTRA` more batches of a build that it must be tried on.
Methods for videos run on `qwen2_5_vl` and `llava_next_video` (see `clips`).
Nothing here imports winnow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import zoo
from byhand import Entry, Reference, top
from torch import Tensor
from torch.nn.functional import normalize


def shares(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` dealt one by one over groups, the first group first, none beyond its size."""
    given = [0] * len(sizes)
    while sum(given) < total:
        open_groups = [i for i, size in enumerate(sizes) if given[i] < size]
        least = min(given[i] for i in open_groups)
        given[next(i for i in open_groups if given[i] == least)] += 1
    return given


def dealt(total: int, wanted: list[float], sizes: list[int]) -> list[int]:
    """In proportion, none beyond its size; what rounding down leaves goes to the largest remainders."""
    level, full = 1.0, set()
    while True:
        rest = [i for i in range(len(sizes)) if i not in full]
        level = (total - sum(sizes[i] for i in full)) / sum(wanted[i] for i in rest)
        more = {i for i in rest if wanted[i] * level > sizes[i]}
        if not more:
            break
        full |= more
    exact = [sizes[i] if i in full else wanted[i] * level for i in range(len(sizes))]
    given = [int(x) for x in exact]
    for i in sorted(range(len(sizes)), key=lambda i: given[i] - exact[i])[: total - sum(given)]:
        given[i] += 1
    return given


def tiles_of(reference: Reference, entry: Entry, picture: int) -> list[Tensor]:
    """The content ids of each tile of a picture."""
    cells = entry.cells[picture]
    if not reference.tile:
        return [torch.arange(len(cells))]
    return [(cells // reference.cells == t).nonzero()[:, 0] for t in range(int(cells.max()) // reference.cells + 1)]


def per_tile(tiles: Sequence[Tensor], scores: Tensor, total: int) -> Tensor:
    """The best of each tile, in equal shares of the total."""
    parts = shares(total, [len(tile) for tile in tiles])
    return torch.cat([tile[top(scores[tile], part)] for tile, part in zip(tiles, parts, strict=True)]).sort().values


def cosines(rows: Tensor) -> list[list[float]]:
    rows = normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)
    return (rows @ rows.T).tolist()


def greedily(alike: list[list[float]], first: int, k: int, tally: Callable[[Any], float]) -> list[int]:
    """k tokens from a first one: always the token that is least like those taken."""
    picks = [first]
    while len(picks) < k:
        rest = [j for j in range(len(alike)) if j not in picks]
        picks.append(min(rest, key=lambda j: tally([alike[i][j] for i in picks])))
    return picks


def feature_block(reference: Reference) -> int:
    """The block whose output the projector is given."""
    config = reference.model.config
    layer = getattr(config, "vision_feature_layer", -1)
    depth = getattr(config.vision_config, "num_hidden_layers", None) or config.vision_config.depth
    return depth + layer if layer < 0 else layer - 1


def grid_of(reference: Reference, sample: dict[str, Tensor], picture: int) -> Callable[[int], tuple[int, int]]:
    """The row and column of a cell: in its grid, and for tiles behind the thumbnail, in the whole mosaic."""
    if not reference.tile:
        grids = sample["video_grid_thw"] if "video_grid_thw" in sample else sample["image_grid_thw"]
        _, height, width = (grids[picture] // 2).tolist()
        # One row is left out between frames, so that no token has a neighbour in another frame.
        return lambda cell: (cell // width + cell // (height * width), cell % width)
    side = int(reference.cells**0.5)
    across = 1 if "image_sizes" not in sample else -(-int(sample["image_sizes"][picture, 1]) // reference.tile)

    def spot(cell: int) -> tuple[int, int]:
        tile, (row, col) = cell // reference.cells, divmod(cell % reference.cells, side)
        down, right = divmod(tile - 1, across) if tile else (0, 0)
        return down * side + row, right * side + col

    return spot


def frames_of(sample: dict[str, Tensor], entry: Entry, picture: int) -> tuple[int, int]:
    """The frames of an item and the tokens of each; a picture is one frame. Tokens come frame by frame, in raster."""
    first = [int(sample["input_ids"][0, content[0]]) for content in entry.content]
    tokens = len(entry.content[picture])
    if first[picture] != zoo.VIDEO:
        return 1, tokens
    if "video_grid_thw" in sample:
        frames = int(sample["video_grid_thw"][first[:picture].count(zoo.VIDEO), 0])
    else:
        frames = sample["pixel_values_videos"].shape[1]
    return frames, tokens // frames


def glorot(shapes: Sequence[Sequence[int]], seed: int = 0) -> list[Tensor]:
    """Random matrices, one after the other from one seed: what learned methods have before they are trained."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.init.xavier_uniform_(torch.empty(*shape), generator=generator) for shape in shapes]
