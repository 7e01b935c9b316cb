"""Videos, which Qwen2.5-VL takes beside pictures: items of their own kind, with frames in their layout."""

from __future__ import annotations

import pytest
import torch
import zoo
from byhand import Hand, Reference
from cases import CASES, check_against_hand, identities, picking, same
from probes import Look, Pick, Received, forward, generate

import winnow
from winnow.signals.vision import VisionAttention

BUILD = "qwen2_5_vl"
VIDEOS = ("3 V 6", "9", "2 V 4")
BOTH = ("3 V 2 A 6", "2 B 4 V 3 C 5", "4 A 2", "7")


@pytest.mark.parametrize("rows", [VIDEOS, BOTH], ids=["videos", "both"])
def test_keep_all_is_bit_identical(rows):
    model, inputs = zoo.model(BUILD), zoo.inputs(BUILD, rows)
    plain = generate(model, inputs)
    for plan in identities(BUILD):
        with winnow.compress(model, plan):
            assert same(generate(model, inputs), plain), plan


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "folded"])
def test_videos_equal_by_hand(kind):
    """The tower attends within frames."""
    plan, by_hand = CASES[kind]
    check_against_hand(zoo.model(BUILD), zoo.samples(BUILD, VIDEOS), plan, by_hand)


@pytest.mark.parametrize("layer", [0, 2])
def test_videos_among_pictures_equal_by_hand(layer):
    """In any order; the ledger tells which is which."""
    model, parts = zoo.model(BUILD), zoo.samples(BUILD, BOTH)
    method = Pick(keep=5, at=f"layers[{layer}]")
    check_against_hand(model, parts, method, lambda r, s, e: Hand(e, {layer: picking(e, 5)}))
    with winnow.compress(model, method) as handle:
        forward(model, zoo.collate(parts))
        items = handle.last.items
    for row, kinds in enumerate((["video", "image"], ["image", "video", "image"], ["image"], [])):
        assert [item.modality for item in items if item.row == row] == kinds


def test_the_layout_of_a_video_has_its_frames():
    look = Look(needs=(VisionAttention(1, query="all"),))
    model, part = zoo.model(BUILD), zoo.sample(BUILD, "3 V 6")
    with winnow.compress(model, look):
        forward(model, part)
    (view,) = look.views
    assert view.layout.place[:, 1].tolist() == [0] * 12 + [1] * 12
    vision = Reference(model).vision(part)
    assert (view[look.needs[0]][0] - vision.received[1][0].mean(0)).abs().max() <= 1e-6


def test_positions_in_time_are_kept():
    """Text behind a video stands behind its last second, also when only one token of it is left."""
    model, parts = zoo.model(BUILD), zoo.samples(BUILD, VIDEOS)
    entry = Reference(model).entry(parts[0])
    assert len(set(entry.positions[0, 0, entry.content[0]].tolist())) == 2
    check_against_hand(model, parts, Pick(keep=1), lambda r, s, e: Hand(e, {0: picking(e, 1)}))


def test_batches_of_videos_and_pictures_are_their_samples_alone():
    model, parts = zoo.model(BUILD), zoo.samples(BUILD, BOTH)
    with winnow.compress(model, Received(keep=6)):
        together = forward(model, zoo.collate(parts)).logits[:, -1]
        alone = torch.cat([forward(model, part).logits[:, -1] for part in parts])
    assert (together - alone).abs().max() <= 1e-5
