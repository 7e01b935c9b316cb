"""ToMe's merging in every block of the tower, the same number of pairs in each."""

from __future__ import annotations

from byhand import Entry, Hand, Reference
from torch import Tensor
from towerhand import Tile, in_tower

from methods.byhand.tome import merging

SETTINGS = {"ratio": 0.5}


def by_hand(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, ratio: float) -> Hand:
    config = reference.model.config.vision_config
    depth = getattr(config, "num_hidden_layers", None) or config.depth
    patches: dict[int, int] = {}

    def act(point: str, tile: Tile) -> None:
        whole = patches.setdefault(id(tile), len(tile.ids) - tile.prefix)
        merging(int(whole * (1 - ratio) / depth))(point, tile)

    return in_tower(act)(reference, sample, entry)
