"""Scenes as files: rows that can be read back, pictures that say where they come from."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from winnow import world
from winnow.core.errors import WinnowError
from winnow.media import open_image


def test_an_export_can_be_read_back(tmp_path):
    lines = world.export(tmp_path / "scenes", n=6, split="test", seed=3)
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    scenes = {f"test-{seed:06d}.png": world.scene(seed, split="test") for seed in range(3, 9)}
    expected = [
        {
            "image": name,
            "question": q.text,
            "answer": q.answer,
            "type": q.type,
            "evidence": [list(box) for box in q.evidence],
        }
        for name, drawn in scenes.items()
        for q in drawn.questions
    ]
    assert rows == expected
    for name, drawn in scenes.items():
        assert np.array_equal(np.asarray(open_image(lines.parent / name)), drawn.pixels)


def test_an_export_is_not_written_over(tmp_path):
    world.export(tmp_path, n=1)
    with pytest.raises(WinnowError, match="another folder"):
        world.export(tmp_path, n=1)
    with pytest.raises(WinnowError, match="at least 1"):
        world.export(tmp_path / "none", n=0)


def test_a_picture_says_where_it_comes_from(tmp_path):
    lines = world.export(tmp_path, n=1, size=336, split="heldout_glyphs", seed=5)
    file = next(tmp_path.glob("*.png"))
    found = world.origin(file)
    assert found == world.origin(file.read_bytes())
    again = world.scene(found.seed, found.size, found.split)
    assert np.array_equal(np.asarray(open_image(file)), again.pixels)
    assert world.origin(lines) is None


@pytest.mark.parametrize(
    "data",
    [b"", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n\x00\x00\x00\x05tEXtwinnow-world\x00{", b"\xff\xd8\xff\xe0JFIF"],
)
def test_other_bytes_have_no_origin(data):
    assert world.origin(data) is None


def test_other_pictures_have_no_origin(tmp_path):
    Image.new("RGB", (224, 224), "red").save(tmp_path / "red.png")
    assert world.origin(tmp_path / "red.png") is None
    with pytest.raises(WinnowError, match="cannot read"):
        world.origin(tmp_path / "absent.png")


def test_a_contact_sheet_shows_the_scenes(tmp_path):
    path = world.show(tmp_path / "sheet.png", n=5, columns=3, seed=2)
    sheet = np.asarray(open_image(path))
    assert sheet.shape == (2 * (224 + 156), 3 * (224 + 8), 3)
    assert np.array_equal(sheet[4:228, 4:228], world.scene(2, split="test").pixels)
    outlined = np.asarray(open_image(world.show(tmp_path / "boxes.png", n=5, columns=3, seed=2, boxes=True)))
    assert not np.array_equal(sheet, outlined)
