"""The recipe as a whole: a run of about a minute learns something; a run that was cut off goes on as if it had not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from winnow import reference, world
from winnow.core.errors import WinnowError
from winnow.learn import evaluate, tower
from winnow.learn.language import Mix
from winnow.learn.progress import Log, draw_curves, read
from winnow.learn.recipes import curriculum
from winnow.learn.recipes import reference as recipe
from winnow.media import open_image

# One to three coloured shapes and nothing else: what a model of 0.2 million parameters can learn within a minute.
SHAPES_ONLY = world.Spec(
    things=(1, 3), group=0.2, shapes=1.0, labelled=(0.0,), chart=0.0, document=0.0, clutter=(0, 0), blobs=(0, 0)
)
SIMPLE = ("color", "place", "presence")
MAIN_STEPS = 420


@pytest.fixture(scope="module")
def micro_run(tmp_path_factory):
    """All stages of the recipe on the easy scenes, nearly all steps in the tower and in the simple questions."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tower, "CROWDED", SHAPES_ONLY)
        patch.setattr(tower, "TEXT", SHAPES_ONLY)
        patch.setattr(recipe, "tower_stages", lambda scale: curriculum.tower_stages(0.35))
        patch.setattr(recipe, "language_stages", lambda scale: easy_stages())
        return recipe.train("micro", tmp_path_factory.mktemp("run"), tower_batch=24, every=5, quiet=True)


def easy_stages() -> list[curriculum.LanguageStage]:
    mix = Mix(((1.0, SHAPES_ONLY),), dict.fromkeys(SIMPLE, 3))
    stages = [replace(stage, mix=mix, gate={}, batch=16) for stage in curriculum.language_stages(0.01)]
    return [replace(stage, steps=MAIN_STEPS) if stage.name == "finish" else stage for stage in stages]


@pytest.mark.timeout(300)
def test_a_run_of_a_minute_learns_a_simple_type(micro_run):
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


def test_a_run_leaves_a_model_that_answers(micro_run):
    model = LlavaForConditionalGeneration.from_pretrained(micro_run).float().eval()
    processor = AutoProcessor.from_pretrained(micro_run)
    drawn = world.scene(0, split="test")
    assert reference.answer(model, processor, drawn.image, drawn.questions[0].text)
    assert open_image(micro_run.parent / "curves.png").size == (960, 480)


class Cut(Exception):
    """Stands for a power cut."""


def short_stages(monkeypatch) -> None:
    """Three stages of a few steps: one of the tower, alignment, one of answers."""
    tower = curriculum.TowerStage("tower", 4, keep=0.4)
    language = [replace(s, batch=2) for s in curriculum.language_stages(0.01) if s.name in ("align", "finish")]
    monkeypatch.setattr(recipe, "tower_stages", lambda scale: [tower])
    monkeypatch.setattr(recipe, "language_stages", lambda scale: language)


@pytest.mark.parametrize("cut_after", [3, 9, 20])
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not(tmp_path, monkeypatch, cut_after):
    short_stages(monkeypatch)
    options = {"tower_batch": 2, "every": 1, "save": 2, "quiet": True}
    recipe.train("micro", tmp_path / "whole", **options)
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
        recipe.train("micro", tmp_path / "cut", **options)
    recipe.train("micro", tmp_path / "cut", resume=True, **options)
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "cut"))
    assert parts["stage"] == whole["stage"] == 3
    assert parts["images"] == whole["images"]
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name


def test_a_run_is_not_started_over_another(tmp_path, monkeypatch):
    short_stages(monkeypatch)
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(WinnowError, match="resume"):
        recipe.train("micro", tmp_path)
    with pytest.raises(WinnowError, match="small"):
        recipe.train("large", tmp_path / "other")
    with pytest.raises(WinnowError, match="seed"):
        recipe.train("micro", tmp_path / "other", seed=recipe.MAX_SEED)
    with pytest.raises(WinnowError, match="processes=1"):
        recipe.train("micro", tmp_path / "other", device="cuda", processes=2)


def test_two_processes_agree_with_each_other(tmp_path):
    """Gradients are averaged: after a run of two processes the written model is that of both."""
    from winnow.learn.workers import launch

    launch(_two_steps, 2, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["images"] != second["images"]
    assert torch.equal(first["weight"], second["weight"])


def _two_steps(folder: str) -> None:
    from winnow.learn.optim import Optimizer
    from winnow.learn.workers import average_gradients, rank

    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    optimizer = Optimizer([layer], 1e-2, 1e-2)
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(rank()))
    for _ in range(2):
        layer(inputs).square().mean().backward()
        average_gradients(optimizer.parameters)
        optimizer.step(1.0)
    torch.save({"weight": layer.weight.data, "images": float(inputs.sum())}, f"{folder}/{rank()}.pt")


def test_curves_are_drawn_from_any_log(tmp_path):
    log = Log(tmp_path, quiet=True)
    for step in range(4):
        log.write("first" if step < 2 else "second", step, {"place": step / 4, "loss": 4.0 - step})
    draw_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    empty = tmp_path / "empty.png"
    draw_curves(tmp_path / "none.jsonl", empty)
    assert open_image(empty).size == (960, 480)
    assert (tmp_path / "curves.png").read_bytes() != empty.read_bytes()
