"""What users and machines do wrong: one line and exit code 2 in every command, on streams of any encoding."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from winnow import cli_bench, cli_run, cli_streams
from winnow.cli import app
from winnow.core.errors import WinnowError
from winnow.core.registry import entries, picture_methods
from winnow.reference.build import make_model, make_processor
from winnow.reference.presets import preset

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
SCENE = "world:3"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A tiny random model in a folder: 64 visual tokens, 3 LM layers."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model(preset("micro"), seed=5).save_pretrained(folder)
    make_processor(preset("micro")).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def asking(command: str, folder: Path, model: Path) -> list[str]:
    """A short call of a command that asks the model something."""
    store = ["--store", str(folder / "r.sqlite"), "--method", "divprune", "--keep", "8"]
    options = {
        "run": [SCENE, "--runs", "1", "--max-new-tokens", "1"],
        "doctor": [],
        "bench": [*store, "--questions", "2", "--baselines", "random", "--max-new-tokens", "1"],
        "speed": [*store, "--allow-busy", "--batches", "1", "--no-ragged", "--repeats", "1", "--warm-up", "0"],
    }
    return [command, *options[command], "--model", str(model), "--device", "cpu"]


def call(*arguments: object, code: int = 2, **options):
    result = CliRunner(**options).invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def line(*arguments: object) -> str:
    """The one line that is said of a mistake."""
    result = call(*arguments)
    assert result.stdout == ""
    assert result.stderr.startswith("winnow: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


COMMANDS = ("run", "doctor", "bench", "speed")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("num_additional_image_tokens", ..., ("63 image tokens", "makes 64", "is 0, this model needs 1")),
        ("patch_size", None, ("patch_size is None",)),
        ("vision_feature_select_strategy", "full", ("65 image tokens", "makes 64", "'full'", "'default'")),
    ],
)
def test_a_processor_that_does_not_fit_is_named_in_every_command(command, setting, value, says, checkpoint, tmp_path):
    path = checkpoint / "processor_config.json"
    settings = json.loads(path.read_text())
    settings.pop(setting)
    path.write_text(json.dumps(settings if value is ... else {**settings, setting: value}))
    said = line(*asking(command, tmp_path, checkpoint))
    assert all(part in said for part in says), said
    assert setting in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_chat_template_that_fails_is_named_in_every_command(command, checkpoint, tmp_path):
    (checkpoint / "chat_template.jinja").write_text("{{ raise_exception('a text of the library') }}")
    said = line(*asking(command, tmp_path, checkpoint))
    assert "chat template" in said
    assert "a text of" not in said


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["--dtype=float8_e4m3fn", "--dtype=int8", "--dtype=complex64", "--device=meta"])
def test_what_no_model_runs_in_is_refused_in_every_command(command, option, whole, tmp_path):
    said = line(*asking(command, tmp_path, whole), option)
    assert option.partition("=")[2] in said


def printed(*arguments: str, encoding: str) -> str:
    """What the command writes into a pipe of this encoding, which must hold it."""
    command = [sys.executable, "-m", "winnow.cli", *arguments]
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, timeout=120, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    return done.stdout.decode(encoding)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-16", "cp437"])
def test_a_process_writes_into_a_pipe_of_any_encoding(encoding):
    assert "fastervlm" in printed("methods", encoding=encoding)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8"])
def test_every_listing_shows_what_an_encoding_can_show(encoding):
    paths = [[], *(command for command, _ in registered())]
    for arguments in (*([*path, "--help"] for path in paths), ["methods"], ["systems"], ["--version"]):
        assert call(*arguments, code=0, charset=encoding).stdout_bytes.decode(encoding)


# One encoding that holds little and one that holds everything; the others show listings, above.
@pytest.mark.parametrize(
    "encoding",
    ["ascii", "utf-8", *(pytest.param(name, marks=pytest.mark.full) for name in ("cp1252", "latin-1"))],
)
def test_every_command_that_runs_a_model_shows_what_an_encoding_can_show(encoding, whole, tmp_path):
    shown = call(*asking("run", tmp_path, whole), "--keep", "5", code=0, charset=encoding).stdout_bytes
    assert "64" in shown.decode(encoding)
    for command in ("doctor", "bench", "speed"):
        assert call(*asking(command, tmp_path, whole), code=0, charset=encoding).stdout_bytes.decode(encoding)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_json_loses_nothing_in_any_encoding(encoding, whole, tmp_path):
    asked = [*asking("run", tmp_path, whole), "--json"]
    asked.insert(2, "where is 猫 ?")
    got = call(*asked, code=0, charset=encoding).stdout_bytes
    assert json.loads(got.decode(encoding))["question"] == "where is 猫 ?"
    assert ("猫".encode() in got) is (encoding == "utf-8")
    for arguments in (["methods", "--json"], ["systems", "--json"]):
        results = [call(*arguments, code=0, charset=c).stdout_bytes.decode(c) for c in ("utf-8", encoding)]
        assert json.loads(results[0]) == json.loads(results[1])


def test_names_that_are_not_text_are_shown_as_far_as_they_can_be(whole, tmp_path):
    said = call("run", "no\udcffwhere.png", "what?", "--model", whole).stderr
    assert "not a readable file" in said
    Image.new("RGB", (90, 90)).save(tmp_path / "strange\udcff.png")
    arguments = ("--model", whole, "--runs", 1, "--max-new-tokens", 1)
    shown = call("run", tmp_path / "strange\udcff.png", "what?", *arguments, code=0).stdout
    assert "strange?.png" in shown.replace("\n", "")
    said = line("run", SCENE, "what \udcff", "--model", whole)
    assert "UTF-8" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line():
    command = [sys.executable, "-m", "winnow.cli", "systems", "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, env=ENVIRONMENT)
    assert done.returncode == 2
    assert done.stderr.startswith("winnow: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["systems"], ["methods", "--json"], ["--help"]])
def test_a_process_without_stdout_ends_as_ever(arguments):
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "winnow.cli", *arguments]
    done = subprocess.run(closed, stderr=subprocess.PIPE, text=True, timeout=60, env=ENVIRONMENT, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("suffix", "size"), [(".webp", (60, 2400)), (".WEBP", (2400, 60))])
def test_an_overlay_that_its_format_cannot_hold_is_refused_before_the_model_is_loaded(
    suffix, size, tmp_path, monkeypatch
):
    from winnow.models import load

    monkeypatch.setattr(load, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    Image.new("RGB", size).save(tmp_path / "strip.png")
    said = line("run", tmp_path / "strip.png", "is there a cat ?", "--overlay", tmp_path / f"out{suffix}")
    assert ".png" in said
    assert "pixels" in said


@pytest.mark.parametrize(("suffix", "longest"), [(".webp", 16_383), (".jpg", 65_500), (".JPEG", 65_500)])
def test_sheets_are_written_up_to_what_their_format_holds(suffix, longest, tmp_path):
    cli_run.save(Image.new("RGB", (longest, 1)), tmp_path / f"most{suffix}")
    with pytest.raises(WinnowError, match=f"{longest + 1} × 1 .* {longest} .*png"):
        cli_run.save(Image.new("RGB", (longest + 1, 1)), tmp_path / f"more{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == [f"most{suffix}"]


@pytest.mark.parametrize(
    "path", ["folder.png", "file/kept.png", "kept.gif", "kept", ".png", f"{'x' * 300}.png", f"{'x' * 300}/kept.png"]
)
def test_an_overlay_that_cannot_be_written_is_refused_before_the_model_is_loaded(path, tmp_path, monkeypatch):
    from winnow.models import load

    monkeypatch.setattr(load, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    line("run", SCENE, "--overlay", tmp_path / path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]


@pytest.mark.parametrize("error", [ValueError("of Pillow"), KeyError("of Pillow"), OSError(28, "No space left")])
def test_whatever_saving_an_overlay_raises_is_one_line_and_leaves_nothing(error, whole, tmp_path, monkeypatch):
    def save(self, path, *_, **__):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(Image.Image, "save", save)
    target = tmp_path / "out" / "kept.webp"
    said = line(*asking("run", tmp_path, whole), "--overlay", target)
    assert "of Pillow" not in said
    assert "kept.webp" in said
    assert list(target.parent.iterdir()) == []


def mistakes(folder: Path) -> list[list[str]]:
    (folder / "empty").write_text("")
    (folder / "text").write_text("no database " * 100)
    empty, text, new = str(folder / "empty"), str(folder / "text"), str(folder / "new")
    bench = ["bench", "--method", "divprune", "--questions", "1"]
    return [
        ["run", empty, "what?"],
        ["run", str(folder), "what?"],
        ["run", SCENE, "   "],
        ["run", SCENE, ""],
        ["run", SCENE, "--keep", "1e99"],
        ["run", SCENE, "--method", ""],
        ["run", SCENE, "--method", "divprune,todre"],
        [*bench, "--store", str(folder)],
        [*bench, "--store", text],
        [*bench, "--store", str(folder / "empty" / "r.sqlite")],
        [*bench, "--store", ""],
        [*bench, "--store", str(folder / ("x" * 300))],
        [*bench, "--store", new, "--data", empty],
        [*bench, "--store", new, "--data", str(folder)],
        [*bench, "--store", new, "--method", "todre,,fastv"],
        ["speed", "--allow-busy", "--store", new, "--batches", "99999999999999999999"],
        ["speed", "--allow-busy", "--store", new, "--batches", "²"],
        ["report", str(folder)],
        ["report", empty],
        ["report", text],
        ["world", "show", str(folder)],
        ["world", "show", str(folder / "empty" / "sheet.png"), "-n", "1"],
        ["world", "export", empty],
        ["systems", "--state", "x"],
    ]


@pytest.mark.parametrize("number", range(24))
def test_a_mistake_in_any_command_is_one_line(number, whole, tmp_path):
    arguments = mistakes(tmp_path)[number]
    line(*arguments, *(["--model", whole, "--device", "cpu"] if arguments[0] in COMMANDS else []))


@pytest.mark.parametrize(
    "option", [["bench", "--threads", "99999999"], ["bench", "--processes", "99999"], ["run", SCENE, "--runs", "0"]]
)
def test_numbers_that_no_machine_can_do_are_usage_errors(option):
    assert "Usage" in call(*option).stderr


def test_faults_of_ours_are_not_hidden():
    assert cli_streams.mistake(ZeroDivisionError()) is None
    assert cli_streams.mistake(RuntimeError("shapes differ")) is None
    assert "Memory" in str(cli_streams.mistake(MemoryError()))
    assert "Memory" in str(cli_streams.mistake(RuntimeError("can't allocate memory")))
    assert cli_streams.mistake(PermissionError(13, "Permission denied", "a.png")) == "Permission denied: a.png"


def test_methods_of_bench_and_speed_are_slugs_or_plans():
    named = cli_bench.named
    assert named(["a,b", " c "]) == ("a", "b", "c")
    assert named(["fastv:layer=1,keep=10%", "a"]) == ("fastv:layer=1,keep=10%", "a")
    for plan in ("a + b:x=1,y=2", "a | positions=keep,seed=1", "v1|a:x=[1,2],y=3"):
        assert named([plan]) == (plan,)
    built_in = tuple(entry.slug for entry in picture_methods() if entry.family != "user")
    assert len(built_in) >= 8
    assert named(None) == named([]) == built_in
    for bad in ([""], ["a,,b"], ["a", " "]):
        with pytest.raises(WinnowError, match="--method"):
            named(bad)


def registered() -> list[tuple[list[str], list[str]]]:
    """(names, long options) of every command."""
    found = []

    def walk(command, path: list[str]) -> None:
        for name, sub in getattr(command, "commands", {}).items():
            walk(sub, [*path, name])
        if not hasattr(command, "commands"):
            options = [o for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")]
            found.append((path, options))

    walk(get_command(app), [])
    return found


def test_the_page_of_the_command_line_has_every_command_and_every_option():
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    shared = page.partition("## winnow run")[0]
    commands = registered()
    assert len(commands) >= 10
    for path, options in commands:
        heading = f"## winnow {' '.join(path)}\n"
        assert page.count(heading) == 1
        section = page.partition(heading)[2].partition("\n## ")[0]
        assert [o for o in options if o not in section and o not in shared] == []


def test_one_spelling_of_method_everywhere():
    old = "--" + "methods"
    assert all(old not in options for _, options in registered())
    for path in (ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("docs/*.md")):
        assert old not in path.read_text(encoding="utf-8"), path


def test_the_command_line_names_no_method():
    slugs = [entry.slug for entry in entries()]
    for path in (ROOT / "winnow").glob("cli*.py"):
        text = path.read_text(encoding="utf-8")
        assert [slug for slug in slugs if re.search(rf"(?<!\w){slug}(?!\w)", text)] == [], path
