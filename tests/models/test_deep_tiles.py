"""Adapters of tiled classes: layouts are those of the model's packing, and signals lie at the tokens they belong to."""

from __future__ import annotations

from dataclasses import dataclass

import builds
import numpy as np
import pytest
import torch
from probes import Look, Pick, forward
from torch import Tensor
from towers_byhand import CLASSES, Towers

import winnow
from winnow.core.info import ModelInfo
from winnow.core.layout import CLS, CONTENT
from winnow.core.signal import Signal, Site
from winnow.signals.vision import VisionAttention, VisionKeys, VisionSignal

TILED = sorted(CLASSES)
ROWS = ("3 A 6", "11", "2 B 4 C 5", "1 C 2")
VIDEOS = ("2 V 3", "2 A 3 V 4")


@dataclass(frozen=True)
class After(VisionSignal):
    """The rows that a block gives."""

    def site(self, info: ModelInfo) -> Site:
        return Site("vision", self.block(info), "hidden")

    def read(self, seen) -> Tensor:
        return seen.after


@dataclass(frozen=True)
class Projected(Signal):
    """The rows that the connector gives."""

    def site(self, info: ModelInfo) -> Site:
        return Site("projector", 0, "hidden")

    def read(self, seen) -> Tensor:
        return seen.after


@dataclass(frozen=True)
class Brightness(Signal):
    """The mean of a token's pixels."""

    def site(self, info: ModelInfo) -> Site:
        return Site("pixels", 0, "hidden")

    def read(self, seen) -> Tensor:
        return seen.patches.mean(-1)


def rows_of(build):
    return ROWS + (VIDEOS if "V" in build.letters else ())


def shown(model, inputs, needs=()):
    """The ledger's items of one forward, with the tokens and signals that each was shown with, in order."""
    look = Look(needs=tuple(needs))
    with winnow.compress(model, look) as handle:
        forward(model, inputs)
        items = handle.last.items
    groups: dict = {}
    for number, item in enumerate(items):
        groups.setdefault(item.layout, []).append(number)
    order = [number for group in groups.values() for number in group]
    lanes = [
        (view.tokens[lane], {signal: view[signal][lane] for signal in needs})
        for view in look.views
        for lane in range(view.b)
    ]
    assert len(lanes) == len(items)
    return [(items[number], *lanes[order.index(number)]) for number in range(len(items))]


def placeholders(model, ids):
    tokens = [getattr(model.config, f"{m}_token_id", None) for m in ("image", "video")]
    return torch.stack([ids == token for token in tokens if token is not None]).any(0)


@pytest.mark.parametrize("name", TILED)
def test_layouts_are_the_models_own(name):
    """As many tokens as placeholders; tiles of one run are one item; content is what the connector's rows stand on."""
    build = builds.every()[name]
    model, rows = build.model(), rows_of(build)
    inputs = build.batch(rows)
    found = shown(model, inputs, (Projected(),))
    held = placeholders(model, inputs["input_ids"])
    for row in range(len(rows)):
        own = [item.layout.n for item, *_ in found if item.row == row]
        assert sum(own) == int(held[row].sum())
    for item, tokens, signals in found:
        layout = item.layout
        assert tokens.shape[0] == layout.n_content == item.n_visual
        assert (signals[Projected()] - tokens).abs().max() <= 1e-5
        cells = layout.cell[layout.kind == CONTENT]
        assert len(set(cells.tolist())) == layout.n_content
        assert (cells >= 0).all()
    if CLASSES[name].modalities == ("image",) and name not in ("mistral3", "mistral3_full"):
        edges = torch.nn.functional.pad(held, (1, 0))
        starts = int((edges[:, 1:] & ~edges[:, :-1]).sum())
        assert starts == len(found)  # an item is a run


@pytest.mark.parametrize("name", TILED)
def test_boxes_tile_the_picture(name):
    build = builds.every()[name]
    for item, *_ in shown(build.model(), build.batch(rows_of(build))):
        layout = item.layout
        content = layout.kind == CONTENT
        boxes, place = layout.boxes[content], layout.place[content]
        known = ~np.isnan(boxes).any(1)
        assert known.any()
        for grid in {tuple(p) for p in place[known][:, :2]}:
            own = known & (place[:, :2] == grid).all(1)
            area = (boxes[own, 2] - boxes[own, 0]) * (boxes[own, 3] - boxes[own, 1])
            assert area.sum() == pytest.approx(1)
            assert len({tuple(p) for p in place[own]}) == own.sum()
            down, across = place[own][:, 2], place[own][:, 3]
            assert (np.argsort(boxes[own, 1], kind="stable") == np.argsort(down, kind="stable")).all()
            assert (np.argsort(boxes[own, 0], kind="stable") == np.argsort(across, kind="stable")).all()


def check_block(name, block):
    """All signals of one block in a batch of unequal pictures, against each sample alone in an eager tower."""
    build = builds.every()[name]
    model, how = build.model(), CLASSES[name]
    rows = rows_of(build)
    samples = build.samples(rows)
    received, keys, after = VisionAttention(block, "all"), VisionKeys(block), After(block)
    needs = [received, keys, after, Brightness()]
    if how.prefix:
        needs.append(cls := VisionAttention(block, "cls"))
    found = shown(model, build.collate(samples), needs)
    towers = Towers(name, model)
    for row, sample in enumerate(samples):
        expected: dict[Signal, list[Tensor]] = {signal: [] for signal in needs}
        for modality in how.modalities:
            seen = towers.run(sample, modality, block)
            if seen is None:
                continue
            did, pixels, inputs = seen
            values = {
                received: towers.received(did, inputs),
                keys: towers.joined([k[:, how.prefix :] for k in did.keys]),
                after: towers.joined([x[:, how.prefix :] for x in did.after]),
                Brightness(): pixels,
            }
            if how.prefix:
                values[cls] = towers.joined([w.mean(1)[:, 0, 1:] for w in did.weights])
            for signal, value in values.items():
                expected[signal].append(towers.tokens(inputs, modality, value))
        own = [signals for item, _, signals in found if item.row == row]
        for signal in needs:
            if not own:
                assert not expected[signal]
                continue
            got = torch.cat([signals[signal] for signals in own])
            assert got.shape == torch.cat(expected[signal]).shape
            assert (got - torch.cat(expected[signal])).abs().max() <= 2e-5, signal


@pytest.mark.parametrize("name", TILED)
def test_signals_of_the_tower_equal_eager_cell_for_cell(name):
    check_block(name, 1)


@pytest.mark.full
@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("name", TILED)
def test_signals_of_other_blocks_equal_eager_cell_for_cell(name, block):
    check_block(name, block)


def kept(model, inputs, plan):
    with winnow.compress(model, plan) as handle:
        forward(model, inputs)
        return [(item.row, item.n_visual, item.ids.tolist()) for item in handle.last.items]


PLANS = ("divprune:keep=5", "hiprune:keep=5", "fastervlm:keep=5", "fastv:layer=2,keep=5")


@pytest.mark.parametrize("plan", ["hiprune:keep=5", pytest.param("divprune:keep=40%", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", TILED)
def test_a_budget_is_kept_and_a_batch_equals_its_rows(name, plan):
    build = builds.every()[name]
    model, samples = build.model(), build.samples(rows_of(build))
    found = kept(model, build.collate(samples), plan)
    for _, n, ids in found:
        wanted = min(n, 5) if plan.endswith("5") else max(1, int(0.4 * n + 0.5))
        assert len(set(ids)) == len(ids) == wanted
    singles = [(row, n, ids) for row, sample in enumerate(samples) for _, n, ids in kept(model, sample, plan)]
    assert found == singles


@pytest.mark.full
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", TILED)
def test_methods_of_every_kind_keep_what_they_promise(name, plan):
    build = builds.every()[name]
    for _, n, ids in kept(build.model(), build.batch(rows_of(build)), plan):
        assert len(set(ids)) == len(ids) == min(n, 5)


@pytest.mark.parametrize("name", TILED)
def test_patches_cannot_leave_before_a_connector_that_merges_them(name):
    with pytest.raises(winnow.UnsupportedError, match=r"features.*projected, layers"):
        winnow.compress(builds.every()[name].model(), Pick(at="features"))


@pytest.mark.parametrize("name", ["internvl", "qianfan_ocr"])
def test_a_budget_is_a_pictures_and_not_a_tiles(name):
    """Also where `generate` repeats rows, and where the caller has encoded before."""
    build = builds.every()[name]
    model, inputs = build.model(), build.batch(("3 A 6", "2 B 4 C 5"))
    with winnow.compress(model, "divprune:keep=7") as handle:
        forward(model, inputs)
        plain = [(item.row, len(item.ids)) for item in handle.last.items]
        model.generate(**inputs, max_new_tokens=2, num_beams=2, do_sample=False)
        beams = [(item.row, len(item.ids)) for item in handle.last.items]
        encoded = model.base_model.get_image_features(inputs["pixel_values"], return_dict=True)
        ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        forward(model, ids, mm_encoder_outputs={"image": encoded})
        reused = [(item.row, len(item.ids)) for item in handle.last.items]
    assert plain == reused == [(0, 7), (1, 7), (1, 7)]
    assert beams == [(0, 7), (1, 7), (2, 7), (2, 7), (3, 7), (3, 7)]


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_the_tower_is_not_looked_at_where_tiles_have_padding(name):
    """Its attention hides padded patches, which signals do not know; other methods run."""
    build = builds.every()[name]
    model, inputs = build.model(), build.batch(("3 A 6", "2 B 4"))
    inputs["pixel_attention_mask"][0, 0, 12:] = 0
    with pytest.raises(winnow.UnsupportedError, match="padding"):
        kept(model, inputs, "hiprune:keep=5")
    assert all(len(ids) == 5 for *_, ids in kept(model, inputs, "divprune:keep=5"))


def test_mergers_of_another_kind_are_refused():
    model = builds.every()["minicpmv4_6"].model()
    model.config.merger_times = 2
    with pytest.raises(winnow.UnsupportedError, match="merger_times=2"):
        winnow.compress(model, "divprune:keep=5")


def test_pictures_of_one_row_are_tiled_alone_only():
    """LLaVA-OneVision: a picture of a row of several is one grid and a newline."""
    build = builds.every()["llava_onevision"]
    found = shown(build.model(), build.batch(("1 A 2", "2 A 2 B 2")))
    tiles = [len(np.unique(item.layout.tiles)) for item, *_ in found]
    assert tiles[0] > 1
    assert tiles[1:] == [1, 1]
    assert [item.layout.n_separators for item, *_ in found[1:]] == [1, 1]


def test_frames_of_a_video_keep_their_class_token_apart():
    build = builds.every()["video_llava"]
    ((item, *_),) = shown(build.model(), build.batch(("2 V 3",)))
    assert (item.layout.kind == CLS).sum() == 3
    assert item.layout.place[item.layout.content][:, 1].tolist() == [frame for frame in range(3) for _ in range(16)]
