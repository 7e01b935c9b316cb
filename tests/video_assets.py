"""Videos for the tests, written by PyAV in the test: frames that say which they are by their brightness."""

from __future__ import annotations

import io
import struct
import tempfile
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

TICKS = 1000  # of a second


def frames(n: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """`[n, height, width, 3]`: frame i is grey, of brightness `shade(i, n)`."""
    wide, high = size
    levels = np.array([shade(i, n) for i in range(n)], np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (n, high, wide, 3)).copy()


def shade(i: int, n: int) -> int:
    return 20 + 210 * i // max(1, n - 1)


def which(pixels: np.ndarray, n: int) -> list[int]:
    """The numbers of frames, told by their brightness."""
    shades = np.array([shade(i, n) for i in range(n)])
    return [int(np.abs(shades - frame.mean()).argmin()) for frame in pixels]


def clip(
    pixels: np.ndarray,
    *,
    fps: float = 8,
    ticks: int = TICKS,
    times: Sequence[float] | None = None,
    codec: str = "libx264",
    container: str = "mp4",
    gop: int = 12,
    sound: bool = False,
    faststart: bool = False,
) -> bytes:
    """A video file of these frames.

    Args:
        ticks: of a second, in which times are written.
        faststart: whether the index of an MP4 stands in front.
    """
    shown = [i / fps for i in range(len(pixels))] if times is None else times
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made"
        with av.open(str(path), "w", format=container, options={"movflags": "faststart"} if faststart else {}) as out:
            stream = out.add_stream(codec, rate=ticks)
            stream.height, stream.width = pixels.shape[1:3]
            stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p", "ffv1": "bgr0"}.get(codec, "yuv420p")
            stream.codec_context.gop_size = gop
            stream.codec_context.time_base = Fraction(1, ticks)
            if codec == "libx264":
                stream.options = {"preset": "ultrafast", "sc_threshold": "0", "crf": "10"}
            audio = out.add_stream("aac", rate=8000) if sound else None
            for frame, time in zip(pixels, shown, strict=True):
                drawn = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=stream.pix_fmt)
                drawn.pts, drawn.time_base = round(time * ticks), Fraction(1, ticks)
                out.mux(stream.encode(drawn))
            out.mux(stream.encode())
            if audio is not None:
                _hum(out, audio)
        return path.read_bytes()


def sound_alone() -> bytes:
    made = io.BytesIO()
    with av.open(made, "w", format="mp4") as out:
        _hum(out, out.add_stream("aac", rate=8000))
    return made.getvalue()


def _hum(out: Any, stream: Any) -> None:
    wave = (8000 * np.sin(np.arange(8000) / 9)).astype(np.int16)[None]
    heard = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
    heard.sample_rate, heard.pts = 8000, 0
    out.mux(stream.encode(heard))
    out.mux(stream.encode())


def remuxed(source: bytes, stamps: Iterable[tuple[int, bytes]], container: str = "matroska") -> bytes:
    """A file with the stream of another, and packets of the given times (in milliseconds) and contents."""
    made = io.BytesIO()
    with av.open(io.BytesIO(source)) as given, av.open(made, "w", format=container) as out:
        stream = out.add_stream_from_template(given.streams.video[0])
        for stamp, data in stamps:
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, Fraction(1, TICKS)
            packet.pts = packet.dts = stamp
            packet.is_keyframe = True
            out.mux(packet)
    return made.getvalue()


def packets(source: bytes) -> list[bytes]:
    with av.open(io.BytesIO(source)) as given:
        return [bytes(packet) for packet in given.demux(given.streams.video[0]) if packet.size]


def boxes(data: bytes, kind: bytes) -> list[int]:
    """Where the contents of boxes of an MP4 begin."""
    found, at = [], data.find(kind)
    while at >= 0:
        found.append(at + 4)
        at = data.find(kind, at + 4)
    return found


def turned(data: bytes, quarter: int) -> bytes:
    """An MP4 whose first track is to be shown turned by quarters to the right."""
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarter % 4]
    matrix = struct.pack(">9i", cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    at = boxes(data, b"tkhd")[0] + 40  # version 0: the matrix stands behind 40 bytes
    return data[:at] + matrix + data[at + 36 :]


def ebml(name: int, *parts: bytes) -> bytes:
    """An element of a Matroska file, with an 8-byte size."""
    body = b"".join(parts)
    tag = name.to_bytes((name.bit_length() + 7) // 8, "big")
    return tag + (1 << 56 | len(body)).to_bytes(8, "big") + body


def many_tracks(count: int) -> bytes:
    """A Matroska file that lists this many video tracks and holds garbage."""
    head = ebml(0x1A45DFA3, ebml(0x4282, b"matroska"), ebml(0x4287, b"\4"), ebml(0x4285, b"\2"))
    video = ebml(0xE0, ebml(0xB0, b"\x10"), ebml(0xBA, b"\x10"))
    tracks = [
        ebml(0xAE, ebml(0xD7, n.to_bytes(4, "big")), ebml(0x73C5, n.to_bytes(4, "big")), ebml(0x83, b"\1"),
             ebml(0x86, b"V_VP8"), video)
        for n in range(1, count + 1)
    ]  # fmt: skip
    info = ebml(0x1549A966, ebml(0x2AD7B1, (1_000_000).to_bytes(4, "big")))
    cluster = ebml(0x1F43B675, ebml(0xE7, b"\0"), ebml(0xA3, b"\x81\0\0\x80garbage"))
    return head + ebml(0x18538067, info, ebml(0x1654AE6B, *tracks), cluster)
