"""Whatever bytes arrive: an RGB picture or a MediaError, never another exception."""

from __future__ import annotations

import media_assets as assets
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from media_assets import FORMATS, encoded, picture
from PIL import Image

from winnow.media import Limits, MediaError, open_base64, open_image

SEEDS = [encoded(name) for name in FORMATS] + [
    assets.encode(picture(), "JPEG", progressive=True),
    assets.encode(picture(), "WEBP"),
    assets.png([[1000, 65_535]], assets.GREY, 16),
    assets.png([[0, 1]], assets.PALETTE, extra=assets.chunk(b"PLTE", bytes(6)) + assets.chunk(b"tRNS", bytes([0, 9]))),
    assets.gif(1, 1, frames=3),
    assets.png_of(picture(4, 4), extra=assets.chunk(b"eXIf", assets.exif(6))),
    assets.encode(Image.new("CMYK", (8, 8)), "JPEG"),
]


def opened(data: bytes) -> Image.Image | None:
    """The picture, or None if it was refused; any other exception fails the test."""
    try:
        image = open_image(data, limits=Limits(max_pixels=1_000_000))
    except MediaError:
        return None
    assert (image.mode, type(image)) == ("RGB", Image.Image)
    return image


@pytest.mark.parametrize("seed", range(len(SEEDS)))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fuzz_a_cut_anywhere_is_refused_or_harmless(seed):
    whole = np.asarray(opened(SEEDS[seed])).astype(int)
    accepted = 0
    for cut in range(len(SEEDS[seed])):
        image = opened(SEEDS[seed][:cut])
        if image is not None:
            accepted += 1
            assert np.array_equal(np.asarray(image).astype(int), whole), cut
    assert accepted <= 50  # only what follows the pixels may be missing


@given(st.binary(max_size=400), st.sampled_from([b"", *{seed[:n] for seed in SEEDS for n in (4, 16, 33, 60)}]))
@example(b"\0" * 20, b"BM")
@settings(max_examples=600, deadline=None)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fuzz_random_bytes(tail, head):
    opened(head + tail)
    opened(tail)


@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=8),
)
@settings(max_examples=800, deadline=None)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fuzz_overwritten_bytes(seed, changes):
    data = bytearray(seed)
    for place, value in changes:
        data[place % len(data)] = value
    opened(bytes(data))


@given(st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_fuzz_base64_text(text):
    for value in (text, "data:image/png;base64," + text, "data:" + text):
        with pytest.raises(MediaError):
            open_base64(value)
