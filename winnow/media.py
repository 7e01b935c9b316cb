"""Open untrusted pictures: the result is an upright RGB ``PIL.Image``, or a ``MediaError``.

Nothing else in winnow opens a picture, and processors only ever see what this module has decoded.

- Formats: PNG, JPEG, WebP, GIF, BMP, told by their first bytes, never by a name or a MIME type. No other parser runs.
- Limits are checked on the header, before Pillow sees the bytes: a refused bomb costs no memory.
- Errors carry our own text only: no library message, no address, no path, no content.
- No global of Pillow (``MAX_IMAGE_PIXELS``, ``LOAD_TRUNCATED_IMAGES``) or of ``warnings`` is touched: safe in threads.
  A program that sets ``LOAD_TRUNCATED_IMAGES`` itself has asked Pillow for half pictures, and gets them here too.

How pixels become RGB: EXIF orientation is applied, a broken EXIF ignored; alpha, palette transparency and colour keys
are composed on white; 16-bit grey is divided by 257 and rounded (16-bit colour keeps its high byte); CMYK and YCbCr by
Pillow's formulas, without colour profiles; modes ``I`` and ``F`` are refused, because their range is not known. Of an
animation the first frame is taken. A PNG that lacks only its closing IEND chunk has all its pixels and is accepted.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import os
import re
import stat
import struct
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from itertools import islice
from typing import IO, Any, TypeVar

import numpy as np
from PIL import Image

from winnow.core.errors import WinnowError
from winnow.media_headers import foreign_format, header_size, picture_format

T = TypeVar("T")

_PILLOW_WARNS_ABOVE = 89_478_485  # pixels; Pillow's own bomb warning must stay out of reach
_ALLOWED = "PNG, JPEG, WebP, GIF or BMP"
_STATUS = {"too_large": 413, "unsupported_format": 415}
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_GREY16_TO_8 = ((np.arange(65_536, dtype=np.uint32) + 128) // 257).astype(np.uint8)


class MediaError(WinnowError):
    """A picture or a video that winnow will not take.

    ``code`` is one of ``bad_type``, ``bad_url``, ``bad_base64``, ``unreadable_file``, ``invalid_image``,
    ``truncated_image``, ``unsupported_format``, ``unsupported_mode``, ``too_large``, ``bad_size``, ``bad_shape``,
    ``bad_dtype``, ``bad_values``, ``too_many_images``; for videos also ``invalid_video``, ``truncated_video``,
    ``no_video``, ``no_frames``, ``too_many_frames``, ``too_slow``. ``status`` is the HTTP status that fits it (400, 413
    or 415).
    """

    def __init__(self, message: str, code: str = "invalid_image") -> None:
        super().__init__(message)
        self.code = code

    @property
    def status(self) -> int:
        return _STATUS.get(self.code, 400)


@dataclass(frozen=True)
class Limits:
    """What a picture may be; each limit is checked as early as it can be. The defaults suit a server."""

    max_pixels: int = 32_000_000  # width × height, from the header; at most 89,478,485 (96 MB as RGB at the default)
    max_bytes: int = 32 * 2**20  # of the encoded picture, before it is read
    max_base64: int = 44 * 2**20  # characters of a base64 text or data: URL, before it is decoded
    min_side: int = 1  # pixels
    max_side: int = 16_384  # pixels
    max_aspect: int = 200  # long side ÷ short side; Qwen's processors fail above it
    max_total_pixels: int = 256_000_000  # of all pictures of one open_images call (768 MB as RGB)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise WinnowError(f"Limits({field.name}={value!r}): give a whole number of at least 1")
        if self.max_pixels > _PILLOW_WARNS_ABOVE:
            raise WinnowError(f"Limits(max_pixels={self.max_pixels}): give at most {_PILLOW_WARNS_ABOVE}")


_DEFAULT = Limits()


def open_image(source: Any, *, limits: Limits = _DEFAULT) -> Image.Image:
    """Return ``source`` as a new, upright ``PIL.Image`` of mode RGB without metadata, or raise ``MediaError``.

    ``source`` is a local path (str or PathLike), encoded bytes, a binary file (read from its start where it can seek),
    a ``PIL.Image``, or a numpy array or torch tensor of shape (height, width, 3), uint8 or floating point in [0, 1].
    A ``str`` is a path given by the *local* user: never pass on one that came over a network (``open_base64`` is for
    those). A ``PIL.Image`` keeps the decoder that its owner opened it with; the size limits still hold.
    """
    if isinstance(source, Image.Image):
        check_size(*source.size, limits)
        return _upright_rgb(source)
    if isinstance(source, np.ndarray) or _is_tensor(source):
        return _from_array(source, limits)
    return _decode(_read(source, limits), limits)


def open_images(sources: object, *, max_images: int = 64, limits: Limits = _DEFAULT) -> list[Image.Image]:
    """Open an iterable of sources, in order; none is opened if there are more than ``max_images``. None give ``[]``."""
    one = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image, io.IOBase, np.ndarray)
    if isinstance(sources, one) or _is_tensor(sources) or not isinstance(sources, Iterable):
        raise MediaError(f"got one {type(sources).__name__}: give a list of pictures", "bad_type")
    if isinstance(max_images, bool) or not isinstance(max_images, int) or max_images < 0:
        raise WinnowError(f"max_images={max_images!r}: give a whole number of at least 0")
    given = list(islice(sources, max_images + 1))
    if len(given) > max_images:
        raise MediaError(f"got more than {max_images} pictures; at most {max_images} are allowed", "too_many_images")
    images: list[Image.Image] = []
    pixels = 0
    for number, source in enumerate(given, start=1):
        try:
            images.append(open_image(source, limits=limits))
        except MediaError as refused:
            refused.args = (f"picture {number} of {len(given)}: {refused}",)
            raise
        pixels += images[-1].width * images[-1].height
        if pixels > limits.max_total_pixels:
            raise MediaError(f"the pictures have more than {limits.max_total_pixels} pixels together", "too_large")
    return images


def open_base64(text: object, *, limits: Limits = _DEFAULT) -> Image.Image:
    """Open base64 text (RFC 4648 §4: standard alphabet, padded, no line breaks), or a ``data:`` URL that holds it.

    Anything that a JSON request may hold can be handed in: what is not such a text is refused. The MIME type of a URL
    is not believed: the content decides.
    """
    return open_image(base64_bytes(text, limits.max_base64), limits=limits)


def base64_bytes(text: object, longest: int, kind: str = "image") -> bytes:
    """The bytes of what `open_base64` takes, whatever they hold.

    Args:
        longest: characters of the text.
        kind: image or video, for what is said of a wrong URL.
    """
    if not isinstance(text, str):
        raise MediaError(f"got {type(text).__name__}: give base64 as text", "bad_type")
    if len(text) > longest:
        raise MediaError(f"got {len(text)} characters; at most {longest} are allowed", "too_large")
    payload = text
    if text[:5].lower() == "data:":
        head, _, payload = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise MediaError(f"the data: URL must read data:{kind}/…;base64,…", "bad_base64")
    if len(payload) % 4 or not re.fullmatch(r"[A-Za-z0-9+/]*={0,2}", payload):  # b64decode is laxer, by Python version
        malformed = "not valid base64: use A–Z a–z 0–9 + / with = padding, and no line breaks or blanks"
        raise MediaError(malformed, "bad_base64")
    return base64.b64decode(payload)


def fingerprint(image: Image.Image) -> str:
    """256-bit BLAKE2b, as hex, of the mode, width, height and pixels of a picture that ``open_image`` returned."""
    if not isinstance(image, Image.Image) or image.mode != "RGB":
        raise MediaError("fingerprint takes an RGB picture: open it with open_image first", "bad_type")
    pixels = _attempt(image.tobytes, MediaError("the picture has no readable pixels", "truncated_image"))
    head = struct.pack(">16sQQ", image.mode.encode(), *image.size)  # without the sizes, 30×100 would equal 100×30
    return hashlib.blake2b(head + pixels, digest_size=32, person=b"winnow.media").hexdigest()


def _attempt(step: Callable[[], T], otherwise: MediaError) -> T:
    """Run ``step``; raise ``otherwise`` for whatever it raises, outside ``except``: no library text rides along."""
    try:
        return step()
    except MediaError:
        raise
    except (MemoryError, Image.DecompressionBombError):
        otherwise = MediaError("the picture needs too much memory", "too_large")
    except Exception:  # noqa: S110 — decoders raise anything on hostile bytes; `otherwise` speaks for all of it
        pass
    raise otherwise


def _read(source: Any, limits: Limits) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        buffer = _attempt(lambda: memoryview(source), MediaError("the buffer has been released", "bad_type"))
        _check_bytes(buffer.nbytes, limits)
        return bytes(buffer)
    if isinstance(source, str):
        check_local(source)
    if isinstance(source, (str, os.PathLike)):
        unreadable = MediaError("the given path is not a readable file", "unreadable_file")
        return _attempt(lambda: _read_path(source, limits), unreadable)
    if hasattr(source, "read"):
        unreadable = MediaError("the file object cannot be read", "unreadable_file")
        return _attempt(lambda: _read_stream(source, limits), unreadable)
    wanted = "a path, bytes, a binary file, a PIL image, or an array of shape (height, width, 3)"
    raise MediaError(f"got {type(source).__name__}: give {wanted}", "bad_type")


def check_local(path: str) -> None:
    """Refuse a text that is a URL or a network path and no local one."""
    if re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]+:|//|\\\\)", path):
        raise MediaError(
            "got a URL or network path, and nothing is fetched: give a local path (./a:b.png where it holds a colon), "
            "or bytes; data: URLs go through open_base64",
            "bad_url",
        )


def _read_path(path: str | os.PathLike[str], limits: Limits) -> bytes:
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):  # a FIFO would block, a device never ends
        raise MediaError("the given path is not a regular file", "unreadable_file")
    _check_bytes(about.st_size, limits)
    with open(path, "rb") as file:
        return _read_stream(file, limits)


def _read_stream(file: IO[bytes], limits: Limits) -> bytes:
    with contextlib.suppress(AttributeError, OSError):  # a pipe is read from where it is
        file.seek(0)
    data = bytearray()
    while part := file.read(limits.max_bytes + 1 - len(data)):
        if not isinstance(part, bytes):
            raise MediaError("the file gives text: open it in binary mode", "bad_type")
        data += part
        _check_bytes(len(data), limits)
    return bytes(data)


def _check_bytes(count: int, limits: Limits) -> None:
    if count > limits.max_bytes:
        raise MediaError(f"the picture has more than the {limits.max_bytes} bytes that are allowed", "too_large")


def check_size(width: int, height: int, limits: Limits = _DEFAULT) -> None:
    """Refuse a picture of a size that is not allowed, by a ``MediaError``."""
    if width * height > limits.max_pixels:
        raise MediaError(
            f"the picture has {width} × {height} pixels; at most {limits.max_pixels} in all are allowed", "too_large"
        )
    short, long = sorted((width, height))
    if short < limits.min_side or long > limits.max_side or long > limits.max_aspect * short:
        raise MediaError(
            f"the picture is {width} × {height}: sides must have {limits.min_side} to {limits.max_side} pixels, "
            f"and the long side at most {limits.max_aspect} times the short one",
            "bad_size",
        )


def _decode(data: bytes, limits: Limits) -> Image.Image:
    name = picture_format(data)
    if name is None:
        if foreign := foreign_format(data):
            raise MediaError(f"{foreign} is not supported: give {_ALLOWED}", "unsupported_format")
        raise MediaError(f"this is not a picture ({len(data)} bytes): give {_ALLOWED}")
    size = _attempt(lambda: header_size(data, name), MediaError(f"the {name} header of the picture cannot be read"))
    check_size(*size, limits)
    damaged = MediaError("the picture is cut off or damaged", "truncated_image")
    image = _attempt(lambda: Image.open(io.BytesIO(data), formats=[name]), damaged)
    check_size(*image.size, limits)
    if name == "PNG":
        _scale_colour_key(image, depth=data[24])
    return _upright_rgb(image)


def _scale_colour_key(image: Image.Image, depth: int) -> None:
    """Bring a PNG's transparent colour to 8 bits, as Pillow does with the samples of 2-, 4- and 16-bit files."""
    key = image.info.get("transparency")
    if image.mode == "L" and depth in (2, 4) and isinstance(key, int):
        image.info["transparency"] = key * 255 // (2**depth - 1)
    elif image.mode == "RGB" and depth == 16 and isinstance(key, tuple):
        image.info["transparency"] = tuple(sample >> 8 for sample in key)


def _upright_rgb(image: Image.Image) -> Image.Image:
    _attempt(image.load, MediaError("the picture is cut off or damaged", "truncated_image"))
    rgb = _attempt(lambda: _to_rgb(image), MediaError("the colours of the picture cannot be read", "unsupported_mode"))
    orientation = None
    with contextlib.suppress(Exception):  # a broken EXIF must not cost the picture
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    if isinstance(orientation, int) and orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    rgb.info = {}
    return rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        samples = np.asarray(image)
        rgb = Image.fromarray(_GREY16_TO_8[samples]).convert("RGB")
        if isinstance(key := image.info.get("transparency"), int):
            rgb.paste("white", mask=Image.fromarray(samples == key))
        return rgb
    if image.mode in ("I", "F"):
        raise MediaError(
            f"a picture of mode {image.mode} has no stated range: convert it to L, RGB or I;16", "unsupported_mode"
        )
    if image.has_transparency_data:
        straight = image.convert("LA") if image.mode == "La" else image  # Pillow has no way from La to RGBA
        rgba = straight.convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(rgba, mask=rgba.getchannel("A"))
        return rgb
    return image.convert("RGB")


def _is_tensor(source: object) -> bool:
    torch = sys.modules.get("torch")  # who has a tensor has imported torch; nobody else waits for it
    return torch is not None and isinstance(source, torch.Tensor)


def _from_array(source: Any, limits: Limits) -> Image.Image:
    shape = _attempt(lambda: tuple(int(n) for n in source.shape), MediaError("the array has no shape", "bad_shape"))
    if len(shape) != 3 or shape[2] != 3:
        channels_first = len(shape) == 3 and shape[0] in (1, 3, 4)
        hint = "; if its channels are first, move them last with .permute(1, 2, 0)" if channels_first else ""
        raise MediaError(f"got an array of shape {shape}: give (height, width, 3){hint}", "bad_shape")
    check_size(shape[1], shape[0], limits)
    if _is_tensor(source):
        sparse = MediaError(f"the tensor of shape {shape} holds no dense values that can be read", "bad_type")
        source = _attempt(lambda: _tensor_to_numpy(source), sparse)
    source = np.asarray(source)  # without a subclass: a mask would hide values from the checks below
    if source.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(source))
    if source.dtype.kind != "f":
        raise MediaError(
            f"got an array of {source.dtype}, shape {shape}: give uint8, or floating point in [0, 1]", "bad_dtype"
        )
    low, high = float(source.min()), float(source.max())
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise MediaError(
            f"got values from {low:g} to {high:g} in an array of {source.dtype}, shape {shape}: a floating-point "
            "picture lies in [0, 1], without NaN or infinity",
            "bad_values",
        )
    return Image.fromarray(np.rint(source.astype(np.float32, copy=False) * 255).astype(np.uint8))


def _tensor_to_numpy(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()  # numpy has no bfloat16
