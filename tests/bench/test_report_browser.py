"""The page in a real browser: no console message, nothing refused, pictures decoded, sorting and folding work."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from tests.bench import synthetic
from winnow.bench.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt-get install chromium)")

PROBE = """
addEventListener("load", () => {
  const images = [...document.images];
  const table = document.querySelector("table.headline");
  const column = (n) => [...table.tBodies[0].rows].map((r) => r.cells[n].dataset.v ?? null);
  const press = (n) => table.tHead.rows[0].cells[n].querySelector("button").click();
  const found = { width: innerWidth, wide: document.documentElement.scrollWidth };
  found.images = images.map((i) => (i.complete ? i.naturalWidth : 0));
  press(2); found.first = column(2); found.sorted = table.tHead.rows[0].cells[2].ariaSort;
  press(2); found.second = column(2);
  press(0); found.names = column(0);
  const select = document.querySelector("select.budget");
  select.value = "64"; select.dispatchEvent(new Event("change"));
  found.shown = [...table.tBodies[0].rows].filter((r) => !r.hidden).map((r) => r.dataset.budget);
  const key = document.querySelector(".legend button");
  key.click(); found.single = document.querySelectorAll("svg.single g.on").length;
  key.click(); found.plain = document.querySelectorAll("svg.single").length;
  dispatchEvent(new Event("beforeprint")); found.folded = document.querySelectorAll("details:not([open])").length;
  parent.postMessage(JSON.stringify(found), "*");
});
"""
# A window is at least 500 pixels wide, so the page is looked at in a frame.
FRAME = """<!doctype html><pre id="probe"></pre><script>
addEventListener("message", (event) => { document.getElementById("probe").textContent = event.data; });
</script><iframe style="border:0;width:WIDTHpx;height:800px" srcdoc="PAGE"></iframe>"""


def browse(page: Path, width: int, folder: Path) -> tuple[str, list[str]]:
    """The document after its script ran, and what the console said."""
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
               f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1200", "--virtual-time-budget=3000",
               "--dump-dom", page.as_uri()]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    store = folder / "runs.sqlite"
    synthetic.accuracy(store, questions=26, budgets=(64, 16), methods=("fastervlm", "visionzip"), pictures=2)
    synthetic.speed(store, budgets=(64, 16), methods=("fastervlm", "visionzip"), repeats=3)
    return write_report(store, folder / "report.html", png=False, csv=False, json=False)[0]


def test_the_console_is_silent_and_the_script_is_allowed_to_run(page: Path, tmp_path: Path) -> None:
    document, said = browse(page, 1440, tmp_path)
    assert said == []
    assert '<html lang="en" class="scripted">' in document


@pytest.mark.parametrize(
    "evil",
    ['<img src="http://127.0.0.1:9/x.png">', "<script>document.title = 'owned'</script>"],
    ids=["image", "script"],
)
def test_what_the_page_does_not_bring_is_refused(page: Path, tmp_path: Path, evil: str) -> None:
    planted = tmp_path / "planted.html"
    planted.write_text(page.read_text(encoding="utf-8").replace("</main>", f"{evil}</main>"), encoding="utf-8")
    document, said = browse(planted, 800, tmp_path)
    assert any("Content Security Policy" in line for line in said)
    assert "<title>owned</title>" not in document


@pytest.mark.parametrize("width", [360, 800, 1440])
def test_everything_works_and_fits_the_window(page: Path, tmp_path: Path, width: int) -> None:
    probed = tmp_path / "probed.html"
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    text = text.replace("</body>", f"<script>{PROBE}</script></body>")
    framed = FRAME.replace("WIDTH", str(width)).replace("PAGE", escape(text, quote=True))
    probed.write_text(framed, encoding="utf-8")
    document, said = browse(probed, 1500, tmp_path)
    assert said == []
    match = re.search(r'<pre id="probe">(.*?)</pre>', document, re.DOTALL)
    assert match is not None
    found: dict[str, Any] = json.loads(unescape(match[1]))
    assert found["width"] == width
    assert found["wide"] <= width  # nothing but tables scrolls sideways, and these in their own frames
    assert found["images"] == [448] * 4
    assert found["sorted"] == "descending"
    figures = [float(v) for v in found["first"] if v is not None]
    assert len(figures) == 15
    assert figures == sorted(figures, reverse=True)
    assert [float(v) for v in found["second"] if v is not None] == sorted(figures)
    assert found["names"] == sorted(found["names"], key=str.casefold)
    assert set(found["shown"]) == {"64", ""}
    assert found["single"] > 0
    assert found["plain"] == 0
    assert found["folded"] == 0
