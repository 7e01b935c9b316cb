"""Outliers of a wide [CLS] row with like patches added, patches of a grid, and the sum of the rest; newlines go."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from byhand import Entry, Hand, Reference
from torch import Tensor
from torch.nn.functional import normalize

SETTINGS = {"plus": True, "neighbours": 3}
BUILDS = ("llava_clip", "llava_next")  # those with [CLS]


@torch.no_grad()
def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, plus: bool, neighbours: int) -> Hand:
    vision, wide = reference.vision(sample), last_block(reference, sample)
    embeds, held = entry.embeds, entry.held
    for picture, item in enumerate(entry.items):
        features, made = vision.features[picture], []
        q, k = (x[: len(features)] for x in wide)
        wide = [x[len(features) :] for x in wide]
        for tile, x in enumerate(features):
            row = ((q[tile, 0] @ k[tile].T) / x.shape[-1] ** 0.5).softmax(-1)[1:]
            kept = chosen(row, plus)
            for i in kept:
                others = [j for j in range(len(row)) if j != i]
                alike = normalize(k[tile, 1:], dim=-1) @ normalize(k[tile, 1 + i], dim=-1)
                near = sorted(others, key=lambda j: -float(alike[j]))[:neighbours]
                made.append((x[1 + i] + sum(row[j] * x[1 + j] for j in near), tile * len(row) + i))
            rest = sorted((j for j in range(len(row)) if j not in kept), key=lambda j: -float(row[j]))
            made.append((sum(row[j] * x[1 + j] for j in rest), tile * len(row) + rest[0]))
        rows = reference.model.model.multi_modal_projector(torch.stack([x for x, _ in made])[None])
        cells = entry.cells[picture].tolist()
        ids = torch.tensor([cells.index(cell) if cell in cells else 0 for _, cell in made])
        before, after = held < item[0], held > item[-1]
        embeds = torch.cat([embeds[:, before], rows, embeds[:, after]], 1)
        held = torch.cat([held[before], entry.content[picture][ids], held[after]])
    return Hand(replace(entry, embeds=embeds, held=held))


def last_block(reference: Reference, sample: dict[str, Tensor]) -> list[Tensor]:
    """Queries and keys of all real tiles `[tiles, N, C]` in the tower's last block, as its projections give them."""
    if "pixel_values" not in sample:
        return [torch.empty(0), torch.empty(0)]
    found: list[Tensor] = []
    own = reference.eager.model.vision_tower.encoder.layers[-1].self_attn
    hooks = [m.register_forward_hook(lambda module, args, out: found.append(out)) for m in (own.q_proj, own.k_proj)]
    pictures = {k: v for k, v in sample.items() if k in ("pixel_values", "image_sizes")}
    reference.eager.model.get_image_features(**pictures, return_dict=True)
    for hook in hooks:
        hook.remove()
    return found


def chosen(row: Tensor, plus: bool) -> list[int]:
    values, n = row.tolist(), len(row)
    low, high = np.percentile(values, [25, 75])
    ranked = sorted(range(n), key=lambda j: -values[j])
    share = max(1, sum(v > high + 1.5 * (high - low) for v in values)) / n
    best = ranked[: max(1, int(n * share))]
    grid = range(0, n - 1, max(1, int(1 / share) // 3))
    return best + [j for j in grid if plus and j not in best]
