"""The recipe as a whole: a run of about a minute learns something; a run that was cut off goes on as if it had not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tests.learn.workers_of_tests import two_steps
from winnow import reference, world
from winnow.core.errors import WinnowError
from winnow.learn import checkpoint, evaluate, tower
from winnow.learn.checkpoint import read_checkpoint
from winnow.learn.language import Keep, Mix
from winnow.learn.progress import Log, draw_curves, read
from winnow.learn.recipes import curriculum
from winnow.learn.recipes import reference as recipe
from winnow.learn.run import MAX_SEED, Options, Run
from winnow.media import open_image
from winnow.reference.build import make_model
from winnow.reference.presets import preset

# One to three coloured shapes and nothing else: what a model of 0.2 million parameters can learn within a minute.
SHAPES_ONLY = world.Spec(
    things=(1, 3), group=0.2, shapes=1.0, labelled=(0.0,), chart=0.0, document=0.0, clutter=(0, 0), blobs=(0, 0)
)
SIMPLE = ("color", "place", "presence")
MAIN_STEPS = 300


@pytest.fixture(scope="module")
def micro_run(tmp_path_factory):
    """All stages of the recipe on the easy scenes, nearly all steps in the tower and in the simple questions."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tower, "CROWDED", SHAPES_ONLY)
        patch.setattr(tower, "TEXT", SHAPES_ONLY)
        patch.setattr(recipe, "tower_stages", lambda scale: curriculum.tower_stages(0.2))
        patch.setattr(recipe, "language_stages", lambda scale: easy_stages())
        return recipe.train("micro", tmp_path_factory.mktemp("run"), tower_batch=12, every=5, quiet=True)


def easy_stages() -> list[curriculum.LanguageStage]:
    mix = Mix(((1.0, SHAPES_ONLY),), dict.fromkeys(SIMPLE, 3))
    stages = [replace(stage, mix=mix, gate={}, batch=16) for stage in curriculum.language_stages(0.01)]
    return [replace(stage, steps=MAIN_STEPS) if stage.name == "finish" else stage for stage in stages]


# The run is a minute of one core that nobody else uses, and may be ten where others do.
@pytest.mark.full
@pytest.mark.timeout(1500)
def test_a_run_of_a_minute_learns_a_simple_type_and_leaves_a_model_that_answers(micro_run):
    rows = read(micro_run.parent / "log.jsonl")
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    assert stages == [stage.name for stage in (*curriculum.tower_stages(1), *curriculum.language_stages(1))]
    tower = [row["loss"] for row in rows if row["stage"].startswith("tower")]
    answers = [row["answer"] for row in rows if "answer" in row]
    assert tower[-1] < 0.7 * tower[0]
    assert answers[-1] < 0.5 * answers[0]
    model = LlavaForConditionalGeneration.from_pretrained(micro_run, dtype=torch.float32).eval()
    sample = evaluate.draw_sample(150, types=SIMPLE, spec=SHAPES_ONLY)
    tokens = evaluate.visual_tokens(model, [drawn.pixels for drawn in sample.scenes])
    seen = evaluate.by_type(sample, evaluate.answers_right(model, tokens, sample.questions))
    blind = evaluate.by_type(sample, evaluate.answers_right(model, tokens[:, :0], sample.questions))
    best = evaluate.majority(sample)
    gain = {kind: seen[kind] - max(blind[kind], best[kind]) for kind in SIMPLE}
    assert max(gain.values()) > 0.15, (seen, blind, best)  # 150 questions: more than three standard errors

    processor = AutoProcessor.from_pretrained(micro_run)
    drawn = world.scene(0, split="test")
    assert reference.answer(model, processor, drawn.image, drawn.questions[0].text)
    assert open_image(micro_run.parent / "curves.png").size == (960, 480)


QUICK = {"tower_batch": 2, "every": 1, "save": 2, "quiet": True}


class Cut(Exception):
    """Stands for a power cut."""


def short_stages(monkeypatch) -> None:
    """Three stages of a few steps: one of the tower, alignment, one of answers."""
    tower = curriculum.TowerStage("tower", 4, keep=0.4)
    language = [replace(s, batch=2) for s in curriculum.language_stages(0.01) if s.name in ("align", "finish")]
    monkeypatch.setattr(recipe, "tower_stages", lambda scale: [tower])
    monkeypatch.setattr(recipe, "language_stages", lambda scale: language)


@pytest.fixture
def shares(monkeypatch):
    """The share of the tokens that each step keeps, and where their places end."""
    return spied(monkeypatch)


def spied(monkeypatch) -> list[tuple[float, int]]:
    kept = []
    draw = Keep.draw

    def spy(self, rng, targets):
        index, offsets, end = draw(self, rng, targets)
        kept.append((index.shape[1] / targets.shape[-1], end))
        return index, offsets, end

    monkeypatch.setattr(Keep, "draw", spy)
    return kept


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, shares): an uninterrupted run of the short stages, which others are compared with."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        short_stages(patch)
        kept = spied(patch)
        folder = recipe.train("micro", tmp_path_factory.mktemp("short") / "whole", **QUICK).parent
    return folder, kept


COMPARED = pytest.mark.xdist_group("whole")  # the run is made once, by one worker


@COMPARED
@pytest.mark.parametrize("cut_after", [3, 9, 20])
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not(tmp_path, monkeypatch, whole, cut_after):
    short_stages(monkeypatch)
    written = 0
    write = Log.write

    def cut(self, *arguments, **more):
        nonlocal written
        written += 1
        if written == cut_after:
            raise Cut
        write(self, *arguments, **more)

    monkeypatch.setattr(Log, "write", cut)
    with pytest.raises(Cut):
        recipe.train("micro", tmp_path / "cut", **QUICK)
    recipe.train("micro", tmp_path / "cut", resume=True, **QUICK)
    want, parts = (torch.load(at / "checkpoint.pt", weights_only=True) for at in (whole[0], tmp_path / "cut"))
    assert parts["stage"] == want["stage"] == 3
    assert parts["images"] == want["images"]
    for name, value in want["model"].items():
        assert torch.equal(value, parts["model"][name]), name


def test_a_run_is_not_started_over_another(tmp_path, monkeypatch):
    short_stages(monkeypatch)
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(WinnowError, match="resume"):
        recipe.train("micro", tmp_path)
    with pytest.raises(WinnowError, match="small"):
        recipe.train("large", tmp_path / "other")
    with pytest.raises(WinnowError, match="seed"):
        recipe.train("micro", tmp_path / "other", seed=MAX_SEED)
    for scale in (0, -1, float("nan"), float("inf")):
        with pytest.raises(WinnowError, match="above 0"):
            recipe.train("micro", tmp_path / "other", scale=scale)
    with pytest.raises(WinnowError, match="not on this machine"):
        recipe.train("micro", tmp_path / "other", device="tpu")


def test_processes_are_for_cpus(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "device_of", lambda _: None)  # as on a machine with a GPU
    with pytest.raises(WinnowError, match="processes=1"):
        recipe.train("micro", tmp_path, device="cuda", processes=2)


@COMPARED
def test_a_run_in_pieces_is_the_same_run(tmp_path, monkeypatch, whole):
    short_stages(monkeypatch)
    for until in ("tower", "tower", "align", ""):  # naming a stage that is done runs nothing
        recipe.train("micro", tmp_path / "parts", resume=True, until=until, **QUICK)
        assert read_checkpoint(tmp_path / "parts" / "checkpoint.pt")["stage"] == {"tower": 1, "align": 2, "": 3}[until]
    want, parts = (read_checkpoint(at / "checkpoint.pt")["model"] for at in (whole[0], tmp_path / "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in want.items())


@COMPARED
def test_a_run_may_begin_with_the_tower_of_another(tmp_path, monkeypatch, whole):
    """Then it equals a run that pretrained the same tower itself."""
    short_stages(monkeypatch)
    recipe.train("micro", tmp_path / "given", tower=whole[0], **QUICK)
    own, given = (read_checkpoint(at / "checkpoint.pt")["model"] for at in (whole[0], tmp_path / "given"))
    assert all(torch.equal(value, given[name]) for name, value in own.items())
    assert {row["stage"] for row in read(tmp_path / "given" / "log.jsonl")} == {"align", "finish"}


def test_a_run_may_begin_with_the_tower_of_a_saved_model(tmp_path, monkeypatch, whole):
    """It is taken as it was saved, in bfloat16, and the stages of the tower are left out."""
    short_stages(monkeypatch)
    recipe.train("micro", tmp_path / "given", tower=whole[0] / "model", until="align", **QUICK)
    own, given = (read_checkpoint(at / "checkpoint.pt")["model"] for at in (whole[0], tmp_path / "given"))
    tower = [name for name in own if name.startswith("model.vision_tower.")]
    assert tower
    assert all(torch.equal(own[name].bfloat16().float(), given[name]) for name in tower)
    assert {row["stage"] for row in read(tmp_path / "given" / "log.jsonl")} == {"align"}
    with pytest.raises(WinnowError, match="another preset"):
        recipe.train("small", tmp_path / "other", tower=whole[0] / "model", **QUICK)


@COMPARED
def test_without_dropout_every_step_keeps_all_tokens(tmp_path, monkeypatch, whole, shares):
    short_stages(monkeypatch)
    assert min(share for share, _ in whole[1]) < 0.8
    recipe.train("micro", tmp_path / "without", dropout=False, **QUICK)
    assert set(shares) == {(1.0, 64)}


def test_without_its_objective_nothing_is_learned_from_cls(tmp_path, monkeypatch):
    """The layer behind the patch features and the read-out of [CLS] stay as they began; the rest learns."""
    short_stages(monkeypatch)
    begun = make_model(preset("micro"), 0).state_dict()
    for name, objective in (("with", True), ("without", False)):
        recipe.train("micro", tmp_path / name, cls_objective=objective, until="tower", **QUICK)
        ended = read_checkpoint(tmp_path / name / "checkpoint.pt")["model"]
        changed = {key for key in ended if not torch.equal(ended[key], begun[key])}
        assert any("encoder.layers.1." in key for key in changed)
        assert any("encoder.layers.2." in key for key in changed) == objective  # of three layers the last


def test_a_run_does_not_go_on_as_another(tmp_path, monkeypatch):
    short_stages(monkeypatch)
    recipe.train("micro", tmp_path / "run", until="tower", **QUICK)
    for change, said in (
        ({"seed": 1}, "seed 0"),
        ({"dropout": False}, "dropout True"),
        ({"cls_objective": False}, "cls_objective"),
        ({"until": "towers"}, "tower, align, finish"),
    ):
        with pytest.raises(WinnowError, match=said):
            recipe.train("micro", tmp_path / "run", resume=True, **QUICK | change)
    with pytest.raises(WinnowError, match="another preset"):
        recipe.train("small", tmp_path / "run", resume=True, **QUICK)
    with pytest.raises(WinnowError, match="another preset"):
        recipe.train("small", tmp_path / "other", tower=tmp_path / "run", **QUICK)
    with pytest.raises(WinnowError, match="holds no run"):
        recipe.train("micro", tmp_path / "other", tower=tmp_path / "nothing", **QUICK)
    whole = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"not a checkpoint at all"):
        (tmp_path / "run" / "checkpoint.pt").write_bytes(broken)
        with pytest.raises(WinnowError, match="not a whole checkpoint"):
            recipe.train("micro", tmp_path / "run", resume=True, **QUICK)
    assert not (tmp_path / "other").exists()


def test_a_tower_is_not_taken_before_it_is_trained(tmp_path, monkeypatch):
    short_stages(monkeypatch)
    monkeypatch.setattr(Log, "write", raise_cut)
    with pytest.raises(Cut):
        recipe.train("micro", tmp_path / "run", **QUICK | {"every": 3})
    with pytest.raises(WinnowError, match="still in its tower"):
        recipe.train("micro", tmp_path / "other", tower=tmp_path / "run", **QUICK)


def raise_cut(*_, **__):
    raise Cut


def test_processes_share_a_batch_of_the_same_scenes(tmp_path, monkeypatch):
    alone = Run(preset("micro"), Options(tmp_path, seed=3))
    alone.stage = 2
    drawn = [range(alone.seeds(step, 12), alone.seeds(step, 12) + alone.share(12)) for step in range(3)]
    shared = []
    monkeypatch.setattr("winnow.learn.run.world", lambda: 3)
    for step in range(3):
        for number in range(3):
            monkeypatch.setattr("winnow.learn.run.rank", lambda number=number: number)
            shared.append(range(alone.seeds(step, 12), alone.seeds(step, 12) + alone.share(12)))
    assert [seed for part in shared for seed in part] == [seed for part in drawn for seed in part]


def test_a_mistake_is_told_before_processes_start(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "launch", lambda *_: pytest.fail("processes were started"))
    with pytest.raises(WinnowError, match="divisor"):
        recipe.train("micro", tmp_path / "run", processes=3)
    with pytest.raises(WinnowError, match="holds no run"):
        recipe.train("micro", tmp_path / "run", processes=2, tower=tmp_path)


ORPHANS = """
import sys
from pathlib import Path
from winnow.learn.workers import launch
from tests.learn.workers_of_tests import wait_for_the_end
if __name__ == "__main__":
    launch(wait_for_the_end, 2, sys.argv[1])
"""


def test_workers_end_with_the_process_that_started_them(tmp_path):
    """Also when that one is killed: nothing trains on behind a user's back."""
    program = tmp_path / "program.py"
    program.write_text(ORPHANS)
    root = str(Path(__file__).parents[2])
    with subprocess.Popen([sys.executable, program, tmp_path], env=os.environ | {"PYTHONPATH": root}) as parent:
        wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2, 120)
        parent.kill()
    workers = [int(path.stem) for path in tmp_path.glob("*.pid")]
    wait_until(lambda: not any(map(alive, workers)), 30)


def wait_until(what, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come in time"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not collected by its new parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_two_processes_agree_with_each_other(tmp_path):
    """Gradients are averaged: after a run of two processes the written model is that of both."""
    from winnow.learn.workers import launch

    launch(two_steps, 2, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["images"] != second["images"]
    assert torch.equal(first["weight"], second["weight"])


def test_curves_are_drawn_from_any_log(tmp_path):
    log = Log(tmp_path, quiet=True)
    for step in range(4):
        log.write("first" if step < 2 else "second", step, {"place": step / 4, "loss": 4.0 - step})
    draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    empty = tmp_path / "empty.png"
    draw_curves(tmp_path / "none.jsonl", empty)
    assert open_image(empty).size == (960, 480)
    assert (tmp_path / "curves.png").read_bytes() != empty.read_bytes()
