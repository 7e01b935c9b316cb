"""Scenes: the same bytes from the same seed, valid records, splits that do not meet."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from world_bytes import digests

from winnow import world
from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.world.scenes import SEEDS_PER_SPLIT

DIGEST = """
import hashlib
from winnow import world
digest = hashlib.sha256()
for seed in range(25):
    for size in (224, 336):
        drawn = world.scene(seed, size)
        digest.update(drawn.pixels.tobytes())
        digest.update(repr((drawn.objects, drawn.questions)).encode())
print(digest.hexdigest())
"""


def test_the_same_seed_gives_the_same_bytes_in_two_processes(capsys):
    own, other = digests(DIGEST, capsys)
    assert len(own) == 64
    assert own == other


def test_questions_and_places_of_version_1_have_not_changed():
    """What questions say and where things lie must stay as it is, or `VERSION` must be raised (and this digest)."""
    digest = hashlib.sha256()
    for seed in range(40):
        drawn = world.scene(seed, 224, "test")
        digest.update(repr((drawn.questions, [(i.kind, i.name, i.box) for i in drawn.objects])).encode())
    assert world.VERSION == 1
    assert digest.hexdigest()[:16] == "29a3cd7e5c80cad0"


def check_records(drawn: world.Scene) -> None:
    """Boxes lie in the picture, things do not overlap, partners point at each other, evidence is among the boxes."""
    size = drawn.size
    assert drawn.pixels.shape == (size, size, 3)
    assert drawn.pixels.dtype == np.uint8
    taken = np.zeros((size, size), int)
    boxes = set()
    for item in drawn.objects:
        box = item.box
        boxes.add(box)
        assert 0 <= box.x0 < box.x1 <= size, (drawn.seed, item)
        assert 0 <= box.y0 < box.y1 <= size, (drawn.seed, item)
        if item.alpha is not None:
            assert item.alpha.shape == (box.y1 - box.y0, box.x1 - box.x0)
        if item.partner is not None:
            assert item.partner.partner is item
        if item.kind in ("glyph", "shape", "clutter", "panel") or (item.partner and item.partner.kind != "text"):
            taken[box.y0 : box.y1, box.x0 : box.x1] += 1
    assert taken.max() <= 1, f"scene {drawn.seed}: things overlap"
    for question in drawn.questions:
        assert question.type in world.TYPES
        assert question.answer
        assert set(question.evidence) <= boxes
        if question.answer not in ("no", "0"):
            assert question.evidence, question


@pytest.mark.parametrize("size", [224, 336])
@pytest.mark.parametrize("split", world.SPLITS)
def test_records_are_valid(size, split):
    for seed in range(60):
        check_records(world.scene(seed, size, split))


@pytest.mark.full
def test_records_of_ten_thousand_scenes_are_valid():
    for seed in range(10_000):
        check_records(world.scene(seed, 224, world.SPLITS[seed % 3], per_type=2))


def test_splits_have_seeds_of_their_own():
    pictures = {world.scene(7, split=split).pixels.tobytes() for split in world.SPLITS}
    assert len(pictures) == len(world.SPLITS)
    last, first = world.scene(SEEDS_PER_SPLIT - 1, split="train"), world.scene(0, split="test")
    assert last.pixels.tobytes() != first.pixels.tobytes()
    with pytest.raises(WinnowError, match="outside"):
        world.scene(SEEDS_PER_SPLIT, split="train")


def test_there_are_enough_glyphs_and_some_are_held_out():
    assert len(set(world.GLYPHS)) >= 200
    assert len(world.HELD_OUT) >= 20
    assert set(world.GLYPHS) >= world.HELD_OUT


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"split": "validation"}, "train, test, heldout_glyphs"),
        ({"size": 225}, "224, 336"),
        ({"seed": -1}, "outside"),
        ({"types": ("colour",)}, "presence"),
    ],
)
def test_mistakes_are_explained(arguments, said):
    with pytest.raises(WinnowError, match=said):
        world.scene(**({"seed": 0} | arguments))


def test_evidence_falls_on_the_right_patches_at_two_resolutions():
    box = world.Box(28, 14, 56, 42)  # columns 2 and 3, rows 1 and 2 of 14-pixel patches
    coarse = world.evidence_mask([box], 224, 16)
    assert coarse.shape == (16, 16)
    assert sorted(map(tuple, np.argwhere(coarse))) == [(1, 2), (1, 3), (2, 2), (2, 3)]
    fine = world.evidence_mask([box], 224, 32)
    assert np.array_equal(fine, np.kron(coarse, np.ones((2, 2), bool)))
    tall = world.evidence_mask([box], 224, 16, 8)
    assert sorted(map(tuple, np.argwhere(tall))) == [(1, 1), (2, 1)]


def test_no_evidence_is_lost_on_a_coarse_grid():
    tiny = world.Box(100, 100, 104, 103)
    assert world.evidence_mask([tiny], 224, 4).sum() == 1
    for seed in range(40):
        drawn = world.scene(seed, 336)
        for question in drawn.questions:
            mask = world.evidence_mask(question.evidence, 336, 24)
            assert mask.any() == bool(question.evidence)


def test_evidence_goes_through_a_layout():
    drawn = next(s for s in (world.scene(seed) for seed in range(50)) if s.questions and s.questions[0].evidence)
    evidence = drawn.questions[0].evidence
    layout = Layout.grid(16, 16, cls=True, newline=True)
    covered = layout.covering(world.fractions(evidence, drawn.size))
    assert np.array_equal(covered.reshape(16, 16), world.evidence_mask(evidence, drawn.size, 16))
