"""What comes out of the media door: colours (I6), upright (I7), first frames (I8), identity (I10, I11)."""

from __future__ import annotations

import io
import re
import zlib
from fractions import Fraction

import media_assets as assets
import numpy as np
import pytest
from media_assets import FORMATS, encoded, picture, pixels, refused
from PIL import GifImagePlugin, Image

from winnow.media import fingerprint, open_image

WHITE, BLACK, RED, BLUE = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 0, 255)


def grey(value: int) -> tuple[int, int, int]:
    return (value, value, value)


def over_white(colour: tuple[int, ...], alpha: int) -> tuple[int, ...]:
    return tuple(int(Fraction(c * alpha + 255 * (255 - alpha), 255) + Fraction(1, 2)) for c in colour)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_I6_grey_of_few_bits_spans_black_to_white(depth):
    top = 2**depth - 1
    values = sorted({0, 1, top // 2, top})
    assert pixels(assets.png([values], assets.GREY, depth)) == [[grey(v * 255 // top) for v in values]]


def test_I6_grey_of_16_bits_is_scaled_not_clamped():
    values = [0, 1, 128, 129, 257, 1000, 32_767, 32_768, 65_406, 65_407, 65_535]
    expected = [grey(int(Fraction(v, 257) + Fraction(1, 2))) for v in values]
    assert expected[5] == grey(4)
    assert pixels(assets.png([values], assets.GREY, 16)) == [expected]
    assert (
        Image.open(io.BytesIO(assets.png([values], assets.GREY, 16))).convert("RGB").getpixel((5, 0)) == WHITE
    )  # clamp


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_I6_images_of_16_bits_in_either_byte_order(mode):
    raw = np.array([[1000, 65_535]], dtype=">u2" if mode == "I;16B" else "<u2").tobytes()
    assert pixels(Image.frombytes(mode, (2, 1), raw)) == [[grey(4), WHITE]]


@pytest.mark.parametrize("alpha", [0, 1, 127, 128, 254, 255])
def test_I6_alpha_is_composed_on_white(alpha):
    colour = (200, 10, 97)
    assert pixels(assets.png([[*colour, alpha]], assets.RGBA)) == [[over_white(colour, alpha)]]
    assert pixels(assets.png([[97, alpha]], assets.GREY_ALPHA)) == [[over_white(grey(97), alpha)]]
    assert pixels(Image.new("RGBA", (1, 1), (*colour, alpha))) == [[over_white(colour, alpha)]]
    assert pixels(Image.new("LA", (1, 1), (97, alpha))) == [[over_white(grey(97), alpha)]]
    assert pixels(assets.encode(Image.new("RGBA", (1, 1), (*colour, alpha)), "WEBP", lossless=True, exact=True)) == [
        [over_white(colour, alpha)]
    ]


def test_I6_hidden_colours_stay_hidden():
    data = assets.png([[255, 0, 0, 0]], assets.RGBA)
    assert Image.open(io.BytesIO(data)).convert("RGB").getpixel((0, 0)) == RED  # what is avoided
    assert pixels(data) == [[WHITE]]


@pytest.mark.parametrize(("mode", "expected"), [("RGBa", (227, 127, 127)), ("La", grey(227))])
def test_I6_premultiplied_alpha(mode, expected):
    stored = {"RGBa": (100, 0, 0, 128), "La": (100, 128)}[mode]  # 100 of 128 shown, the rest white: 100 + 127
    found = pixels(Image.frombytes(mode, (1, 1), bytes(stored)))[0][0]
    assert np.abs(np.subtract(found, expected)).max() <= 1  # un-multiplying rounds


def test_I6_palette_with_and_without_transparency():
    palette = assets.chunk(b"PLTE", bytes((*RED, *BLUE, *BLACK)))
    rows = [[0, 1], [2, 0]]
    assert pixels(assets.png(rows, assets.PALETTE, extra=palette)) == [[RED, BLUE], [BLACK, RED]]
    alphas = palette + assets.chunk(b"tRNS", bytes([0, 128]))
    assert pixels(assets.png(rows, assets.PALETTE, extra=alphas)) == [[WHITE, (127, 127, 255)], [BLACK, WHITE]]
    one = palette + assets.chunk(b"tRNS", bytes([255, 0]))
    assert pixels(assets.png(rows, assets.PALETTE, extra=one)) == [[RED, WHITE], [BLACK, RED]]
    assert pixels(assets.png([[1, 0, 2]], assets.PALETTE, depth=2, extra=palette)) == [[BLUE, RED, BLACK]]


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_I6_transparent_colour_of_a_grey_png(depth):
    top = 2**depth - 1
    key = assets.chunk(b"tRNS", (1).to_bytes(2, "big"))
    assert pixels(assets.png([[0, 1, top]], assets.GREY, depth, extra=key)) == [[BLACK, WHITE, WHITE]]
    key = assets.chunk(b"tRNS", (0).to_bytes(2, "big"))
    assert pixels(assets.png([[0, top, 0]], assets.GREY, depth, extra=key)) == [[WHITE] * 3]


@pytest.mark.parametrize(("depth", "scale", "low"), [(8, 1, 0), (16, 256, 99)])
def test_I6_transparent_colour_of_an_rgb_png(depth, scale, low):
    key = assets.chunk(b"tRNS", b"".join((v * scale + low).to_bytes(2, "big") for v in (10, 20, 30)))
    row = [v * scale + low for v in (10, 20, 30, 10, 20, 31)]
    assert pixels(assets.png([row], assets.RGB, depth, extra=key)) == [[WHITE, (10, 20, 31)]]


def test_I6_colour_of_16_bits_keeps_the_high_byte():
    assert pixels(assets.png([[0x0000, 0x80FF, 0xFFFF]], assets.RGB, 16)) == [[(0x00, 0x80, 0xFF)]]
    assert pixels(assets.png([[0x1234, 0x80FF, 0xFFFF, 0xFFFF]], assets.RGBA, 16)) == [[(0x12, 0x80, 0xFF)]]


@pytest.mark.parametrize("ink", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255), (100, 50, 0, 128), (255, 255, 255, 255)])
def test_I6_cmyk(ink):
    *colours, black = (Fraction(v, 255) for v in ink)
    expected = [int(255 * (1 - c) * (1 - black) + Fraction(1, 2)) for c in colours]
    found = pixels(Image.new("CMYK", (8, 8), ink))[0][0]
    assert np.abs(np.subtract(found, expected)).max() <= 1
    found = pixels(assets.encode(Image.new("CMYK", (8, 8), ink), "JPEG", quality=100, subsampling=0))[4][4]
    assert np.abs(np.subtract(found, expected)).max() <= 4


@pytest.mark.parametrize("ycbcr", [(0, 128, 128), (255, 128, 128), (76, 85, 255), (29, 255, 107), (150, 44, 21)])
def test_I6_ycbcr(ycbcr):
    y, cb, cr = ycbcr[0], ycbcr[1] - 128, ycbcr[2] - 128  # JFIF 1.02
    expected = np.clip([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], 0, 255)
    found = pixels(Image.new("YCbCr", (2, 2), ycbcr))[0][0]
    assert np.abs(np.subtract(found, expected)).max() <= 1.5


def test_I6_two_levels():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert pixels(image) == [[BLACK, WHITE]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_I6_modes_without_a_defined_conversion_are_refused(mode):
    error = refused(Image.new(mode, (2, 2)))
    assert (error.code, error.status) == ("unsupported_mode", 400)


@pytest.mark.parametrize("name", FORMATS)
def test_I6_each_format_gives_the_pixels_that_went_in(name):
    reduced = picture().quantize(64).convert("RGB") if name == "GIF" else picture()
    data = assets.encode(reduced, name, **({"lossless": True} if name == "WEBP" else {}))
    found, expected = np.asarray(open_image(data)).astype(int), np.asarray(reduced).astype(int)
    assert np.abs(found - expected).mean() <= (12 if name == "JPEG" else 0)


UPRIGHT = np.array([[RED, BLUE, BLACK], [WHITE, grey(50), grey(100)]], dtype=np.uint8)
STORED = {  # EXIF 2.3, tag 0x0112: on which side of the upright picture the stored row 0 and column 0 lie
    1: UPRIGHT,  # top, left
    2: UPRIGHT[:, ::-1],  # top, right
    3: UPRIGHT[::-1, ::-1],  # bottom, right
    4: UPRIGHT[::-1],  # bottom, left
    5: UPRIGHT.transpose(1, 0, 2),  # left, top
    6: UPRIGHT[:, ::-1].transpose(1, 0, 2),  # right, top
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: UPRIGHT[::-1].transpose(1, 0, 2),  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
def test_I7_exif_orientation_is_applied(orientation):
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    tiff = assets.exif(orientation)
    png = assets.png_of(stored, extra=assets.chunk(b"eXIf", tiff))
    webp = assets.encode(stored, "WEBP", lossless=True, exif=b"Exif\0\0" + tiff)
    for source in (png, webp, Image.open(io.BytesIO(png))):
        assert np.array_equal(np.asarray(open_image(source)), UPRIGHT)
    jpeg = assets.jpeg_with_exif(assets.encode(stored.resize((stored.width * 16, stored.height * 16), 0), "JPEG"), tiff)
    turned = open_image(jpeg)
    assert turned.size == (48, 32)
    centres = np.asarray(turned)[8::16, 8::16].astype(int)
    assert np.abs(centres - UPRIGHT).max() < 30


def test_I7_an_upright_picture_is_not_turned_again():
    png = assets.png_of(Image.fromarray(np.ascontiguousarray(STORED[6])), extra=assets.chunk(b"eXIf", assets.exif(6)))
    once = open_image(png)
    assert np.array_equal(np.asarray(open_image(once)), UPRIGHT)


@pytest.mark.parametrize(
    "tiff",
    [
        b"",
        b"\0",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"garbage" * 9,
        assets.exif(0),
        assets.exif(9),
        assets.exif(65_535),
        assets.exif(6)[:-8],
        assets.exif(6, kind=2),
        assets.exif(6, kind=99),
        assets.exif(6, count=0xFFFFFFFF),
        np.random.default_rng(0).bytes(200),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow grumbles about the EXIF
def test_I7_broken_exif_is_ignored(tiff):
    data = assets.png_of(picture(), extra=assets.chunk(b"eXIf", tiff))
    assert np.array_equal(np.asarray(open_image(data)), np.asarray(picture()))
    assert open_image(assets.jpeg_with_exif(encoded("JPEG"), tiff)).size == (24, 16)


def test_I7_huge_metadata_does_not_harm():
    large = np.random.default_rng(0).bytes(3_000_000)
    profile = b"icc\0\0" + zlib.compress(large[:900_000])
    for extra in (assets.chunk(b"iCCP", profile), assets.chunk(b"tEXt", b"Comment\0" + large)):
        assert np.array_equal(np.asarray(open_image(assets.png_of(picture(), extra=extra))), np.asarray(picture()))
    assert open_image(assets.encode(picture(), "JPEG", icc_profile=large)).size == (24, 16)


def test_I7_a_compressed_text_bomb_is_refused():
    bomb = assets.chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50_000_000), 9))
    assert refused(assets.png_of(picture(), extra=bomb)).code == "truncated_image"


def test_I8_ten_thousand_frames_are_not_counted(monkeypatch):
    data = assets.gif(1, 1, frames=10_000)
    sought = []
    seek = GifImagePlugin.GifImageFile._seek
    monkeypatch.setattr(
        GifImagePlugin.GifImageFile,
        "_seek",
        lambda self, frame, update_image=True: (sought.append(frame), seek(self, frame, update_image))[1],
    )
    assert pixels(data) == [[BLACK]]  # the second frame is white
    assert sought == [0]
    assert Image.open(io.BytesIO(data)).n_frames == 10_000  # they are really there


@pytest.mark.parametrize(
    ("name", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("PNG", {"default_image": True})]
)
def test_I8_the_first_frame_is_taken(name, options):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "black", "white")]
    data = assets.encode(frames[0], name, save_all=True, append_images=frames[1:], **options)
    opened = Image.open(io.BytesIO(data))
    assert opened.n_frames == 4
    assert pixels(data) == [[RED] * 4] * 4


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["black", "white", "teal", "noise"])
def test_I10_uniform_and_noisy_pictures_open_alike_twice(name, kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    data = assets.encode(noise if kind == "noise" else Image.new("RGB", (16, 16), kind), name)
    first, second = open_image(data), open_image(data)
    assert first is not second
    assert fingerprint(first) == fingerprint(second)
    if kind in ("black", "white"):
        assert first.getcolors() == [(256, BLACK if kind == "black" else WHITE)]


def test_I11_fingerprint_tells_swapped_sides_apart():  # vLLM GHSA-c65p-x677-fgj6
    wide, tall = Image.new("RGB", (100, 30)), Image.new("RGB", (30, 100))
    assert wide.tobytes() == tall.tobytes()
    assert fingerprint(wide) != fingerprint(tall)


def test_I11_fingerprint_is_full_width_and_of_the_content_only():
    found = fingerprint(open_image(encoded("PNG")))
    assert re.fullmatch(r"[0-9a-f]{64}", found)
    assert found == fingerprint(open_image(encoded("BMP"))) == fingerprint(picture())
    other = picture()
    other.putpixel((23, 15), (0, 0, 0))
    assert found != fingerprint(other)


@pytest.mark.parametrize("image", [Image.new("L", (2, 2)), Image.new("RGBA", (2, 2)), b"bytes", None])
def test_I11_fingerprint_takes_opened_pictures_only(image):
    assert refused(image, fingerprint).code == "bad_type"
