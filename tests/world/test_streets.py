"""Drives: a seed is a drive, boxes are where things are drawn, and frames of reference fit together."""

from __future__ import annotations

import math

import numpy as np
import pytest

from winnow.world import streets
from winnow.world.streets import drive, project


def test_a_seed_is_a_drive_and_splits_share_none():
    first, again, other = drive(3), drive(3), drive(3, split="test")
    assert all(np.array_equal(a.images, b.images) and a.things == b.things for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0].images, other[0].images)
    assert first[0].images.shape == (4, 64, 64, 3)
    assert [frame.time for frame in first] == [0, 0.5, 1.0]


@pytest.mark.parametrize("camera", range(4))
def test_what_lies_straight_ahead_of_a_camera_is_in_its_middle(camera):
    angle = camera * math.pi / 2
    assert project((5 * math.cos(angle), 5 * math.sin(angle), streets.HEIGHT), camera) == pytest.approx((32, 32, 5))
    left = angle + 0.3
    column, row, _ = project((5 * math.cos(left), 5 * math.sin(left), streets.HEIGHT + 1), camera)
    assert column < 32
    assert row < 32


def test_boxes_hold_what_is_drawn_and_nothing_else_differs():
    with_things = drive(5)[0]
    box_of = {(thing.number, camera): box for thing in with_things.things for camera, box in thing.boxes.items()}
    assert box_of
    for thing in with_things.things:
        for camera, box in thing.boxes.items():
            column, row, depth = project(thing.center, camera)
            assert depth > 0
            if 0 <= column < 64 and 0 <= row < 64:
                assert box.x0 - 1 <= column <= box.x1 + 1
                assert box.y0 - 1 <= row <= box.y1 + 1
            assert with_things.images[camera, box.y0 : box.y1, box.x0 : box.x1].std() > 0


def test_things_move_by_their_velocity_in_a_world_that_stays():
    for seed in range(5):
        here, there = drive(seed)[:2]
        for thing in here.things:
            after = next((own for own in there.things if own.number == thing.number), None)
            if after is None:
                continue
            c, s = math.cos(there.yaw), math.sin(there.yaw)
            x = thing.center[0] + thing.velocity[0] * 0.5 - there.position[0]
            y = thing.center[1] + thing.velocity[1] * 0.5 - there.position[1]
            assert after.center[:2] == pytest.approx((c * x + s * y, c * y - s * x), abs=1e-6)
            assert after.center[2] == thing.center[2]
