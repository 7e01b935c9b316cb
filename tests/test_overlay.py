"""The overlay: pixels of kept, merged, dropped and unseen places, and the part of a picture that a processor shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zoo
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from winnow.core.errors import WinnowError
from winnow.core.layout import Layout, grid_rows
from winnow.core.ledger import ItemLedger
from winnow.core.reduction import Reduction
from winnow.engine.compress import compress
from winnow.overlay import (
    DROPPED,
    EVIDENCE_LINE,
    KEPT,
    KEPT_LINE,
    LARGEST,
    MERGED,
    levels,
    overlay,
    panel_size,
    shown_box,
)

ORANGE = (220, 120, 40)


def centre(drawn: Image.Image, row: int, col: int, grid: int, left: int = 0) -> tuple[int, ...]:
    """The colour in the middle of a cell of a 448-pixel panel."""
    cell = 448 // grid
    return drawn.getpixel((left + col * cell + cell // 2, row * cell + cell // 2))


def is_grey(colour) -> bool:
    return max(colour) - min(colour) <= 2


def test_kept_tokens_are_clear_and_dropped_ones_grey_and_dim():
    picture = Image.new("RGB", (448, 448), ORANGE)
    drawn = overlay(picture, Layout.grid(4, 4), [0, 5])
    for token in range(16):
        colour = centre(drawn, token // 4, token % 4, 4)
        if token in (0, 5):
            assert colour == ORANGE
        else:
            assert is_grey(colour)
            assert max(colour) < 0.6 * max(ORANGE)


def test_a_thin_line_surrounds_what_is_kept_and_nothing_else():
    drawn = np.asarray(overlay(Image.new("RGB", (448, 448), ORANGE), Layout.grid(4, 4), [5, 6]))
    line = (drawn == KEPT_LINE).all(-1)
    rows, cols = np.nonzero(line)
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (112, 223, 112, 335)
    assert line.sum() == 2 * 224 + 2 * 112 - 4  # one pixel deep, and no line between two kept neighbours


def test_merged_sources_lie_between_kept_and_dropped():
    layout = Layout.grid(2, 2)
    provenance = Reduction.assign(torch.tensor([0, 0, -1, 1]), m=2, representative=torch.tensor([0, 3]))
    assert levels(layout, provenance).tolist() == [KEPT, MERGED, DROPPED, KEPT]
    drawn = overlay(Image.new("RGB", (448, 448), ORANGE), layout, provenance)
    red = [centre(drawn, token // 2, token % 2, 2)[0] for token in range(4)]
    assert red[0] == red[3] == ORANGE[0] > red[1] > red[2]


def test_mask_ids_tensor_and_reduction_draw_the_same():
    picture, layout = Image.effect_noise((96, 64), 60), Layout.grid(4, 6)
    ids = [1, 7, 8, 23]
    mask = np.isin(np.arange(24), ids)
    drawn = [
        overlay(picture, layout, kept)
        for kept in (ids, mask, torch.tensor(ids), torch.from_numpy(mask), Reduction.select(torch.tensor(ids), 24))
    ]
    assert len({image.tobytes() for image in drawn}) == 1


def test_small_pictures_are_scaled_up_and_keep_their_proportions():
    drawn = overlay(Image.new("RGB", (40, 20), ORANGE), Layout.grid(2, 4), [])
    assert drawn.height >= 440
    assert drawn.width == 2 * drawn.height


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 200)])
def test_degenerate_pictures_are_drawn(size):
    assert overlay(Image.new("RGB", size), Layout.grid(1, 1), [0], caption="x").width >= 1


@pytest.mark.parametrize("size", [(1, 200), (81, 16_200), (400, 300), (60, 2400), (5000, 4000)])
def test_a_panel_is_as_large_as_said_and_strips_are_not_drawn_larger_than_memory_holds(size):
    wide, high = panel_size(size)
    assert wide * high <= max(size[0] * size[1], LARGEST)
    assert wide / high == pytest.approx(size[0] / size[1], rel=0.01)
    if wide * high < 2**20:
        assert overlay(Image.new("RGB", size), Layout.grid(2, 2), [0]).size == (wide, high)


def test_evidence_is_outlined_where_it_lies():
    drawn = np.asarray(overlay(Image.new("RGB", (448, 448)), Layout.grid(4, 4), [], evidence=[(100, 50, 200, 150)]))
    rows, cols = np.nonzero((drawn == EVIDENCE_LINE).all(-1))
    assert (cols.min(), rows.min(), cols.max(), rows.max()) == (99, 49, 200, 150)


def test_what_the_model_was_not_shown_is_darkest_and_tokens_lie_inside_what_it_was_shown():
    drawn = overlay(Image.new("RGB", (896, 448), ORANGE), Layout.grid(2, 2), [0], shown=(224, 0, 672, 448))
    unseen, dropped, kept = drawn.getpixel((50, 300)), drawn.getpixel((560, 300)), drawn.getpixel((336, 112))
    assert max(unseen) < 0.5 * max(dropped)
    assert kept == ORANGE


def test_an_item_with_a_thumbnail_and_tiles_has_a_panel_for_each():
    layout = Layout.of("tiled", [grid_rows(2, 2, grid=0), grid_rows(4, 4, grid=1, newline=True)])
    drawn = overlay(Image.new("RGB", (448, 448), ORANGE), layout, [3, 4])  # last of the thumbnail, first of the tiles
    assert drawn.size == (448 + 8 + 448, 448)
    assert centre(drawn, 1, 1, 2) == ORANGE
    assert centre(drawn, 0, 0, 4, left=456) == ORANGE
    assert is_grey(centre(drawn, 0, 1, 4, left=456))


def test_the_caption_never_leaves_the_picture():
    short = overlay(Image.new("RGB", (448, 448)), Layout.grid(1, 1), [], caption="64 of 576")
    long = overlay(Image.new("RGB", (448, 448)), Layout.grid(1, 1), [], caption="64 of 576 " * 100)
    assert short.size == long.size == (448, 470)
    assert np.asarray(short)[448:].max() > 200
    assert np.asarray(long)[:, -4:][448:].max() < 100


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        ([16], "0 … 15"),
        ([-1], "0 … 15"),
        (np.ones(9, bool), "16 content"),
        (Reduction.select(torch.tensor([0]), 9), "16"),
    ],
)
def test_what_does_not_fit_the_layout_is_refused(kept, says):
    with pytest.raises(WinnowError, match=says):
        overlay(Image.new("RGB", (8, 8)), Layout.grid(4, 4), kept)


TILED = Layout.of(
    "three tiles of 2 × 2, the last two side by side without their lower row",
    [
        grid_rows(2, 2, grid=0, tile=0),
        grid_rows(1, 4, grid=1, tile=np.array([[[1, 1, 2, 2]]]), cell=np.array([4, 5, 8, 9]), newline=True),
    ],
)


@pytest.mark.parametrize(("has_cls", "chosen"), [(True, [2, 6, 12]), (False, [1, 4, 9])])
def test_provenance_of_a_step_on_the_towers_tokens_is_in_content_tokens(has_cls, chosen):
    """The second cell of the thumbnail, the first of the second tile, the second of the third: contents 1, 4 and 7."""
    item = tower_item(has_cls, Reduction.select(torch.tensor(chosen), 12 + 3 * has_cls), [1, 4, 7])
    assert levels(TILED, item.provenance()).nonzero()[0].tolist() == [1, 4, 7]
    item.reductions.append(("layers[2]", "prune", Reduction.select(torch.tensor([0, 2]), 3)))
    assert levels(TILED, item.provenance()).nonzero()[0].tolist() == [1, 7]


def test_an_output_of_cls_alone_stands_for_no_content_token():
    """[CLS] of the first tile, and the third tile's second cell with the first tile's second merged into it."""
    merged = Reduction.edges(
        torch.tensor([0, 2, 12]), torch.tensor([0, 1, 1]), n=15, m=2, representative=torch.tensor([0, 12])
    )
    provenance = tower_item(True, merged, [0, 7]).provenance()
    assert provenance.sourced.tolist() == [False, True]
    assert levels(TILED, provenance).tolist() == [DROPPED, MERGED, *[DROPPED] * 5, KEPT]


def tower_item(has_cls, reduction, left):
    """An item whose tower gave [CLS] (or none) and 2 × 2 cells for each of three tiles, after one reduction."""
    item = ItemLedger(0, "image", TILED, TILED.n_content, ids=torch.tensor(left))
    item.reductions.append(("features", "zip", reduction))
    cell_of = [c for tile in range(3) for c in ([-1] if has_cls else []) + [4 * tile + i for i in range(4)]]
    place = {int(cell): i for i, cell in enumerate(TILED.cell[TILED.content])}
    item.to_content(torch.tensor([place.get(cell, -1) for cell in cell_of]), TILED)
    return item


@pytest.mark.parametrize("build", ["llava_clip", "llava_next"])
def test_provenance_of_a_real_run_keeps_what_the_ledger_keeps(build):
    model = zoo.model(build)
    with compress(model, "visionzip:keep=20") as handle:
        model(**zoo.inputs(build, ("3 A 6",)))
    (item,) = handle.last.items
    found = levels(item.layout, item.provenance())
    drawn, left = set((found == KEPT).nonzero()[0].tolist()), set(item.kept.tolist())
    assert left - {0} <= drawn <= left  # [CLS] takes the place of token 0, and stands for no part of the picture
    assert (found == MERGED).sum() > 0


def ramps(width: int, height: int) -> Image.Image:
    """A picture whose red says the column and whose green says the row, as shares of 255."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray((np.stack([x, y, np.zeros_like(x)], -1) * 255).astype(np.uint8))


CLIP = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
PROCESSORS = {
    "clip": CLIPImageProcessorPil(**CLIP),
    "clip-crop-smaller": CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 40}),
    "siglip": SiglipImageProcessorPil(size={"height": 56, "width": 56}),
    "llava-crop": LlavaImageProcessorPil(**CLIP),
    "llava-pad": LlavaImageProcessorPil(do_pad=True, do_center_crop=True, **CLIP),
}


@pytest.mark.parametrize("size", [(200, 80), (80, 200), (120, 120), (57, 91)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_shown_box_is_what_the_processor_shows(name, size):
    """Read off the processed picture itself which column and row its pixels came from."""
    processor, (width, height) = PROCESSORS[name], size
    pixels = processor(ramps(*size), do_normalize=False, return_tensors="np")["pixel_values"][0]
    x0, y0, x1, y1 = shown_box(processor, size)
    rows, cols = pixels.shape[1:]
    read = 0
    for row, col in [
        (rows // 2, cols // 4),
        (rows // 2, 3 * cols // 4),
        (rows // 4, cols // 2),
        (3 * rows // 4, cols // 2),
    ]:
        x = x0 + (col + 0.5) / cols * (x1 - x0)
        y = y0 + (row + 0.5) / rows * (y1 - y0)
        if 1 < x < width - 1 and 1 < y < height - 1:
            red, green = pixels[0, row, col] * width, pixels[1, row, col] * height
            assert (red, green) == pytest.approx((x, y), abs=max(size) / 255 + 0.6)
            read += 1
    assert read >= 2


@pytest.mark.parametrize("size", [(200, 80), (81, 200)])
def test_processors_that_tile_or_take_any_size_show_the_whole_picture(size):
    for processor in (LlavaNextImageProcessorPil(**CLIP), Qwen2VLImageProcessorPil()):
        assert shown_box(processor, size) == (0, 0, *size)


def test_a_padded_square_reaches_beyond_the_picture():
    assert shown_box(PROCESSORS["llava-pad"], (200, 80)) == pytest.approx((0, -60, 200, 140))
