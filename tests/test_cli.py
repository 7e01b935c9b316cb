"""The command line, on real runs: answers, costs, overlays, warnings, errors of one line, and clean streams."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from winnow import __version__, cli_run
from winnow.cli import app
from winnow.reference.build import make_model, make_processor
from winnow.reference.presets import preset
from winnow.world import scene
from winnow.world.export import save_picture

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
SCENE = "world:3"  # its first question has evidence


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A tiny random model in a folder: 64 visual tokens, 3 LM layers."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model(preset("micro"), seed=5).save_pretrained(folder)
    make_processor(preset("micro")).save_pretrained(folder)
    return str(folder)


def winnow(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


def run(*arguments: object) -> dict:
    return json.loads(winnow("run", *arguments, "--runs", 1, "--json").stdout)


def shell(*arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "winnow.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, cwd=ROOT, **options)


def test_a_scene_answered_with_and_without_compression(checkpoint, tmp_path):
    plans = ("fastervlm:keep=16", "fastv:keep=25%,layer=1", "visionzip:keep=16")
    methods = [part for plan in plans for part in ("--method", plan)]
    result = run(SCENE, "--model", checkpoint, *methods, "--overlay", tmp_path / "kept.png", "--max-new-tokens", 4)
    question = scene(3, split="test").questions[0]
    assert (result["question"], result["truth"]) == (question.text, question.answer)
    assert [m["method"] for m in result["methods"]] == list(plans)
    full, (faster, fastv, zipped) = result["plain"], result["methods"]
    assert full["tokens"]["visual"] == 64
    text = full["tokens"]["layers"][0] - 64
    assert full["tokens"]["layers"] == [64 + text] * 3
    assert faster["tokens"]["layers"] == zipped["tokens"]["layers"] == [16 + text] * 3
    assert fastv["tokens"]["layers"] == [64 + text, 16 + text, 16 + text]
    assert faster["points"] == [{"point": "projected", "method": "fastervlm", "from": 64, "to": 16}]
    assert [m["points"][0]["point"] for m in (fastv, zipped)] == ["layers[1]", "features"]
    for method in result["methods"]:
        assert method["tokens"]["visual"] == 16
        assert 0 < method["flops"] < full["flops"]
        assert method["kv_bytes"] / full["kv_bytes"] == pytest.approx(method["tokens"]["mean"] / full["tokens"]["mean"])
        assert 0 <= method["evidence_recall"] <= 1
        assert Image.open(method["overlay"]).size == (448, 470)
    assert "warning" not in result


def test_times_are_whole_and_no_time_is_counted_twice(checkpoint):
    result = run(SCENE, "--model", checkpoint, "--method", "fastervlm:keep=16", "--max-new-tokens", 4)
    for times in (result["plain"]["ms"], result["methods"][0]["ms"]):
        parts = [times[name] for name in ("encoder", "projector", "select", "prefill")]
        assert all(part > 0 for part in parts if part != times["select"])
        assert sum(parts) + 3 * (times["token"] or 0) <= times["total"]
    assert result["plain"]["ms"]["select"] == 0 < result["methods"][0]["ms"]["select"]


def test_a_plan_that_keeps_everything_gives_the_plain_answer(checkpoint):
    result = run(SCENE, "--model", checkpoint, "--method", "fastervlm:keep=100%")
    assert result["methods"][0]["same"] is True
    assert result["methods"][0]["answer"] == result["plain"]["answer"] != ""
    assert result["methods"][0]["flops"] == result["plain"]["flops"]


@pytest.mark.parametrize(("keep", "left"), [("16", 16), ("0.25", 16), ("25%", 16), ("1", 1)])
def test_keep_applies_to_a_method_that_is_named_alone(checkpoint, keep, left):
    result = run(SCENE, "--model", checkpoint, "--method", "divprune", "--method", "fastervlm", "--keep", keep)
    assert [m["tokens"]["visual"] for m in result["methods"]] == [left, left]


def test_positions_are_part_of_the_plan(checkpoint):
    result = run(SCENE, "--model", checkpoint, "--method", "fastervlm", "--keep", 16, "--positions", "compact")
    assert "positions=compact" in result["methods"][0]["plan"]


def test_a_picture_file_of_any_shape(checkpoint, tmp_path):
    Image.effect_noise((320, 150), 80).save(tmp_path / "noise.png")
    result = run(
        tmp_path / "noise.png", "what is this?", "--model", checkpoint, "--overlay", tmp_path / "out" / "kept.png"
    )
    assert result["truth"] is None
    assert "warning" not in result
    assert Image.open(tmp_path / "out" / "kept.png").width > 448
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept.png"]


def test_what_people_see(checkpoint, tmp_path):
    shown = winnow(
        *("run", SCENE, "--model", checkpoint, "--method", "fastervlm:keep=16", "--runs", 1),
        *("--overlay", tmp_path / "kept.png"),
    ).stdout
    for expected in ("right answer", "projected 64 → 16", "KV cache", "kept.png", "prefill (LM), ms", "evidence kept"):
        assert expected in shown.replace("\n", "")


def test_the_bundled_model_answers_its_own_world():
    result = run(SCENE, "--method", "fastervlm:keep=64")
    assert "warning" not in result
    assert result["model"] == "bundled reference model"


@pytest.fixture
def foreign(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    Image.effect_noise((300, 200), 80).convert("RGB").save(path)
    return path


def warned(*arguments: object) -> str:
    """The warning, which must be in the JSON and on stderr."""
    result = winnow("run", *arguments, "--runs", 1, "--json")
    warning = json.loads(result.stdout).get("warning", "")
    assert (warning in result.stderr) if warning else ("warning" not in result.stderr)
    return warning


def test_a_foreign_picture_gets_a_warning_and_a_checkpoint_to_use_instead(foreign):
    warning = warned(foreign, "is there a dog?")
    assert "knows only winnow's own world" in warning
    assert "--model llava-hf/llava-1.5-7b-hf" in warning


def test_words_that_the_bundled_model_does_not_know_get_a_warning():
    assert "zebracorn" in warned(SCENE, "is there a zebracorn?")


def test_an_exported_scene_is_recognised_and_a_painted_one_is_not(tmp_path):
    drawn = scene(7, split="test")
    save_picture(drawn, tmp_path / "scene.png")
    result = run(tmp_path / "scene.png")
    assert result["truth"] == drawn.questions[0].answer
    assert "warning" not in result

    data = (tmp_path / "scene.png").read_bytes()
    other = scene(8, split="test")
    save_picture(other, tmp_path / "other.png")
    stamp = slice(8, data.index(b"IDAT") - 4)
    pixels = (tmp_path / "other.png").read_bytes()
    forged = pixels[:8] + data[stamp] + pixels[pixels.index(b"IDAT") - 4 :]
    (tmp_path / "forged.png").write_bytes(forged)
    assert "knows only" in warned(tmp_path / "forged.png", "is there a dog?")


MISTAKES = {
    "unknown method": ([SCENE, "--method", "fastervlmm"], "fastervlm"),
    "unknown setting": ([SCENE, "--method", "fastervlm:kep=3"], "keep"),
    "keep of one": ([SCENE, "--keep", "1.0"], "100%"),
    "keep of nothing": ([SCENE, "--keep", "0"], "keeps nothing"),
    "keep of words": ([SCENE, "--keep", "many"], "cannot be read"),
    "keep twice": ([SCENE, "--keep", "3", "--method", "fastervlm:keep=4"], "exclude"),
    "positions": ([SCENE, "--positions", "sideways"], "compact"),
    "no such file": (["nowhere.png", "what?"], "not a readable file"),
    "a folder": ([".", "what?"], "regular file"),
    "a URL": (["https://example.com/cat.png", "what?"], "nothing is fetched"),
    "not a picture": (["pyproject.toml", "what?"], "not a picture"),
    "no question": (["tests/test_cli.py"], "not a picture"),
    "not a seed": (["world:seven"], "world:SEED"),
    "a seed out of range": (["world:99999999999999999999"], "outside"),
    "no such model": ([SCENE, "--model", "no/such-checkpoint"], "no/such-checkpoint"),
    "not a device": ([SCENE, "--device", "gpu"], "cpu"),
    "not a dtype": ([SCENE, "--dtype", "int8"], "bfloat16"),
    "not a device map": ([SCENE, "--device-map", "cuda"], "balanced"),
    "not a quantization": ([SCENE, "--quantization", "2bit"], "4bit"),
    "no revisions": ([SCENE, "--revision", "main"], "Hub id"),
    "not a picture name": ([SCENE, "--overlay", "kept.txt"], ".png"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments, says = MISTAKES[name]
    result = winnow("run", *arguments, "--json", code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("winnow: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


@pytest.mark.parametrize("question", ["", "   ", "look <image> here", "end </s>"])
def test_a_question_that_is_empty_or_holds_control_tokens_is_refused(checkpoint, foreign, question):
    assert winnow("run", foreign, question, "--model", checkpoint, code=2).stderr.count("\n") == 1


def test_what_the_cache_alone_saves_is_said(checkpoint):
    said = winnow("run", SCENE, "--model", checkpoint, "--method", "snapkv:keep=25%,window=4", "--runs", 1).stdout
    assert "snapkv:keep=25%,window=4: the cache alone is smaller" in said
    assert "nothing was dropped" in winnow("run", SCENE, "--model", checkpoint, "--method", "full", "--runs", 1).stdout


def test_an_overlay_that_cannot_be_written_says_so_and_leaves_nothing(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = (SCENE, "--model", checkpoint, "--runs", 1, "--overlay", tmp_path / "file" / "kept.png")
    assert "cannot be written" in winnow("run", *arguments, code=2).stderr
    (tmp_path / "kept.png").mkdir()
    winnow("run", *arguments[:-1], tmp_path / "kept.png", code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "kept.png"]


def test_usage_errors_are_told_apart_from_crashes():
    assert winnow("run", code=2).stdout == ""
    assert winnow("run", SCENE, "--runs", 0, code=2)
    assert winnow("no-such-command", code=2)


def test_interrupting_exits_with_130_and_no_traceback(monkeypatch, checkpoint):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_run, "compare", interrupted)
    assert winnow("run", SCENE, "--model", checkpoint, code=130).stderr == ""


def test_a_real_interrupt(tmp_path):
    command = [sys.executable, "-m", "winnow.cli", "world", "export", str(tmp_path / "many"), "-n", "1000000"]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("many/*.png")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors


@pytest.mark.parametrize("arguments", [("systems", "--json"), ("systems",), ("methods",), ("--help",)])
def test_a_reader_that_goes_away_causes_no_traceback(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "winnow.cli", *arguments]
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, env=ENVIRONMENT, cwd=ROOT
    )
    os.close(writing)
    assert done.stderr == ""


def test_json_is_all_that_is_on_stdout_and_nothing_is_on_stderr(checkpoint):
    done = shell("run", SCENE, "--model", checkpoint, "--runs", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["winnow"] == __version__
    assert done.stderr == ""


@pytest.mark.parametrize(
    "command", [["--help"], ["run", "--help"], ["methods"], ["systems"], ["systems", "--json"], ["--version"]]
)
def test_listings_import_no_torch(command):
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom winnow.cli import app\n"
        f"result = CliRunner().invoke(app, {command!r})\n"
        "print(result.exit_code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert done.stdout.split() == ["0", "False", "False"]


def test_methods_lists_the_registry():
    rows = json.loads(winnow("methods", "--json").stdout)
    assert {"slug", "stages", "kind", "family"} <= set(rows[0])
    assert {"fastervlm", "vtc-cls", "hiprune", "divprune", "todre", "visionzip", "fastv", "pyramiddrop"} <= {
        row["slug"] for row in rows
    }
    assert "fastervlm" in winnow("methods").stdout


def test_systems_lists_every_row_with_a_state():
    rows = json.loads(winnow("systems", "--json").stdout)
    assert len(rows) == 149
    assert {row["family"] for row in rows} == set("ABCDEFGHI")
    assert {row["state"] for row in rows} <= {"works", "partly", "none"}
    some = json.loads(winnow("systems", "--state", "none", "--json").stdout)
    assert {row["slug"] for row in some} == {row["slug"] for row in rows if row["state"] == "none"}
    assert "works" in winnow("systems", "--state", "sometimes", code=2).stderr


def test_doctor_runs_the_engines_checks(checkpoint):
    checks = json.loads(winnow("doctor", "--model", checkpoint, "--json").stdout)
    assert len(checks) >= 4
    assert all(check["ok"] is True for check in checks)
    assert "ok" in winnow("doctor", "--model", checkpoint).stdout


def test_doctor_fails_when_a_check_fails(checkpoint, monkeypatch):
    from winnow.engine import doctor

    monkeypatch.setattr(doctor, "diagnose", lambda *_: [doctor.Check("a [check]", False, "why")])
    assert "FAIL a [check]  why" in winnow("doctor", "--model", checkpoint, code=1).stdout


def test_world_show_and_export(tmp_path):
    winnow("world", "show", tmp_path / "sheet.png", "-n", 2, "--boxes")
    assert Image.open(tmp_path / "sheet.png").width > 224
    winnow("world", "export", tmp_path / "scenes", "-n", 2)
    assert len(list((tmp_path / "scenes").glob("*.png"))) == 2
    assert winnow("world", "export", tmp_path / "scenes", code=2).stderr.startswith("winnow: ")


def test_version():
    assert winnow("--version").stdout == f"winnow {__version__}\n"
