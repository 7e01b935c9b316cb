"""Pictures that nobody should trust, sent to a real server: rows I1 to I15."""

from __future__ import annotations

import base64
import io
from typing import Any

import media_assets as assets
import pytest
from PIL import Image

from serve.process import MOTORCYCLE, Answer, Server, check_tells_nothing, drawn, url, user


def refused(server: Server, *pictures: Any) -> Answer:
    answer = server.ask(MOTORCYCLE, *pictures)
    check_tells_nothing(answer)
    assert answer.error["type"] == "invalid_request_error"
    return answer


def code(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.error["code"]


@pytest.mark.parametrize("data", [b"", b"0123456789", b"plain text, renamed", b"<html><body>404</body></html>"])
def test_I1_what_is_no_picture(server: Server, data: bytes) -> None:
    assert code(refused(server, data)) == (400, "invalid_image")


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
def test_I2_a_picture_cut_in_the_middle(server: Server, name: str) -> None:
    data = assets.encoded(name, width=64, height=48)
    assert code(refused(server, data[: len(data) // 2])) == (400, "truncated_image")


def test_I3_a_png_that_lacks_only_its_end(server: Server) -> None:
    data = assets.encode(drawn(54).image, "PNG")
    assert data[-12:] == assets.chunk(b"IEND")
    assert server.ask(MOTORCYCLE, data[:-12]).text == "yes"


@pytest.mark.parametrize("side", [9_400, 13_000, 20_000])
def test_I4_a_bomb_is_refused_by_its_header(server: Server, side: int) -> None:
    bomb = assets.png_bomb(side)
    server.ask(MOTORCYCLE, drawn(54).image)
    before = server.memory("VmHWM")
    assert code(refused(server, bomb)) == (413, "too_large")
    assert server.memory("VmHWM") - before < 50 * 2**20


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 3), (3, 1), (1, 10_000), (10_000, 1)])
def test_I5_pictures_of_odd_sizes(server: Server, size: tuple[int, int]) -> None:
    answer = server.ask(MOTORCYCLE, Image.new("RGB", size, "red"))
    if max(size) > 200 * min(size):
        assert code(answer) == (400, "bad_size")
        assert "200 times" in answer.error["message"]
    else:
        assert answer.status == 200
        assert answer.json["usage"]["winnow"]["given"] == 256


MODES = ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"]


@pytest.mark.parametrize("mode", MODES)
def test_I6_every_mode_is_read_as_the_loader_reads_it(server: Server, library: Any, mode: str) -> None:
    from winnow.media import open_image

    kind = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    scene = drawn(54).image
    data = assets.encode(scene.convert("L").convert(mode) if mode == "I;16" else scene.convert(mode), kind)
    answer = server.ask(MOTORCYCLE, data)
    assert answer.text == library(open_image(data), MOTORCYCLE, "hiprune:keep=64")[0]


def test_I6_a_mode_without_a_range_is_refused(server: Server) -> None:
    data = assets.encode(Image.new("F", (8, 8)), "TIFF")
    assert code(refused(server, data)) == (415, "unsupported_format")


def test_I7_a_picture_is_turned_upright(server: Server) -> None:
    upright = drawn(54).image
    jpeg = assets.encode(upright.transpose(Image.Transpose.ROTATE_180), "JPEG", quality=95)
    turned = assets.jpeg_with_exif(jpeg, assets.exif(3))
    question = next(q for q in drawn(54).questions if q.answer not in ("yes", "no"))
    straight = server.ask(question.text, assets.encode(upright, "JPEG", quality=95))
    assert server.ask(question.text, turned).text == straight.text
    broken = assets.jpeg_with_exif(assets.encode(upright, "JPEG", quality=95), b"II*\0\xff\xff\xff\xff")
    assert server.ask(MOTORCYCLE, broken).text == "yes"
    profile = assets.encode(upright, "PNG", icc_profile=bytes(500_000))
    assert server.ask(MOTORCYCLE, profile).text == "yes"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_I8_the_first_frame_of_an_animation(server: Server, kind: str) -> None:
    scene, others = drawn(54).image, [Image.new("RGB", (224, 224), color) for color in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = assets.encode(scene, kind, save_all=True, append_images=others, **options)
    assert server.ask(MOTORCYCLE, data).text == "yes"


def test_I8_ten_thousand_frames(server: Server) -> None:
    one = assets.encode(Image.new("RGB", (8, 8), "red"), "GIF")
    start = 13 + 3 * 2 ** ((one[10] & 7) + 1)  # behind the header and its palette
    assert one[10] & 0x80
    many = one[:start] + one[start:-1] * 10_000 + one[-1:]
    picture = Image.open(io.BytesIO(many))
    assert picture.n_frames == 10_000
    answer = server.ask(MOTORCYCLE, many)
    assert answer.status == 200
    assert answer.text == server.ask(MOTORCYCLE, one).text


@pytest.mark.parametrize("name", list(assets.foreign_files()))
def test_I9_formats_outside_the_list(server: Server, name: str) -> None:
    assert code(refused(server, assets.foreign_files()[name])) == (415, "unsupported_format")


@pytest.mark.parametrize("color", ["black", "white", "#123456", None])
def test_I10_pictures_without_anything_in_them(server: Server, color: str | None) -> None:
    noise = Image.effect_noise((224, 224), 90).convert("RGB")
    image = noise if color is None else Image.new("RGB", (224, 224), color)
    first, second = (server.ask("what color is the square?", image).json for _ in range(2))
    assert first["usage"]["winnow"]["kept"] == 64
    assert (first["choices"], first["usage"]) == (second["choices"], second["usage"])


def test_I11_pictures_are_told_apart(server: Server) -> None:
    """Twice the same picture, and two with the same bytes of pixels and other sides."""
    scene = drawn(54).image
    both = server.ask(MOTORCYCLE, scene, scene).json
    assert both["usage"]["winnow"] == {"given": 512, "kept": 128, "plan": "hiprune:keep=64"}
    pixels = assets.picture(300, 100).tobytes()
    wide, tall = (Image.frombytes("RGB", size, pixels) for size in ((300, 100), (100, 300)))
    alone = [server.ask("what color is the square?", own).json["choices"] for own in (wide, tall, wide)]
    assert alone[0] == alone[2]


def test_I12_no_picture_is_a_question_in_words(server: Server, reference: Any) -> None:
    model, processor = reference
    inputs = processor(text=f"USER: {MOTORCYCLE} ASSISTANT:", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = server.ask(MOTORCYCLE)
    assert answer.text == processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.json["usage"]["winnow"] == {"given": 0, "kept": 0, "plan": "hiprune:keep=64"}
    assert answer.json["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]


def test_I12_too_many_pictures(server: Server) -> None:
    small = Image.new("RGB", (8, 8))
    for count in (9, 100):
        answer = refused(server, *[small] * count)
        assert code(answer) == (400, "too_many_images")
        assert "at most 8" in answer.error["message"]


@pytest.mark.parametrize("value", [[[[0, 0, 0]]], 5, None, True, {"data": "x"}, [0.5] * 12])
def test_I13_arrays_are_no_pictures(server: Server, value: Any) -> None:
    part = {"type": "image_url", "image_url": {"url": value}}
    answer = server.chat(messages=[{"role": "user", "content": [part]}])
    assert code(answer) == (400, "invalid_image_url")
    assert answer.error["param"] == "messages[0].content[0].image_url.url"


GOOD = base64.b64encode(assets.encoded("PNG")).decode()
BAD_BASE64 = {
    "alphabet": "!" + GOOD[1:],
    "padding": GOOD[:-1],
    "newlines": GOOD[:8] + "\n" + GOOD[8:],
    "urlsafe": "-_" + GOOD[2:],
    "blanks": GOOD[:4] + "    " + GOOD[4:],
}


@pytest.mark.parametrize("how", BAD_BASE64)
def test_I14_base64_that_is_none(server: Server, how: str) -> None:
    assert code(refused(server, f"data:image/png;base64,{BAD_BASE64[how]}")) == (400, "bad_base64")


def test_I14_nothing_is_no_picture_and_too_much_is_not_read(server: Server) -> None:
    assert code(refused(server, "data:image/png;base64,")) == (400, "invalid_image")
    assert code(refused(server, "data:image/png," + GOOD)) == (400, "bad_base64")
    assert code(refused(server, "data:image/png;base64," + "A" * 5 * 2**20)) == (413, "request_too_large")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer key-of-the-tests\r\n"
    said = server.raw(head + b"content-type: application/json\r\ncontent-length: 500000000\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 413")


def test_I14_the_content_decides_and_not_the_mime_type(server: Server) -> None:
    lies = url(drawn(54).image).replace("image/png", "text/html")
    assert server.ask(MOTORCYCLE, lies).text == "yes"


def test_I15_a_hundred_thousand_frames_in_a_url(server: Server) -> None:
    frames = "data:video/jpeg;base64," + ",".join(["QUFB"] * 100_000)
    answer = server.chat(messages=[user("what?", frames)])
    assert code(answer) == (413, "request_too_large")
    few = server.chat(messages=[user("what?", "data:video/jpeg;base64," + ",".join(["QUFB"] * 100))])
    assert code(few) == (400, "bad_base64")
