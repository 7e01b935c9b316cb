"""What goes into the media door: lists (I12), arrays (I13), base64 (I14, I15), files, URLs (U1); no other door (U7).

I15 (a video of 10⁵ joined JPEG frames) waits for a video door: here is only shown that it does not enter as a picture.
"""

from __future__ import annotations

import ast
import base64
import io
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from media_assets import encode, encoded, forbid_parsers, picture, pixels, refused
from PIL import Image

import winnow
from winnow.core.errors import WinnowError
from winnow.media import Limits, open_base64, open_image, open_images

PACKAGE = Path(winnow.__file__).parent


@pytest.fixture
def no_parser(monkeypatch):
    forbid_parsers(monkeypatch)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_I12_pictures_up_to_the_limit_open_in_order(count):
    sources = [encoded("PNG", width=n + 1, height=4) for n in range(count)]
    assert [image.width for image in open_images(sources, max_images=5)] == list(range(1, count + 1))
    assert len(open_images(iter(sources), max_images=5)) == count


def test_I12_more_than_the_limit_are_refused_unopened(no_parser):
    taken = []
    endless = iter(lambda: taken.append(1) or encoded("PNG"), None)
    error = refused(endless, open_images, max_images=5)
    assert (error.code, error.status) == ("too_many_images", 400)
    assert "5" in str(error)
    assert len(taken) == 6


@pytest.mark.parametrize("limit", [-1, 1.5, "3", True, None])
def test_I12_the_limit_itself_is_checked(limit):
    with pytest.raises(WinnowError, match="max_images"):
        open_images([], max_images=limit)


def test_I12_the_pixels_together_are_limited():
    sources = [picture(10, 10)] * 3
    assert len(open_images(sources, limits=Limits(max_total_pixels=300))) == 3
    assert refused(sources, open_images, limits=Limits(max_total_pixels=299)).code == "too_large"


def test_I12_the_bad_one_of_several_is_named():
    error = refused([picture(), b"not a picture", picture()], open_images)
    assert error.code == "invalid_image"
    assert str(error).startswith("picture 2 of 3: ")


@pytest.mark.parametrize(
    "single", ["a.png", b"x", bytearray(b"x"), Path("a.png"), picture(), io.BytesIO(), np.zeros((2, 4, 4, 3)), None, 3,
               torch.zeros(2, 4, 4, 3)], ids=lambda value: type(value).__name__
)  # fmt: skip
def test_I12_one_picture_is_not_a_list_of_pictures(single):
    assert refused(single, open_images).code == "bad_type"


SHAPES = [(4, 4), (3, 5, 4), (1, 5, 4), (4, 5, 6), (5, 4, 1), (5, 4, 2), (5, 4, 4), (5, 4, 5), (1, 5, 4, 3), (3,), ()]


@pytest.mark.parametrize("make", [np.zeros, torch.zeros], ids=["numpy", "torch"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_I13_wrong_shapes_name_what_was_got_and_what_is_expected(make, shape):
    error = refused(make(shape))
    assert error.code == "bad_shape"
    assert str(shape) in str(error)
    assert "(height, width, 3)" in str(error)
    assert ("permute" in str(error)) == (len(shape) == 3 and shape[0] in (1, 3, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1.01, -0.01, 255.0])
@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "bfloat16"])
def test_I13_values_outside_0_to_1_are_refused(value, kind):
    tensor = torch.full((4, 5, 3), 0.5, dtype=getattr(torch, kind))
    assert open_image(tensor).size == (5, 4)
    tensor[2, 3, 1] = value
    for source in [tensor] if kind == "bfloat16" else [tensor, tensor.numpy()]:
        error = refused(source)
        assert error.code == "bad_values"
        assert "(4, 5, 3)" in str(error)
        assert "[0, 1]" in str(error)


@pytest.mark.parametrize("kind", ["bool", "int8", "int16", "uint16", "int32", "int64", "complex64", "object", "U3"])
def test_I13_wrong_dtypes_are_named(kind):
    error = refused(np.zeros((4, 5, 3), dtype=kind))
    assert error.code == "bad_dtype"
    assert np.dtype(kind).name in str(error) or str(np.dtype(kind)) in str(error)
    if kind in ("bool", "int8", "int32", "int64", "complex64"):
        assert refused(torch.zeros(4, 5, 3, dtype=getattr(torch, kind))).code == "bad_dtype"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble, ">f4"])
def test_I13_every_byte_survives_the_trip_through_floats(dtype):
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    floats = (values.astype(np.float64) / 255).astype(dtype)
    assert np.array_equal(np.asarray(open_image(floats)), values)
    if dtype in (np.float16, np.float32, np.float64):
        assert np.array_equal(np.asarray(open_image(torch.from_numpy(floats).requires_grad_())), values)


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a,
        lambda a: np.asfortranarray(a),
        lambda a: a[::-1][::-1],
        lambda a: a.transpose(2, 0, 1).transpose(1, 2, 0),
        lambda a: torch.from_numpy(a),
        lambda a: torch.from_numpy(a).permute(2, 0, 1).contiguous().permute(1, 2, 0),
        lambda a: torch.from_numpy(a.astype(np.float32) / 255).neg().neg(),
    ],
)
def test_I13_layout_in_memory_does_not_matter(view):
    array = np.asarray(picture())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the array is read-only
        assert np.array_equal(np.asarray(open_image(view(array))), array)


def test_I13_a_mask_does_not_hide_bad_values():
    masked = np.ma.masked_invalid(np.full((4, 5, 3), np.nan))
    masked[0, 0] = 0.5
    assert refused(masked).code == "bad_values"


def test_I13_the_picture_does_not_share_memory_with_the_array():
    array = np.zeros((4, 5, 3), dtype=np.uint8)
    image = open_image(array)
    array[:] = 255
    assert image.getcolors() == [(20, (0, 0, 0))]


def test_I13_a_height_of_three_is_never_taken_for_channels():  # vLLM CVE-2026-22773
    assert open_image(np.zeros((3, 7, 3), dtype=np.uint8)).size == (7, 3)
    assert open_image(np.zeros((1, 1, 3), dtype=np.uint8)).size == (1, 1)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, 5, 3, device="meta"),
        torch.zeros(4, 5, 3).to_sparse(),
        torch.sparse_coo_tensor([[10**9], [0], [0]], [1.0], (4, 5, 3), check_invariants=False),  # CVE-2025-62164
    ],
    ids=["meta", "sparse", "sparse with a wild index"],
)
def test_I13_tensors_without_plain_values_are_refused(tensor):
    assert refused(tensor).code in ("bad_type", "bad_dtype")


@pytest.mark.parametrize("make", [np.empty, torch.empty], ids=["numpy", "torch"])
def test_I13_arrays_obey_the_size_limits(make):
    assert refused(make((6_000, 6_000, 3))).code == "too_large"  # never written: costs no memory
    assert refused(make((0, 5, 3))).code == "bad_size"
    assert "300 × 1" in str(refused(make((1, 300, 3))))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
BASE64 = base64.b64encode(encode(NOISE, "PNG")).decode()  # long enough to hold every letter of the alphabet


@pytest.mark.parametrize(
    "head", ["", "data:image/png;base64,", "data:image/jpeg;base64,", "DATA:;BASE64,", "data:text/html;x=1;base64,"]
)
def test_I14_the_content_decides_not_the_mime_type(head):
    assert np.array_equal(np.asarray(open_base64(head + BASE64)), np.asarray(NOISE))


@pytest.mark.parametrize(
    "text",
    [
        BASE64[:40] + "!" + BASE64[40:],
        BASE64 + "*",
        BASE64.rstrip("=") + "=" * 5,
        BASE64[:-1] if BASE64.endswith("=") else BASE64 + "A",
        BASE64[:76] + "\n" + BASE64[76:],
        BASE64[:76] + "\r\n" + BASE64[76:],
        BASE64 + "\n",
        " " + BASE64,
        BASE64.replace("/", "_").replace("+", "-"),
        "é" + BASE64,
        "\ud800",
        "\0",
        "data:image/png," + BASE64,
        "data:image/png;base64" + BASE64,
        "data:",
        "data:image/png;base64;charset=x," + BASE64,
        "https://example.org/a.png",
        "/etc/passwd",
    ],
)
def test_I14_malformed_base64_is_refused(text):
    error = refused(text, open_base64)
    assert error.status == 400
    assert error.code in ("bad_base64", "invalid_image")
    assert "passwd" not in str(error)


def test_I14_the_url_safe_alphabet_would_matter_here():
    assert set("+/") < set(BASE64)


@pytest.mark.parametrize("text", ["", "data:image/png;base64,"])
def test_I14_empty_base64_is_an_empty_picture(text):
    assert refused(text, open_base64).code == "invalid_image"


@pytest.mark.parametrize("value", [None, 3, b"abc", ["a"], {"url": "a"}, True])
def test_I14_what_is_no_text_is_refused(value):
    assert refused(value, open_base64).code == "bad_type"


def test_I14_the_size_is_checked_before_decoding(monkeypatch):
    monkeypatch.setattr(base64, "b64decode", lambda *_, **__: pytest.fail("decoded"))
    error = refused("A" * 50_000_000, open_base64)
    assert (error.code, error.status) == ("too_large", 413)
    assert refused(BASE64, open_base64, limits=Limits(max_base64=len(BASE64) - 1)).code == "too_large"


def test_I14_the_decoded_bytes_are_limited_too():
    assert refused(BASE64, open_base64, limits=Limits(max_bytes=len(base64.b64decode(BASE64)) - 1)).code == "too_large"


def test_I15_joined_video_frames_do_not_enter_as_a_picture(no_parser):  # vLLM CVE-2026-5497
    frame = base64.b64encode(encoded("JPEG")).decode()
    assert refused("data:video/jpeg;base64," + ",".join([frame] * 1000), open_base64).code == "bad_base64"


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a.png",
        "HTTPS://example.org/a.png",
        " https://example.org/a.png",
        "file:///etc/passwd",
        "ftp://example.org/a.png",
        "gopher://example.org/",
        "javascript:alert(1)",
        "data:image/png;base64,AAAA",
        "s3://bucket/a.png",
        "//example.org/a.png",
        r"\\host\share\a.png",
    ],
)
def test_U1_urls_are_refused_and_nothing_is_opened(url, monkeypatch):
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.setattr("socket.socket", lambda *_, **__: pytest.fail("connected"))
    error = refused(url)
    assert (error.code, error.status) == ("bad_url", 400)
    assert "example" not in str(error)


def test_local_paths_open_as_str_and_as_path(tmp_path):
    path = tmp_path / "käse c:.jpg"  # the name lies about the format
    path.write_bytes(encoded("PNG"))
    assert pixels(str(path)) == pixels(path) == pixels(encoded("PNG"))


def test_paths_that_are_no_regular_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in ("absent.png", ".", "fifo", "loop", "x" * 5_000, "nul\0byte", "\ud800"):
        assert refused(tmp_path / path).code == "unreadable_file"
    assert refused("/dev/zero").code == "unreadable_file"
    assert refused("").code == "unreadable_file"


def test_a_seekable_file_is_read_from_its_start():
    file = io.BytesIO()
    picture().save(file, "PNG")
    assert open_image(file).size == (24, 16)


class Odd:
    """A path that is none, or a file that misbehaves, as told."""

    def __init__(self, **methods):
        self.__dict__.update(methods)

    def read(self, size):
        return self.on_read(size)


def fail(*_):
    raise RuntimeError("0xdeadbeef at /tmp/secret.py")


@pytest.mark.parametrize(
    ("source", "code"),
    [
        (None, "bad_type"),
        (3, "bad_type"),
        (1.5, "bad_type"),
        ([encoded("PNG")], "bad_type"),
        ({"image": 1}, "bad_type"),
        (object(), "bad_type"),
        (open_image, "bad_type"),
        (io.StringIO("text"), "bad_type"),
        (Odd(on_read=lambda size: 3), "bad_type"),
        (Odd(on_read=fail), "unreadable_file"),
        (Odd(on_read=lambda size: b""), "invalid_image"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_wrong_types_are_refused(source, code):
    assert refused(source).code == code


def test_closed_and_released_sources_are_refused(tmp_path):
    closed = io.BytesIO(encoded("PNG"))
    closed.close()
    assert refused(closed).code == "unreadable_file"
    released = memoryview(encoded("PNG"))
    released.release()
    assert refused(released).code == "bad_type"
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG"))
    lazy = Image.open(path)
    lazy.close()
    assert refused(lazy).code == "truncated_image"


def test_any_buffer_of_bytes_will_do():
    data = encoded("PNG")
    spread = np.repeat(np.frombuffer(data, np.uint8), 2)[::2]
    for source in (bytearray(data), memoryview(data), memoryview(spread)):
        assert pixels(source) == pixels(data)


def test_a_given_image_is_neither_changed_nor_shared():
    image = Image.new("RGB", (2, 2))
    image.info["transparency"] = (1, 2, 3)
    opened = open_image(image)
    opened.paste("white", (0, 0, 2, 2))
    assert (image.getcolors(), image.info) == ([(4, (0, 0, 0))], {"transparency": (1, 2, 3)})


def test_a_lazy_image_obeys_the_limits_and_is_checked_by_loading():
    data = encoded("PNG", width=64, height=48)
    assert refused(Image.open(io.BytesIO(data)), limits=Limits(max_pixels=100)).code == "too_large"
    assert refused(Image.open(io.BytesIO(data[: len(data) // 2]))).code == "truncated_image"
    image = Image.new("RGB", (2, 2))
    image.info["transparency"] = "nonsense"
    assert refused(image).code == "unsupported_mode"


def uses_of_other_doors(code: str) -> list[str]:
    """Where a module opens a picture, or hands a string to something that would: names and attributes, by syntax."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute):
            name = f"{ast.unparse(node.value).split('.')[-1]}.{node.attr}"
        elif isinstance(node, ast.ImportFrom):
            names = [f"{(node.module or '').split('.')[-1]}.{alias.name}" for alias in node.names]
            name = next((n for n in names if re.search(DOORS, n)), "")
        elif isinstance(node, ast.Import):
            name = next((a.name for a in node.names if re.search(DOORS, a.name)), "")
        else:
            name = node.id if isinstance(node, ast.Name) else ""
        if re.search(DOORS, name):
            found.append(name)
    return found


DOORS = r"^Image\.open$|\bload_images?$|\bload_video$|\bfetch_images?$|^(cv2|imageio)\b|ImageFile\.Parser"


def test_U7_only_the_media_door_opens_pictures():
    users = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if uses_of_other_doors(path.read_text())}
    assert users == {"media.py"}
    texts = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if "Image.open(" in path.read_text()}
    assert texts == {"media.py"}
    assert "transformers" not in (PACKAGE / "media.py").read_text()


@pytest.mark.parametrize(
    "code",
    [
        "from PIL import Image\nImage.open('a')",
        "import PIL.Image\nPIL.Image.open('a')",
        "from PIL.Image import open as read",
        "from transformers.image_utils import load_image",
        "import transformers\ntransformers.image_utils.load_image(x)",
        "processor.fetch_images(urls)",
        "import cv2",
        "from PIL import ImageFile\nImageFile.Parser()",
    ],
)
def test_U7_the_search_finds_other_doors(code):
    assert uses_of_other_doors(code)


def test_U7_no_string_reaches_transformers(monkeypatch):
    import transformers.image_utils

    monkeypatch.setattr(transformers.image_utils, "load_image", lambda *_, **__: pytest.fail("load_image was called"))
    refused("https://example.org/a.png")
    assert open_base64(BASE64).size == (24, 16)
