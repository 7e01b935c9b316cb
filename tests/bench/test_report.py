"""The report: its figures are those of the store, and the page needs nothing and trusts nothing that the store says."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import sqlite3
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tests.bench import synthetic
from winnow.bench.intervals import paired, rate, retained
from winnow.bench.report import write_report
from winnow.bench.report_data import Report, reports
from winnow.bench.report_page import command
from winnow.bench.store import Store
from winnow.bench.summary import Result
from winnow.core.errors import WinnowError

SMALL = {"questions": 39, "budgets": (64, 16), "methods": ("fastervlm", "visionzip", "fastv"), "pictures": 2}
TIMED = {"budgets": (64, 16), "methods": ("fastervlm", "visionzip", "fastv")}
EVIL = '<img src=x onerror=alert(1)>"\'&</script><script>document.title="owned"</script>'


class Page(HTMLParser):
    """Elements with their attributes, and the text of the page without its script and styles."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._within = "", ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._within = tag

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "runs.sqlite"
    synthetic.accuracy(path, **SMALL)
    synthetic.speed(path, **TIMED)
    return path


@pytest.fixture(scope="module")
def written(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    files = write_report(store, out)
    assert [f.name for f in files] == ["report.html", "report.png", "report.csv", "report.json"]
    assert all(f.is_file() for f in files)
    return out


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page(written.read_text(encoding="utf-8"))


def one(store: Path) -> Report:
    with Store(store) as opened:
        (found,) = reports(opened)
    return found


def row(report: Report, label: str, budget: str = "64") -> Result:
    return next(r for r in report.rows if (r.cell.label, r.cell.budget) == (label, budget))


def fresh(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "runs.sqlite"
    synthetic.accuracy(path, **SMALL | {"pictures": 0} | changes)
    return path


def change(path: Path, statement: str, *values: object) -> None:
    with sqlite3.connect(path) as db:
        db.execute(statement, values)
    db.close()


# What the page asks of the world


def test_nothing_in_the_page_refers_to_anything_outside_it(written: Path, page: Page) -> None:
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href", "background"):
                assert (value or "").startswith(("data:image/", "#")), (tag, name, value)
    styles = re.findall(r"<style>(.*?)</style>", written.read_text(encoding="utf-8"), re.DOTALL)
    assert len(styles) == 1
    assert "url(" not in styles[0]
    assert "@import" not in styles[0]
    assert not page.all("link")
    assert not page.all("iframe")


def test_a_policy_forbids_what_the_page_does_not_do(page: Page) -> None:
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "script-src 'sha256-" in policy
    assert "unsafe-inline'; script" in policy  # styles only
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_every_picture_is_there_and_can_be_decoded(page: Page) -> None:
    images = page.all("img")
    assert len(images) == 2 * 3  # two questions, three methods, one budget
    for image in images:
        kind, _, content = (image["src"] or "").partition(";base64,")
        assert kind == "data:image/webp"
        with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as picture:
            picture.load()
            assert picture.size == (int(image["width"] or 0), int(image["height"] or 0))
        assert image["alt"]


def test_links_within_the_page_lead_somewhere(page: Page) -> None:
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {(a["href"] or "")[1:] for a in page.all("a")} | {
        a["aria-labelledby"] for a in page.all("div") if "aria-labelledby" in a
    }
    assert targets
    assert targets <= set(ids)


def test_headings_of_the_table_are_buttons_and_its_frame_is_reached_by_the_keyboard(page: Page) -> None:
    buttons = [b for b in page.all("button") if "data-column" in b]
    assert [int(b["data-column"] or -1) for b in buttons] == list(range(len(buttons)))
    assert len(buttons) == 13
    assert all(d.get("tabindex") == "0" for d in page.all("div") if d.get("role") == "region")


# Text that was not written by us


def test_questions_and_answers_are_text_whatever_they_contain(tmp_path: Path) -> None:
    path = fresh(tmp_path, pictures=1)
    change(path, "UPDATE answers SET answer = ?, correct = 0", EVIL)
    change(path, "UPDATE questions SET text = ?", EVIL)
    change(path, "UPDATE cells SET label = ? WHERE label = 'fastv'", EVIL)
    change(path, "UPDATE cells SET note = ?, status = 'mismatch' WHERE label = 'visionzip'", EVIL)
    change(path, "UPDATE runs SET settings = json_set(settings, '$.model', ?)", EVIL)
    (out, *_) = write_report(path, tmp_path / "r.html")
    page = Page(out.read_text(encoding="utf-8"))
    assert page.text.count(EVIL) >= 4
    assert len(page.all("script")) == 1
    assert all((i["src"] or "").startswith("data:image/") for i in page.all("img"))


def test_a_spreadsheet_finds_no_formula(tmp_path: Path) -> None:
    path = fresh(tmp_path)
    for label, evil in (("fastv", "=HYPERLINK(1)"), ("fastervlm", "+1"), ("visionzip", "-2"), ("oracle", "@SUM(A1)")):
        change(path, "UPDATE cells SET label = ? WHERE label = ?", evil, label)
    write_report(path, tmp_path / "r.html")
    rows = list(csv.DictReader((tmp_path / "r.csv").open(encoding="utf-8")))
    labels = {r["label"] for r in rows}
    assert {"'=HYPERLINK(1)", "'+1", "'-2", "'@SUM(A1)"} <= labels
    for line in rows:
        for name, value in line.items():
            assert not value.startswith(("=", "+", "@")), (name, value)
            assert not value.startswith("-") or float(value) < 0
    assert any(r["change"].startswith("-") for r in rows)


# The figures


def test_figures_are_those_of_the_answers(store: Path) -> None:
    report = one(store)
    found = row(report, "fastervlm")
    with Store(store) as opened:
        answers = opened.answers(found.cell.id)
        plain = {a.question: a for a in opened.answers(report.full.cell.id)}  # type: ignore[union-attr]
    right = [a.correct for a in answers]
    full = [plain[a.question].correct for a in answers]
    assert found.accuracy == rate(sum(right), len(right))
    assert found.change == paired(full, right)
    assert found.agreement == pytest.approx(sum(a.answer == plain[a.question].answer for a in answers) / len(answers))
    assert found.kept == 64
    assert found.layer_tokens == 64 + synthetic.TEXT
    assert found.kv == pytest.approx((64 + 12) / (256 + 12))
    assert sum(asked for _, asked in found.by_type.values()) == len(answers)
    assert sum(good for good, _ in found.by_type.values()) == sum(right)
    assert report.full is not None
    assert report.full.retained is None


def test_the_files_beside_the_page_say_the_same(store: Path, written: Path) -> None:
    report = one(store)
    found = json.loads(written.with_suffix(".json").read_text(encoding="utf-8"))
    lines = list(csv.DictReader(written.with_suffix(".csv").open(encoding="utf-8")))
    rows = found["runs"][0]["rows"]
    assert len(rows) == len(lines) == len(report.rows)
    for line, entry, own in zip(lines, rows, report.rows, strict=True):
        assert line["label"] == entry["label"] == own.cell.label
        if own.asked:
            assert float(line["accuracy"]) == entry["accuracy"] == own.accuracy.value
            assert float(line["layer_tokens"]) == entry["layer_tokens"]
    with Image.open(written.with_suffix(".png")) as chart:
        assert chart.size == (1760, 1000)
        assert len(chart.getcolors(1 << 24) or ()) > 50  # drawn on


def test_retained_has_an_interval_also_where_nothing_differs() -> None:
    same = retained([True] * 30 + [False] * 10, [True] * 30 + [False] * 10)
    assert same is not None
    assert same.low < same.value == 1 < same.high
    worse = retained([True] * 40, [True] * 20 + [False] * 20)
    assert worse is not None
    assert worse.low < worse.value == 0.5 < worse.high < 1
    assert retained([False, False], [True, False]) is None
    nothing = retained([True, True], [False, False])
    assert nothing is not None
    assert nothing.low == nothing.value == 0 < nothing.high


def test_retained_covers_the_truth_about_as_often_as_it_says() -> None:
    import random

    rng, hits, trials = random.Random(0), 0, 600
    for _ in range(trials):
        full = [rng.random() < 0.7 for _ in range(200)]
        mine = [rng.random() < (0.85 if good else 0.1) for good in full]
        found = retained(full, mine)
        assert found is not None
        hits += found.low <= (0.7 * 0.85 + 0.3 * 0.1) / 0.7 <= found.high
    assert 0.92 <= hits / trials <= 0.98


# Times


def test_times_come_from_the_run_of_speed_of_the_same_model(store: Path) -> None:
    report = one(store)
    assert report.speed is not None
    found = row(report, "fastervlm")
    assert report.took(found) == pytest.approx(9 + 0.6 + 0.4 + 1 + 64 * 0.09, rel=0.01)
    full = 9 + 0.6 + 1 + 256 * 0.09
    assert report.speedup(found) == pytest.approx(full / (11 + 64 * 0.09), rel=0.02)
    native = 9 + 0.6 + 1 + 64 * 0.09
    assert report.efficiency(found) == pytest.approx((full - native - 0.4) / (full - native), rel=0.03)
    assert list(report.cases) == [(False, 1), (False, 8), (True, 8)]
    assert row(report, "native-M").asked == 0


@pytest.mark.parametrize("name", ["weights", "code", "dtype", "attention"])
def test_times_of_another_model_or_code_are_not_used(tmp_path: Path, name: str) -> None:
    path = fresh(tmp_path)
    synthetic.speed(path, **TIMED, settings={name: "another"})
    report = one(path)
    assert report.speed is None
    assert not report.cases
    (out, *_) = write_report(path, tmp_path / "r.html")
    assert "This store has no times of this model with this code" in Page(out.read_text(encoding="utf-8")).text


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"correctness": "red"}, "correctness checks were red"),
        ({"busy": "load 9"}, "machine was busy (load 9)"),
    ],
)
def test_no_speed_up_is_shown_from_a_red_gate_or_a_busy_machine(
    tmp_path: Path, machine: dict[str, str], reason: str
) -> None:
    path = fresh(tmp_path)
    synthetic.speed(path, **TIMED, **machine)
    report = one(path)
    assert all(report.speedup(r) is None and report.efficiency(r) is None for r in report.rows)
    (out, *_) = write_report(path, tmp_path / "r.html")
    page = Page(out.read_text(encoding="utf-8"))
    assert reason in page.text
    assert "speed-up ×" not in page.text
    assert "milliseconds to the first token" not in page.text
    assert all(r["speedup"] == "" == r["efficiency"] for r in csv.DictReader((tmp_path / "r.csv").open()))


def test_a_store_with_times_alone_has_a_report(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    synthetic.speed(path, **TIMED)
    (out, *_) = write_report(path, tmp_path / "r.html")
    text = Page(out.read_text(encoding="utf-8")).text
    assert "Time by phase" in text
    assert "All cells" not in text


# What may not be used, and what is odd


def test_cells_whose_answers_do_not_agree_with_generate_are_left_out(tmp_path: Path) -> None:
    path = fresh(tmp_path)
    change(path, "UPDATE cells SET status = 'mismatch' WHERE label = 'fastv' AND budget = '16'")
    write_report(path, tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "not measured: its answers differ from those of model.generate" in page.text
    assert "Left out, since the sweep's answers were not those of model.generate: fastv 16." in page.text
    (line,) = [r for r in csv.DictReader((tmp_path / "r.csv").open()) if (r["label"], r["budget"]) == ("fastv", "16")]
    assert line["status"] == "mismatch"
    assert line["accuracy"] == line["evidence_recall"] == ""


def test_errors_are_counted_and_are_no_wrong_answers(tmp_path: Path) -> None:
    path = fresh(tmp_path)
    before = row(one(path), "fastervlm")
    change(path, "UPDATE answers SET status = 'error:oom' WHERE question IN "
                 "(SELECT question FROM answers LIMIT 3) AND cell = ?", before.cell.id)  # fmt: skip
    report = one(path)
    assert row(report, "fastervlm").asked == before.asked - 3
    write_report(path, tmp_path / "r.html")
    assert "3 answers ended in an error" in Page((tmp_path / "r.html").read_text(encoding="utf-8")).text


def test_a_method_that_the_model_cannot_run_is_named_with_the_reason(tmp_path: Path) -> None:
    path = fresh(tmp_path)
    change(path, "DELETE FROM answers WHERE cell IN (SELECT id FROM cells WHERE label = 'fastv')")
    change(path, "UPDATE cells SET status = 'error:unsupported', note = 'no such point' WHERE label = 'fastv'")
    write_report(path, tmp_path / "r.html")
    text = Page((tmp_path / "r.html").read_text(encoding="utf-8")).text
    assert text.count("not measured: error:unsupported (no such point)") == 2


def test_the_page_ranks_nothing(page: Page) -> None:
    assert "This page ranks nothing." in page.text
    assert not re.search(r"\b(best|winner|state.of.the.art|outperform\w*|leader\w*)\b", page.text, re.IGNORECASE)


def test_methods_stand_by_name_after_the_full_model(store: Path) -> None:
    rows = [(r.cell.kind, r.cell.label) for r in one(store).rows]
    assert rows[0] == ("baseline", "full")
    methods = [label for kind, label in rows[1:] if kind == "method"]
    assert methods == sorted(methods)
    assert [kind for kind, _ in rows[1:]] == ["method"] * len(methods) + ["baseline"] * (len(rows) - 1 - len(methods))


# Pictures and other stores


def test_pictures_of_a_data_file_are_found_in_its_folder_or_are_grey(tmp_path: Path) -> None:
    path = fresh(tmp_path, pictures=1)
    change(path, "UPDATE questions SET image = 'sub/kitchen.png'")
    (tmp_path / "data" / "sub").mkdir(parents=True)
    Image.new("RGB", (160, 160), (200, 30, 30)).save(tmp_path / "data" / "sub" / "kitchen.png")
    write_report(path, tmp_path / "found.html", pictures=tmp_path / "data")
    assert "not found" not in (tmp_path / "found.html").read_text(encoding="utf-8")
    write_report(path, tmp_path / "lost.html", png=False, csv=False, json=False)
    assert "1 pictures were not found" in Page((tmp_path / "lost.html").read_text(encoding="utf-8")).text
    assert not (tmp_path / "lost.csv").exists()


def test_several_runs_are_sections_of_one_page(tmp_path: Path) -> None:
    path = fresh(tmp_path)
    synthetic.accuracy(path, **SMALL | {"pictures": 0, "seed": 1})
    files = write_report(path, tmp_path / "r.html")
    assert [f.name for f in files] == ["r.html", "r-1.png", "r-2.png", "r.csv", "r.json"]
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert len(page.all("article")) == 2
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_plans_with_their_own_settings_and_a_store_without_evidence_or_full_model(tmp_path: Path) -> None:
    path = fresh(tmp_path, methods=("fastervlm",))
    change(path, "UPDATE cells SET budget = '', keep = NULL WHERE kind = 'method'")
    change(path, "UPDATE answers SET evidence_recall = NULL, agrees = NULL, flops = NULL, layer_tokens = NULL")
    change(path, "DELETE FROM answers WHERE cell IN (SELECT id FROM cells WHERE label = 'full')")
    write_report(path, tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "All cells" in page.text
    assert "nan" not in page.text


def test_the_command_is_the_recorded_one_or_asks_for_the_same(tmp_path: Path) -> None:
    path = fresh(tmp_path)
    assert command(one(path)) == "winnow bench --questions 260"
    change(path, "UPDATE runs SET environment = '{}'")
    said = command(one(path))
    assert (
        said == "winnow bench --method fastervlm --method fastv --method visionzip --keep 64,16 --questions 39 --seed 0"
    )


def test_a_run_that_says_nothing_of_its_model_and_machine_has_a_report(tmp_path: Path) -> None:
    path = fresh(tmp_path, questions=13)
    change(path, "UPDATE runs SET environment = '{}', settings = '{}'")
    (out, *_) = write_report(path, tmp_path / "r.html", png=False, csv=False, json=False)
    text = Page(out.read_text(encoding="utf-8")).text
    assert "A model with fewer tokens" in text
    assert "The command was not recorded" in text


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(WinnowError, match="no store"):
        write_report(tmp_path / "none.sqlite", tmp_path / "r.html")
    Store(tmp_path / "empty.sqlite", create=True).close()
    with pytest.raises(WinnowError, match="no answers yet"):
        write_report(tmp_path / "empty.sqlite", tmp_path / "r.html")
    with pytest.raises(WinnowError, match=r"\.html file"):
        write_report(tmp_path / "empty.sqlite", tmp_path / "r.pdf")
    assert not list(tmp_path.glob("r.*"))
