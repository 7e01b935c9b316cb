"""Llama 4: tiles are items of their own, and what depends on places in the cache is refused."""

from __future__ import annotations

import builds
import pytest
import torch
from probes import forward
from transformers.models.llama4.modeling_llama4 import pixel_shuffle

import winnow
from winnow.models.families import family_of
from winnow.models.family import Encoding

# Newer releases cannot run the class: see tests/builds/llama4.py.
pytestmark = pytest.mark.skipif("llama4" not in builds.every(), reason="the class is broken in this transformers")
ROWS = ("3 A 6", "11", "2 B 4 C 5")  # three tiles; none; one, and three


def test_prompts_in_which_queries_scale_with_their_place_are_refused():
    own = builds.every()["llama4"]
    model, part = own.model(floor_scale=30), own.sample("3 A 6")
    assert part["input_ids"].shape[1] > 30
    with winnow.compress(model, "divprune:keep=4") as handle:
        forward(model, own.sample("5"))
        with pytest.raises(winnow.UnsupportedError, match="from 30 tokens on"):
            forward(model, part)
        with handle.using("full"):
            forward(model, part)


def test_each_tile_keeps_what_is_promised_and_batches_are_their_samples_alone():
    build = builds.every()["llama4"]
    model, parts = build.model(), build.samples(ROWS)
    plain = forward(model, build.collate(parts)).logits
    with winnow.compress(model, "divprune:keep=4") as handle:
        batch = forward(model, build.collate(parts)).logits
        items = handle.last.items
        alone = [forward(model, part).logits[0, -1] for part in parts]
    assert [(item.row, item.n_visual, len(item.kept)) for item in items] == [(0, 9, 4)] * 3 + [(2, 9, 4)] * 4
    for row, (own, part) in enumerate(zip(alone, parts, strict=True)):
        last = part["input_ids"].shape[1] - 1  # this class's batches are padded on the right
        assert (batch[row, last] - own).abs().max() <= 2e-5
    assert (batch - plain).abs().max() > 1e-2


def test_tokens_stand_where_pixel_shuffle_puts_them():
    model = builds.every()["llama4"].model()
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    channels = places.repeat_interleave(2, 1)[None]  # row, row, column, column
    shuffled = pixel_shuffle(channels, model.config.vision_config.pixel_shuffle_ratio)[0]
    (layout,) = family_of(model).layouts(model, Encoding("image", {}, (9,)))
    centres = torch.tensor((layout.boxes[:, :2] + layout.boxes[:, 2:]) / 2).flip(1)
    rows = shuffled.unflatten(1, (-1, 2, 2))[..., 0].mean(1)
    assert torch.allclose((rows.double() + 0.5) / side, centres)


def test_its_tower_is_not_looked_at():
    with pytest.raises(winnow.UnsupportedError, match="knows no vision tower"):
        winnow.compress(builds.every()["llama4"].model(), "hiprune")
