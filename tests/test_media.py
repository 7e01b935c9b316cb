"""What the media door refuses: no pictures, cut ones, bombs, odd sizes, foreign formats. Also its threads and errors.

Numbers in test names are rows of the project's fault list: I1 to I5 and I9 here, the others in the files beside it.
"""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import media_assets as assets
import numpy as np
import pytest
from media_assets import FORMATS, encoded, forbid_parsers, picture, pixels, refused
from PIL import Image, ImageFile

import winnow
from winnow.core.errors import WinnowError
from winnow.media import Limits, MediaError, fingerprint, open_image
from winnow.media_headers import header_size, picture_format

PACKAGE = Path(winnow.__file__).parent


@pytest.fixture
def no_parser(monkeypatch):
    forbid_parsers(monkeypatch)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        encoded("PNG")[:10],
        encoded("JPEG")[:10],
        encoded("WEBP")[:10],
        encoded("GIF")[:8],
        encoded("BMP")[:10],
        b"BMW and other plain text, named .png by its owner",
        b"GIF8 is how some text begins, and it goes on for a while",
        b"<!DOCTYPE html><html><body>404 <svg></svg></body></html>",
        np.random.default_rng(0).bytes(1000),
        bytes(1000),
    ],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_I1_not_a_picture_is_refused_without_library_text(data, as_file, tmp_path):
    (tmp_path / "a.png").write_bytes(data)
    assert refused(tmp_path / "a.png" if as_file else data).code == "invalid_image"


def test_I1_pillow_still_puts_an_address_into_its_message():  # vLLM CVE-2026-22778: why library text never goes out
    with pytest.raises(Exception, match="0x"):
        Image.open(io.BytesIO(b"plain text"))


@pytest.mark.parametrize("name", FORMATS)
def test_I2_truncation_is_found_by_loading(name):
    data = encoded(name, width=64, height=48)
    cut = data[: len(data) // 2]
    if name != "WEBP":  # Pillow's WebP reader needs the whole file even to open it
        assert Image.open(io.BytesIO(cut)).size == (64, 48)  # opening alone finds nothing
    error = refused(cut)
    assert (error.code, error.status) == ("truncated_image", 400)


def test_I3_png_without_its_end_chunk_is_accepted():
    data = encoded("PNG")
    assert data[-12:] == assets.chunk(b"IEND")
    assert pixels(data[:-12]) == pixels(data)


BOMB_SIDES = (9_400, 13_000, 20_000)


@pytest.mark.parametrize("side", BOMB_SIDES)
def test_I4_header_bomb_is_refused_before_decode(side, no_parser):
    data = assets.png_bomb(side)
    assert len(data) < 150_000
    error = refused(data)
    assert (error.code, error.status) == ("too_large", 413)
    assert f"{side} × {side}" in str(error)


@pytest.mark.parametrize("name", assets.huge_headers(16_000))
def test_I4_every_format_is_judged_by_its_header(name, no_parser):
    assert refused(assets.huge_headers(16_000)[name]).code == "too_large"


@pytest.mark.parametrize("name", assets.huge_headers(300))
def test_I4_the_size_in_each_header_is_exact(name):
    data = assets.huge_headers(300)[name]
    assert header_size(data, picture_format(data)) == (300, 300)


@pytest.mark.parametrize("name", ["png", "jpeg", "gif", "bmp", "webp lossless"])
def test_I4_the_header_is_read_as_pillow_reads_it(name):

    for size in [(1, 1), (24, 16), (300, 7)]:
        data = encoded(name.split()[0].upper(), width=size[0], height=size[1])
        assert header_size(data, picture_format(data)) == size == Image.open(io.BytesIO(data)).size


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0" + assets.exif(1)}])
def test_I4_the_header_of_each_kind_of_webp_is_read(options):
    data = assets.encode(picture(37, 21), "WEBP", **options)
    assert header_size(data, "WEBP") == open_image(data, limits=Limits(max_pixels=37 * 21)).size == (37, 21)
    assert refused(data, limits=Limits(max_pixels=37 * 21 - 1)).code == "too_large"


MEMORY_PROBE = """
import sys
from pathlib import Path
from winnow.media import MediaError, open_image

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

codes, before = [], peak()
for name in sys.argv[1:]:
    try:
        open_image(name)
        codes.append("accepted")
    except MediaError as error:
        codes.append(error.code)
print(peak() - before, *codes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_I4_refused_bombs_cost_no_memory(tmp_path):
    def grown(*sides: int) -> tuple[int, list[str]]:
        files = [tmp_path / f"{side}.png" for side in sides]
        for file, side in zip(files, sides, strict=True):
            file.write_bytes(assets.png_bomb(side))
        command = [sys.executable, "-c", MEMORY_PROBE, *map(str, files)]
        output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent).stdout.split()
        return int(output[0]) // 1024, output[1:]

    megabytes, codes = grown(*BOMB_SIDES)
    assert codes == ["too_large"] * 3
    assert megabytes < 50
    megabytes, codes = grown(5_600)  # the probe does see a decoded picture: 31 M pixels are allowed
    assert codes == ["accepted"]
    assert megabytes > 90


@pytest.mark.parametrize("side", BOMB_SIDES)
def test_I4_no_bomb_warning_and_no_global_is_touched(side):
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        inside = list(warnings.filters)
        refused(assets.png_bomb(side))
        assert list(warnings.filters) == inside
    assert not seen
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before


@pytest.mark.parametrize("kind", ["bytes", "bytearray", "memoryview", "path", "file", "pipe"])
def test_I4_the_file_size_is_checked(kind, tmp_path):
    data = encoded("PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)

    def source():
        if kind == "pipe":
            read_end, write_end = os.pipe()
            os.write(write_end, data)
            os.close(write_end)
            return os.fdopen(read_end, "rb")
        made = {"path": lambda: path, "file": lambda: io.BytesIO(data), "bytearray": lambda: bytearray(data)}
        return made.get(kind, lambda: memoryview(data) if kind == "memoryview" else data)()

    assert open_image(source(), limits=Limits(max_bytes=len(data))).size == (24, 16)
    error = refused(source(), limits=Limits(max_bytes=len(data) - 1))
    assert (error.code, error.status) == ("too_large", 413)


def test_I4_a_file_that_is_too_large_is_not_even_read(tmp_path, monkeypatch):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(10**12)  # sparse
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("opened"))
    assert refused(tmp_path / "a.png").code == "too_large"


def test_I4_an_endless_file_is_cut_at_the_limit():
    class Endless(io.RawIOBase):
        given = 0

        def read(self, size=-1):
            assert 0 < size <= 1001
            self.given += 7
            return b"x" * 7

    endless = Endless()
    assert refused(endless, limits=Limits(max_bytes=1000)).code == "too_large"
    assert endless.given <= 1001 + 7


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (encoded("PNG")[:33] + assets.chunk(b"teSt") * 70_000 + encoded("PNG")[33:], "PNG chunks"),
        (encoded("PNG")[:-12] + assets.chunk(b"teSt") * 70_000 + assets.chunk(b"IEND"), "PNG chunks after the pixels"),
        (encoded("JPEG")[:2] + b"\xff\xfe\0\2" * 5_000 + encoded("JPEG")[2:], "JPEG comments"),
        (encoded("JPEG")[:2] + b"\xff" * 9_000 + encoded("JPEG")[2:], "JPEG padding"),
        (encoded("JPEG") + b"\xff\xda" * 300, "JPEG scans"),
        (
            assets.gif(1, 1)[:19] + b"!\xfe" + (b"\xff" + b"c" * 255) * 5_000 + b"\0" + assets.gif(1, 1)[19:],
            "GIF blocks",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_I4_floods_of_metadata_blocks_are_refused_unparsed(data, kind, no_parser):
    assert refused(data).code == "invalid_image", kind


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 3), (3, 1), (1, 200), (200, 1)])
@pytest.mark.parametrize("name", FORMATS)
def test_I5_tiny_pictures_keep_their_axes(size, name):  # vLLM CVE-2026-22773: the channel axis was guessed
    image = open_image(encoded(name, width=size[0], height=size[1]))
    assert (image.mode, image.size) == ("RGB", size)
    assert np.asarray(image).shape == (size[1], size[0], 3)


@pytest.mark.parametrize(
    ("size", "limits"),
    [
        ((1, 10_000), Limits()),
        ((10_000, 1), Limits()),
        ((1, 201), Limits()),
        ((20_000, 1_000), Limits()),
        ((27, 60), Limits(min_side=28)),
        ((65, 60), Limits(max_side=64)),
        ((31, 10), Limits(max_aspect=3)),
    ],
)
def test_I5_sides_and_aspect_are_limited(size, limits, no_parser):
    data = assets.PNG_SIGNATURE + assets.ihdr(*size, 8, assets.RGB)
    error = refused(data, limits=limits)
    assert (error.code, error.status) == ("bad_size", 400)
    assert all(f"{n}" in str(error) for n in (*size, limits.min_side, limits.max_side, limits.max_aspect))


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_I5_a_side_of_zero_is_no_picture(size):
    assert refused(assets.PNG_SIGNATURE + assets.ihdr(*size, 8, assets.RGB)).code == "invalid_image"
    assert refused(Image.new("RGB", size)).code == "bad_size"


@pytest.mark.parametrize("name", assets.foreign_files())
def test_I9_other_formats_are_unsupported_and_their_parsers_are_not_called(name, no_parser):
    error = refused(assets.foreign_files()[name])
    assert (error.code, error.status) == ("unsupported_format", 415)
    assert "PNG, JPEG, WebP, GIF or BMP" in str(error)


def test_I9_pillow_would_have_opened_them():
    assert Image.open(io.BytesIO(assets.foreign_files()["tiff"])).size == (8, 8)


@pytest.mark.parametrize("name", FORMATS)
def test_I9_pillow_is_asked_for_one_format_only(name, monkeypatch):
    asked = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda file, **options: (asked.append(options), real(file, **options))[1])
    open_image(encoded(name))
    assert asked == [{"formats": [name]}]


@pytest.mark.parametrize(
    "options", [{"max_pixels": 0}, {"max_bytes": -1}, {"max_side": 1.5}, {"min_side": True}, {"max_aspect": "3"},
                {"max_pixels": 90_000_000}]
)  # fmt: skip
def test_limits_are_checked(options):
    with pytest.raises(WinnowError, match=next(iter(options))):
        Limits(**options)


def test_an_error_survives_pickling():
    error = pickle.loads(pickle.dumps(refused(assets.png_bomb(9_400))))
    assert (error.code, error.status, "9400" in str(error)) == ("too_large", 413, True)


def test_a_decoder_out_of_memory_is_a_refusal(monkeypatch):
    def exhausted(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Image, "open", exhausted)
    assert refused(encoded("PNG")).status == 413


def outcome(data: bytes) -> str:
    try:
        return fingerprint(open_image(data))
    except MediaError as error:
        return error.code


def test_threads_do_not_disturb_each_other():
    good = [encoded(name, width=40 + n, height=30) for n, name in enumerate(FORMATS * 3)]
    bad = [data[: len(data) // 2] for data in good] + [assets.png_bomb(9_400), b"", b"%PDF"]
    alpha = [assets.encode(Image.new("RGBA", (9, 9), (200, 10, n, 99)), "PNG") for n in range(9)]
    work = (good + bad + alpha) * 4
    expected = [outcome(data) for data in work]
    assert len(set(expected)) > 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(outcome, work)) == expected
