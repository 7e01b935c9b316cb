"""Format and size in pixels of an encoded picture, read from its header without a decoder.

``winnow.media`` asks here before Pillow sees a byte, so that a bomb is refused by its header. Each walk visits the
blocks that Pillow would visit before the first frame, takes the largest size that any of them states (a GIF frame may
be larger than its screen, a second header may overrule the first), and gives up after a number of blocks that no
encoder writes: Pillow's own walk costs time linear, in places quadratic, in that number.
"""

from __future__ import annotations

import struct

_MAX_SEGMENTS = 4096  # blocks before the first frame of a JPEG or GIF
_MAX_PNG_CHUNKS = 65_536  # pixel data included: encoders write chunks of about 8 KiB
_MAX_JPEG_SCANS = 256  # each scan of a progressive JPEG is a pass over the picture; encoders write about 10

_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
}
_FOREIGN_MAGIC = {
    b"%!PS": "EPS",
    b"\xc5\xd0\xd3\xc6": "EPS",
    b"%PDF": "PDF",
    b"8BPS": "PSD",
    b"SIMPLE  =": "FITS",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\0\0\1\0": "ICO",
}


def picture_format(data: bytes) -> str | None:
    """PNG, JPEG, GIF, BMP or WEBP, by the first bytes; None for anything else."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in _MAGIC.items() if data.startswith(magic)), None)


def foreign_format(data: bytes) -> str | None:
    """The name of a well-known format that winnow does not take, for the message that says so."""
    text = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<svg") or (text.startswith(b"<?xml") and b"<svg" in text):
        return "SVG"
    if data[4:8] == b"ftyp":
        return "AVIF, HEIC or MP4"
    return next((name for magic, name in _FOREIGN_MAGIC.items() if data.startswith(magic)), None)


def header_size(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) in pixels of a picture of format ``name``; ValueError, IndexError or struct.error without one."""
    width, height = _SIZE[name](data)
    if not (width and height):
        raise ValueError("no size in the header")
    return width, height


def _png_size(data: bytes) -> tuple[int, int]:
    width, height, at = 0, 0, 8
    for _ in range(_MAX_PNG_CHUNKS):
        if at + 8 > len(data):
            return width, height
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IHDR":
            w, h = struct.unpack_from(">II", data, at + 8)
            width, height = max(width, w), max(height, h)
        if kind in (b"IEND", b"fdAT"):  # the first frame ends here
            return width, height
        at += 12 + length
    raise ValueError("too many chunks")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    if data.count(b"\xff\xda") > _MAX_JPEG_SCANS:
        raise ValueError("too many scans")
    width, height, at = 0, 0, 2
    for _ in range(_MAX_SEGMENTS):
        at = data.index(b"\xff", at, at + _MAX_SEGMENTS) + 1
        marker = data[at]
        if marker == 0xDA:  # start of scan
            return width, height
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            h, w = struct.unpack_from(">HH", data, at + 4)
            width, height = max(width, w), max(height, h)
        if 0xC0 <= marker <= 0xFE and not 0xD0 <= marker <= 0xD9:  # the other markers stand alone
            at += 1 + int.from_bytes(data[at + 1 : at + 3], "big")
    raise ValueError("too many segments")


def _gif_size(data: bytes) -> tuple[int, int]:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    in_extension = False
    for _ in range(_MAX_SEGMENTS):
        if in_extension:  # sub-blocks of up to 255 bytes, closed by an empty one
            in_extension = data[at] != 0
            at += 1 + data[at]
        elif data[at] == 0x2C:  # the first frame
            x, y, w, h = struct.unpack_from("<4H", data, at + 1)
            return max(width, x + w), max(height, y + h)
        elif data[at] == 0x21:
            in_extension, at = True, at + 2
        else:
            at += 1
    raise ValueError("too many blocks")


def _bmp_size(data: bytes) -> tuple[int, int]:
    (length,) = struct.unpack_from("<I", data, 14)
    if length not in (12, 40, 52, 56, 64, 108, 124):  # else a text that begins with "BM" would be a huge picture
        raise ValueError("not a bitmap header")
    width, height = struct.unpack_from("<HH" if length == 12 else "<ii", data, 18)
    return abs(width), abs(height)  # a negative height means top-down


def _webp_size(data: bytes) -> tuple[int, int]:
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if data[12:16] == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


_SIZE = {"PNG": _png_size, "JPEG": _jpeg_size, "GIF": _gif_size, "BMP": _bmp_size, "WEBP": _webp_size}
