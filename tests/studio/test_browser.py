"""The page in headless Chromium: upload, ask, slide, compare, open a store, by mouse and by keyboard, at three widths.

`make test-studio` says what is needed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="needs Playwright (pip install playwright)")

import numpy as np
from PIL import Image
from playwright import sync_api

from studio.process import BROKEN, STORE, StudioServer

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt-get install chromium)")

expect = sync_api.expect
SHOTS = os.environ.get("STUDIO_SHOTS")  # a folder for pictures of the page, to look at
REFUSAL = "Failed to load resource: the server responded with a status of 4"
WAIT = 60_000  # milliseconds; the machine may be busy


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[1400, 800, 360])
def page(studio: StudioServer, browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The opened page, whose first question is answered; nothing is said on its console or asked elsewhere.

    For each request that is refused (`refused`, by which tests say how many they expect) Chromium writes a line.
    """
    context = browser.new_context(viewport={"width": request.param, "height": 900})
    context.set_default_timeout(WAIT)
    page = context.new_page()
    page.refused = 0
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda asking: asked.append(asking.url))
    page.goto(studio.url)
    answered(page, "A")
    yield page
    own = (f"http://127.0.0.1:{studio.port}/", "data:")
    lines = [
        line for line in said if line.startswith("Failed to load resource: the server responded with a status of 4")
    ]
    assert len(lines) == page.refused
    assert said == lines
    assert [url for url in asked if not url.startswith(own)] == []
    context.close()


def answered(page: Any, *sides: str) -> None:
    """Until these sides have the answer to what is asked."""
    for side in sides:
        expect(page.locator(f"#side-{side}:not(.waiting) .answer")).not_to_be_empty(timeout=WAIT)


def shot(page: Any, name: str) -> None:
    """A picture of the page, which is never wider than its window."""
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}-{page.viewport_size['width']}.png", full_page=True)


def drawn(page: Any, side: str) -> str:
    """The pixels over the picture."""
    return page.locator(f"#side-{side} canvas").evaluate("(canvas) => canvas.toDataURL()")


def slide(page: Any, side: str, kind: str, value: int) -> None:
    """Move a slider as a hand does."""
    page.locator(f"#side-{side} .{kind}").fill(str(value))


def test_ask_slide_and_look_at_layers(page: Any):
    expect(page.locator("#plain .answer")).to_have_text("yes")
    expect(page.locator("#plain .said")).to_have_text("Right answer: yes. 256 tokens of the picture.")
    expect(page.locator("#side-A .slide output")).to_have_text("25 % · 64 of 256 tokens")
    shot(page, "answer")
    before = drawn(page, "A")
    for value in (60, 30, 13):
        slide(page, "A", "budget", value)
    expect(page.locator("#side-A .slide output")).to_have_text("13 % · 33 of 256 tokens", timeout=WAIT)
    assert drawn(page, "A") != before
    expect(page.locator("#table")).to_contain_text("evidence kept")
    expect(page.locator("#phases .phase")).to_have_count(2)
    kept = drawn(page, "A")
    slide(page, "A", "stage", 0)
    expect(page.locator("#side-A .where output")).to_have_text("as encoded: 256 of 256 tokens, 100 % of the evidence")
    assert drawn(page, "A") != kept
    page.locator("#side-A .layers i").last.click()
    expect(page.locator("#side-A .where output")).to_have_text(re.compile("LM layer 7: 33 of 256 tokens"))
    assert drawn(page, "A") == kept
    page.uncheck("#show-evidence")
    assert drawn(page, "A") != kept


def test_compare_two_plans(page: Any):
    page.check("#compare")
    page.select_option("#side-A .method", "fastv")
    page.select_option("#side-B .method", "tome")
    expect(page.locator("#side-A .steps")).to_contain_text("layers[2] · fastv 256 → 64", timeout=WAIT)
    expect(page.locator("#side-B .steps")).to_contain_text("features · layout 65 → 64", timeout=WAIT)
    expect(page.locator("#table thead th")).to_have_text(["", "none", "A", "B"])
    shot(page, "compare")
    tied = drawn(page, "B")
    page.uncheck("#show-groups")
    assert drawn(page, "B") != tied
    page.select_option("#side-B .method", "own")
    page.fill("#side-B .plan", "snapkv:keep=20%")
    page.press("#side-B .plan", "Enter")
    expect(page.locator("#side-B .steps")).to_contain_text("The cache alone is smaller.", timeout=WAIT)
    page.fill("#side-B .plan", "hiprune:kep=5")
    page.press("#side-B .plan", "Tab")
    expect(page.locator("#side-B .alert")).to_contain_text("kep", timeout=WAIT)
    page.refused = 1
    expect(page.locator("#side-B canvas")).to_be_hidden()


def test_upload_a_picture(page: Any, tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 255, (300, 500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    page.set_input_files("#file", tmp_path / "noise.png")
    expect(page.locator("#looked")).to_have_text("500 × 300 pixels", timeout=WAIT)
    expect(page.locator("#own-label")).to_be_hidden()
    page.fill("#question", "what color is the triangle?")
    page.click("#form button.main")
    answered(page, "A")
    expect(page.locator("#notes")).to_contain_text("knows only winnow's own world")
    expect(page.locator("#side-A .where output")).to_have_text("after projected · hiprune: 64 of 256 tokens")
    shot(page, "upload")
    (tmp_path / "text.png").write_text("this is text")
    page.set_input_files("#file", tmp_path / "text.png")
    expect(page.locator("#fault")).to_have_text(re.compile("This picture is not taken: this is not a picture"))
    page.refused = 1
    page.fill("#question", "")
    page.click("#form button.main")
    expect(page.locator("#fault")).to_have_text("Ask a question.")


def test_open_a_store(page: Any):
    page.click("#tab-results")
    expect(page.locator("#ask")).to_be_hidden()
    page.select_option("#store", STORE)
    page.click("#open button")
    report = page.frame_locator("#report")
    expect(report.locator("h1")).to_be_visible(timeout=WAIT)
    key = report.locator(".legend button").first
    key.click()
    expect(key).to_have_attribute("aria-pressed", "true")
    assert report.locator("svg.single g.on").count() > 0
    key.click()
    report.locator("h1").scroll_into_view_if_needed()
    shot(page, "store")
    page.select_option("#store", BROKEN)
    page.click("#open button")
    expect(page.locator("#fault")).to_contain_text("is not an SQLite file", timeout=WAIT)
    page.refused = 1


def test_by_keyboard_alone(page: Any):
    page.focus("#seed")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Tab")
    expect(page.locator("#looked")).to_contain_text("scene 55", timeout=WAIT)
    answered(page, "A")
    page.focus("#side-A .budget")
    page.keyboard.press("Home")
    expect(page.locator("#side-A .slide output")).to_have_text("1 % · 3 of 256 tokens", timeout=WAIT)
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('#side-A .stage')"):
            break
    assert page.evaluate("document.activeElement.matches('#side-A .stage')")
    page.keyboard.press("Home")
    expect(page.locator("#side-A .where output")).to_contain_text("as encoded")
    page.focus("#tab-ask")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#results")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.locator("#store")).to_be_focused()
    outline = page.locator("#store").evaluate("(element) => getComputedStyle(element).outlineWidth")
    assert outline == "3px"


def test_without_its_key_the_page_says_what_to_do(studio: StudioServer, browser: Any):
    page = browser.new_page()
    page.goto(studio.url.partition("#")[0])
    expect(page.locator("#fault")).to_have_text(re.compile("Open the whole address that winnow studio printed"))
    page.close()


def test_a_reload_keeps_the_key_and_the_address_does_not_show_it(page: Any, studio: StudioServer):
    assert studio.key not in page.url
    page.reload()
    answered(page, "A")
