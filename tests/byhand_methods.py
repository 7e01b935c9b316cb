"""What each method keeps, by hand for one sample: lists and loops over eager attentions or hidden states.

Each function takes the reference, the sample, its entry and the settings, and gives the entry and the cuts that
`Reference.run` needs. Nothing here imports winnow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from byhand import Choice, Cut, Entry, Reference, Seen, cut, top
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Hand:
    """A method worked out for one sample: what enters the LM, and what is cut before which layer."""

    entry: Entry
    cuts: dict[int, Cut] = field(default_factory=dict)


def count(keep: int | str, n: int, rounding: str = "up") -> int:
    """Tokens of a budget: a number, or a percentage of n, halves `up`, to `even`, or rounded `down`; from 1 to n."""
    if isinstance(keep, str):
        exact = float(keep.rstrip("%")) * n / 100
        keep = {"up": int(exact + 0.5 + 1e-9), "even": round(exact), "down": int(exact + 1e-9)}[rounding]
    return max(1, min(n, keep))


def shares(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` dealt one by one over groups, the first group first, none beyond its size."""
    given = [0] * len(sizes)
    while sum(given) < total:
        open_groups = [i for i, size in enumerate(sizes) if given[i] < size]
        least = min(given[i] for i in open_groups)
        given[next(i for i in open_groups if given[i] == least)] += 1
    return given


def tiles_of(reference: Reference, entry: Entry, picture: int) -> list[Tensor]:
    """The content ids of each tile of a picture."""
    cells = entry.cells[picture]
    if not reference.tile:
        return [torch.arange(len(cells))]
    return [(cells // reference.cells == t).nonzero()[:, 0] for t in range(int(cells.max()) // reference.cells + 1)]


def keeping(entry: Entry, kept: Sequence[Tensor]) -> Cut:
    """The cut at the LM's door that leaves these content ids of each picture."""
    return cut(entry, lambda number, rows, seen: rows[kept[number]])


def per_tile(tiles: Sequence[Tensor], scores: Tensor, total: int) -> Tensor:
    """The best of each tile, in equal shares of the total."""
    parts = shares(total, [len(tile) for tile in tiles])
    return torch.cat([tile[top(scores[tile], part)] for tile, part in zip(tiles, parts, strict=True)]).sort().values


def fastervlm(
    reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str, block: int | None = None
) -> Hand:
    """[CLS] attention of the feature block; where there is no [CLS], the mean over all queries."""
    vision = reference.vision(sample)
    block = _feature_block(reference) if block is None else block
    kept = []
    for picture, cells in enumerate(entry.cells):
        score = (vision.cls or vision.received)[block][picture].mean(0)[cells]
        kept.append(per_tile(tiles_of(reference, entry, picture), score, count(keep, len(cells))))
    return Hand(entry, {0: keeping(entry, kept)})


def vtc_cls(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str) -> Hand:
    """[CLS] attention summed over the blocks from half of the depth to the feature block."""
    vision = reference.vision(sample)
    last = _feature_block(reference)
    kept = []
    for picture, cells in enumerate(entry.cells):
        blocks = range(min(len(vision.cls) // 2, last), last + 1)
        total = sum(vision.cls[block][picture].mean(0)[cells] for block in blocks)
        kept.append(per_tile(tiles_of(reference, entry, picture), total, count(keep, len(cells))))
    return Hand(entry, {0: keeping(entry, kept)})


def hiprune(
    reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str, alpha: float, object_layer: int
) -> Hand:
    """Anchors of a middle block, their neighbours on the grid, and the rest by the feature block."""
    vision = reference.vision(sample)
    kept = []
    for picture, cells in enumerate(entry.cells):
        middle = vision.received[object_layer][picture].mean(0)[cells]
        deep = vision.received[_feature_block(reference)][picture].mean(0)[cells]
        tiles = tiles_of(reference, entry, picture)
        grid = _grid(reference, sample, picture)
        chosen: list[Tensor] = []
        for tile, quota in zip(tiles, shares(count(keep, len(cells)), [len(t) for t in tiles]), strict=True):
            anchors = tile[top(middle[tile], min(round(quota * alpha / 5), quota // 5))]
            spots = {grid(int(cells[i])): int(i) for i in tile}
            near = {int(a) for a in anchors}
            for row, col in [grid(int(cells[a])) for a in anchors]:
                around = [(row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)]
                near |= {spots[spot] for spot in around if spot in spots}
            rest = torch.tensor([i for i in tile.tolist() if i not in near], dtype=torch.int64)
            chosen.append(torch.tensor(sorted(near), dtype=torch.int64))
            chosen.append(rest[top(deep[rest], quota - len(near))])
        kept.append(torch.cat(chosen).sort().values)
    return Hand(entry, {0: keeping(entry, kept)})


def divprune(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str) -> Hand:
    """Greedy max–min of cosine distance; the start is the token whose nearest neighbour is farthest."""

    def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
        alike = _cosines(seen[-1].hidden[0, rows])
        nearest = [max(a for j, a in enumerate(row) if j != i) for i, row in enumerate(alike)]
        picks = _greedy(alike, nearest.index(min(nearest)), count(keep, len(rows)), max)
        return rows[torch.tensor(sorted(picks))]

    return Hand(entry, {0: cut(entry, choose)})


def todre(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    keep: int | str,
    tau: float | None = None,
    criterion: str = "sum",
    seed: int = 0,
) -> Hand:
    """Greedy max-sum from the token that [CLS] of the last block sees most; `tau`: all or none before 7/8 of the LM."""
    vision = reference.vision(sample)

    def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
        if vision.cls:
            score = vision.cls[-1][number].mean(0)[entry.cells[number]]
            first = int(top(score[tiles_of(reference, entry, number)[0]], 1))
        else:
            first = int(top(torch.rand(len(rows), generator=torch.Generator().manual_seed(seed)), 1))
        tally = {"sum": sum, "max": max}[criterion]
        picks = _greedy(_cosines(seen[-1].hidden[0, rows]), first, count(keep, len(rows)), tally)
        return rows[torch.tensor(sorted(picks))]

    cuts = {0: cut(entry, choose)}
    if tau is not None:
        layer = max(1, len(reference.lm.layers) * 7 // 8)

        def forget(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
            weights = reference.lm_attention(layer - 1, seen[layer - 1], entry).mean(0)
            held = seen[layer - 1].held
            pictures = torch.isin(held, torch.cat(entry.content))
            question = held > entry.items[-1][-1]
            towards = float(weights[question][:, pictures].sum(1).mean())
            back = float(weights[pictures][:, question].sum(1).mean())
            return rows[:0] if towards < tau and back < tau else rows

        cuts[layer] = cut(entry, forget)
    return Hand(entry, cuts)


def fastv(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    keep: int | str,
    layer: int = 2,
    compact: bool = False,
) -> Hand:
    """What the last prompt token attends to in layer K − 1, cut before layer K."""

    def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
        score = reference.lm_attention(layer - 1, seen[layer - 1], entry, compact)[:, -1].mean(0)
        return rows[top(score[rows], count(keep, len(entry.content[number]), "even"))]

    return Hand(entry, {layer: cut(entry, choose)})


def pyramiddrop(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    ratios: Sequence[int | str],
    layers: Sequence[int],
    compact: bool = False,
) -> Hand:
    """What the last prompt token is about to attend to in the layer behind each cut; shares of the entry, cut down."""

    def at(layer: int, keep: int | str) -> Choice:
        def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
            score = reference.lm_attention(layer, seen[-1], entry, compact)[:, -1].mean(0)
            return rows[top(score[rows], count(keep, len(entry.content[number]), "down"))]

        return choose

    return Hand(entry, {layer: cut(entry, at(layer, keep)) for layer, keep in zip(layers, ratios, strict=True)})


def visionzip(
    reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str, contextual: float
) -> Hand:
    """Dominant tokens, and leftovers merged by the likeness of their keys, before the projector; newlines go."""
    vision = reference.vision(sample)
    block = _feature_block(reference)
    embeds, held = entry.embeds, entry.held
    for picture, item in enumerate(entry.items):
        score = vision.cls[block][picture].mean(0).unflatten(0, (-1, reference.cells))
        features, keys = vision.features[picture], vision.keys[block][picture]
        parts = shares(count(keep, len(entry.cells[picture])), [reference.cells + 1] * len(features))
        cls, dominant, merged = [], [], []
        for tile, part in enumerate(parts):
            c = min(max(0, part - 1), int(part * contextual + 0.5))
            picked = (top(score[tile], part - c - 1) + 1).tolist()
            rest = [i for i in range(1, reference.cells + 1) if i not in picked]
            cls.append((tile, features[tile, 0], None))
            dominant += [(tile, features[tile, i], tile * reference.cells + i - 1) for i in picked]
            merged += _merged(features[tile], normalize(keys[tile], dim=-1), rest, c, tile * reference.cells)
        grid = _grid(reference, sample, picture)
        thumbnail = [d for d in dominant if d[0] == 0]
        mosaic = sorted((d for d in dominant if d[0] > 0), key=lambda d: grid(d[2]))
        ordered = [cls[0], *thumbnail, *mosaic, *cls[1:], *merged]
        rows = reference.model.model.multi_modal_projector(torch.stack([row for _, row, _ in ordered])[None])
        cells = entry.cells[picture].tolist()
        ids = torch.tensor([cells.index(cell) if cell in cells else 0 for _, _, cell in ordered])
        before, after = held < item[0], held > item[-1]
        embeds = torch.cat([embeds[:, before], rows, embeds[:, after]], 1)
        held = torch.cat([held[before], entry.content[picture][ids], held[after]])
    return Hand(replace(entry, embeds=embeds, held=held))


def _merged(features: Tensor, keys: Tensor, rest: list[int], c: int, start: int) -> list[tuple[int, Tensor, int]]:
    """Evenly spaced leftovers, each with the mean of those that are most like it added."""
    if c == 0:
        return []
    step = max(1, len(rest) // c)
    targets = [rest[k * step] for k in range(c)]
    members: dict[int, list[Tensor]] = {t: [] for t in targets}
    for i in rest:
        if i not in targets:
            alike = [float(keys[i] @ keys[t]) for t in targets]
            members[targets[alike.index(max(alike))]].append(features[i])
    return [(0, features[t] + (torch.stack(own).mean(0) if own else 0), start + t - 1) for t, own in members.items()]


def _cosines(rows: Tensor) -> list[list[float]]:
    rows = normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)
    return (rows @ rows.T).tolist()


def _greedy(alike: list[list[float]], first: int, k: int, tally: Callable[[Any], float]) -> list[int]:
    """k tokens from a first one: always the token that is least like those taken."""
    picks = [first]
    while len(picks) < k:
        rest = [j for j in range(len(alike)) if j not in picks]
        picks.append(min(rest, key=lambda j: tally([alike[i][j] for i in picks])))
    return picks


def _feature_block(reference: Reference) -> int:
    """The block whose output the projector is given."""
    config = reference.model.config
    layer = getattr(config, "vision_feature_layer", -1)
    depth = getattr(config.vision_config, "num_hidden_layers", None) or config.vision_config.depth
    return depth + layer if layer < 0 else layer - 1


def _grid(reference: Reference, sample: dict[str, Tensor], picture: int) -> Callable[[int], tuple[int, int]]:
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
