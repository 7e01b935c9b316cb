"""Pictures and non-pictures for the media tests, written byte by byte: no asset file, and no encoder to trust."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from winnow.media import MediaError, open_image

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP"]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # PNG colour types
_SAMPLES = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}


def chunk(kind: bytes, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def ihdr(width: int, height: int, depth: int, colour: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def png(
    rows: Sequence[Sequence[int]], colour: int = RGB, depth: int = 8, extra: bytes = b"", after: bytes = b""
) -> bytes:
    """A PNG from rows of samples (the channels of a pixel one after another), with ``extra`` chunks before the data."""
    raw = bytearray()
    for row in rows:
        bits = "".join(f"{sample:0{depth}b}" for sample in row)
        bits += "0" * (-len(bits) % 8)
        raw += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    width = len(rows[0]) // _SAMPLES[colour]
    data = chunk(b"IDAT", zlib.compress(bytes(raw)))
    return PNG_SIGNATURE + ihdr(width, len(rows), depth, colour) + extra + data + after + chunk(b"IEND")


def png_of(image: Image.Image, extra: bytes = b"") -> bytes:
    pixels = list(image.convert("RGB").tobytes())
    step = 3 * image.width
    return png([pixels[at : at + step] for at in range(0, len(pixels), step)], extra=extra)


def png_bomb(side: int) -> bytes:
    """A black 1-bit PNG of side × side pixels: kilobytes that decode to hundreds of megabytes."""
    squeeze = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    data = b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush()
    return PNG_SIGNATURE + ihdr(side, side, 1, GREY) + chunk(b"IDAT", data) + chunk(b"IEND")


def exif(orientation: int, kind: int = 3, count: int = 1) -> bytes:
    """A little-endian TIFF directory that holds the orientation tag only (``kind`` 3 is SHORT)."""
    return b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, kind, count, orientation, 0, 0)


def jpeg_with_exif(jpeg: bytes, tiff: bytes) -> bytes:
    payload = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


def encode(image: Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def gif(width: int, height: int, frames: int = 1, frame_size: tuple[int, int] | None = None) -> bytes:
    """Frames of one pixel value (black, white, black, …), LZW-coded by hand: clear, pixel, end, for 1×1 frames only."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    w, h = frame_size or (width, height)
    body = bytearray()
    for number in range(frames):
        code = 4 | (number % 2) << 3 | 5 << 6  # 3-bit codes, least significant first: clear=4, pixel, end=5
        body += b"," + struct.pack("<HHHHB", 0, 0, w, h, 0) + b"\x02\x02" + struct.pack("<H", code) + b"\0"
    return head + bytes(body) + b";"


def huge_headers(side: int) -> dict[str, bytes]:
    """One header per format that claims side × side pixels (at most 16,383, what WebP can say), without any pixels."""
    big = struct.pack(">HH", side, side)
    vp8x = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (side - 1).to_bytes(3, "little") * 2
    vp8l = b"VP8L" + struct.pack("<IB", 5, 0x2F) + struct.pack("<I", (side - 1) | (side - 1) << 14)
    vp8 = b"VP8 " + struct.pack("<I", 10) + b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", side, side)
    frame = b"\xff\xc0\0\x11\x08" + big + b"\x03\x01\x22\0\x02\x11\x01\x03\x11\x01"
    small_frame = frame.replace(big, struct.pack(">HH", 8, 8))
    info = struct.pack("<IiiHHIIiiII", 40, side, -side, 1, 24, 0, 0, 0, 0, 0, 0)
    core = struct.pack("<IHHHH", 12, side, side, 1, 24)
    return {
        "png": PNG_SIGNATURE + ihdr(side, side, 8, RGB),
        "png with a second header": PNG_SIGNATURE + ihdr(8, 8, 8, RGB) + ihdr(side, side, 8, RGB),
        "jpeg": b"\xff\xd8\xff\xe0\0\x04JF" + frame + b"\xff\xda",
        "jpeg with a second frame": b"\xff\xd8" + frame + small_frame + b"\xff\xda",
        "gif": gif(side, side),
        "gif frame larger than its screen": gif(8, 8, frame_size=(side, side)),
        "bmp": b"BM" + bytes(12) + info,
        "bmp of OS/2": b"BM" + bytes(12) + core,
        "webp extended": b"RIFF" + struct.pack("<I", len(vp8x) + 4) + b"WEBP" + vp8x,
        "webp lossless": b"RIFF" + struct.pack("<I", len(vp8l) + 4) + b"WEBP" + vp8l,
        "webp lossy": b"RIFF" + struct.pack("<I", len(vp8) + 4) + b"WEBP" + vp8,
    }


def foreign_files() -> dict[str, bytes]:
    """Formats that winnow does not take; the ones that Pillow can write are complete and valid."""
    picture = Image.new("RGB", (8, 8), "red")
    return {
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>',
        "svg with a declaration": b"\xef\xbb\xbf <?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>",
        "eps": encode(picture, "EPS"),
        "pdf": encode(picture, "PDF"),
        "psd": b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(14),
        "fits": b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800),
        "jpeg 2000": encode(picture, "JPEG2000"),
        "jpeg 2000 codestream": encode(picture, "JPEG2000", no_jp2=True),
        "tiff": encode(picture, "TIFF"),
        "big-endian tiff": b"MM\0*\0\0\0\x08" + bytes(64),
        "ico": encode(picture, "ICO", sizes=[(8, 8)]),
        "mp4": b"\0\0\0\x18ftypisom" + bytes(64),
    }


def picture(width: int = 24, height: int = 16) -> Image.Image:
    """A picture in which every pixel differs from its neighbours, so that cuts and turns show."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 9 % 256, y * 13 % 256, (x * 7 + y * 5) % 256], axis=-1).astype(np.uint8))


def encoded(name: str, **size: int) -> bytes:
    return encode(picture(**size), name, **({"lossless": True} if name == "WEBP" else {}))


def refused(source: object, door=open_image, **options) -> MediaError:
    """The error with which ``source`` is refused, after checking that it carries nothing but our own text."""
    with pytest.raises(MediaError) as caught:
        door(source, **options)
    error = caught.value
    assert error.status in (400, 413, 415)
    assert not re.search(r"0x[0-9a-f]|_io\.|object at|PIL\.|Traceback|Errno|/tmp|\.py", str(error))
    assert error.__cause__ is None
    assert error.__context__ is None
    return error


def pixels(source: object) -> list[list[tuple[int, ...]]]:
    image = open_image(source)
    assert (image.mode, type(image), image.info) == ("RGB", Image.Image, {})
    return [[tuple(int(v) for v in pixel) for pixel in row] for row in np.asarray(image)]


def forbid_parsers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any call of Pillow's ``open`` from here on fails the test."""

    def opened(*_, **__):
        pytest.fail("a parser was called")

    monkeypatch.setattr(Image, "open", opened)
