"""The signals of the sketches, read by the engine on real model classes, against the modules called by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import zoo
from byhand import Reference
from cases import TOWERS
from probes import Look, forward
from torch import Tensor

import winnow
from winnow.contract import Signal, View

from .signals import BlockMove, BlockValues, CellPixels, MLPOutput, TowerFeatures

ROWS = ("3 A 6", "2 B 4 C 5")


def in_a_batch(build: str, signal: Signal, at: str = "projected") -> list[tuple[View, int, Tensor]]:
    """(view, lane, values) of each picture of a padded batch."""
    look = Look(needs=(signal,), at=at)
    with winnow.compress(model := zoo.model(build), look):
        forward(model, zoo.inputs(build, ROWS))
    return [(view, i, view[signal][i]) for view in look.views for i in range(view.b)]


def match(found: list[tuple[View, int, Tensor]], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    """Each picture's values are found once, whatever the order in which views came."""
    assert len(found) == len(expected)
    for want in expected:
        own = [values for _, _, values in found if values.shape == want.shape]
        assert min(float((values - want).abs().max()) for values in own) <= tolerance


@pytest.mark.parametrize("build", TOWERS)
def test_what_the_projector_reads(build):
    reference, expected = Reference(zoo.model(build)), []
    for part in zoo.samples(build, ROWS):
        features, entry = reference.vision(part).features, reference.entry(part)
        for tiles, cells in zip(features, entry.cells, strict=True):
            expected.append(tiles[:, tiles.shape[1] - reference.cells :].flatten(0, 1)[cells])
    match(in_a_batch(build, TowerFeatures()), expected)


@pytest.mark.parametrize("build", TOWERS)
def test_the_pixels_of_each_token(build):
    """Cut out of the picture by hand, row by row; tiles one after the other."""
    expected = []
    for part in zoo.samples(build, ROWS):
        entry = Reference(zoo.model(build)).entry(part)
        pixels = part["pixel_values"]
        for picture, cells in enumerate(entry.cells):
            tiles = pixels[picture] if pixels.ndim == 5 else pixels[picture : picture + 1]
            own = []
            for cell in cells.tolist():
                tile, (row, col) = cell // 25, divmod(cell % 25, 5)
                cut = tiles[tile, :, row * zoo.PATCH : (row + 1) * zoo.PATCH, col * zoo.PATCH : (col + 1) * zoo.PATCH]
                own.append(cut.flatten())
            expected.append(torch.stack(own))
    match(in_a_batch(build, CellPixels()), expected, 0)


@pytest.mark.parametrize("build", TOWERS)
def test_values_and_changes_of_a_vision_block(build):
    """From the block's own projection, and from what the next block is given."""
    reference, values, changes = Reference(zoo.model(build)), [], []
    for part in zoo.samples(build, ROWS):
        entry, seen = reference.entry(part), {}
        block = reference.model.model.vision_tower.encoder.layers[1]
        hooks = [
            block.self_attn.v_proj.register_forward_hook(lambda m, a, out, seen=seen: seen.update(v=out)),
            block.register_forward_hook(
                lambda m, a, k, out, seen=seen: seen.update(
                    before=a[0] if a else k["hidden_states"], after=out[0] if isinstance(out, tuple) else out
                ),
                with_kwargs=True,
            ),
        ]
        counts = [len(tiles) for tiles in reference.vision(part).features]
        with torch.no_grad():
            pictures = {k: v for k, v in part.items() if k in ("pixel_values", "image_sizes")}
            reference.model.model.get_image_features(**pictures, return_dict=True)
        for hook in hooks:
            hook.remove()
        moved = (seen["after"] - seen["before"]).norm(dim=-1)
        for v, change, cells in zip(seen["v"].split(counts), moved.split(counts), entry.cells, strict=True):
            prefix = v.shape[1] - reference.cells
            values.append(v[:, prefix:].flatten(0, 1)[cells])
            changes.append(change[:, prefix:].flatten()[cells])
    match(in_a_batch(build, BlockValues(layer=1)), values)
    match(in_a_batch(build, BlockMove(layer=1)), changes)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_the_output_of_a_module_of_an_lm_layer(build):
    """Of a layer that has run; padding and text are left out."""
    reference, expected = Reference(zoo.model(build)), []
    for part in zoo.samples(build, ROWS):
        entry, box = reference.entry(part), []
        hook = reference.lm.layers[1].mlp.register_forward_hook(lambda m, a, out, box=box: box.append(out))
        reference.run(entry)
        hook.remove()
        expected += [box[0][0][content] for content in entry.content]
    match(in_a_batch(build, MLPOutput(1), at="layers[2]"), expected)


def test_a_signal_of_the_projector_cannot_be_seen_before_it():
    with pytest.raises(winnow.WinnowError, match=r"before the projector.*has not run"):
        winnow.compress(zoo.model("llava_clip"), Look(needs=(TowerFeatures(),), at="features"))


def test_a_signal_that_does_not_say_where_it_listens_says_what_to_define():
    @dataclass(frozen=True)
    class Nowhere(Signal):
        pass

    with pytest.raises(NotImplementedError, match="define site"):
        winnow.compress(zoo.model("llava_clip"), Look(needs=(Nowhere(),)))
