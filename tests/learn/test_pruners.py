"""Training of learned methods: one seed decides everything, a stopped run goes on as if it had not been stopped, and
the weights belong to the model that they were trained on."""

from __future__ import annotations

import functools
import json

import pytest
from typer.testing import CliRunner

import winnow
from tests.learn.resuming import check_resumes
from winnow import reference, world
from winnow.cli import app
from winnow.core.errors import WinnowError
from winnow.core.registry import method_class
from winnow.learn.pruners import frozen, trainable
from winnow.learn.pruners.fit import fit
from winnow.learn.run import export
from winnow.models.load import load
from winnow.reference.presets import preset

SMALL = 0.021  # of the recipes: a few questions and steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory, micro):
    target = tmp_path_factory.mktemp("micro")
    export(micro, preset("micro"), target)
    return target


@pytest.mark.parametrize("slug", trainable())
def test_a_run_is_its_seed_and_goes_on_where_it_stopped(slug, folder, tmp_path):
    whole = check_resumes(functools.partial(fit, slug), tmp_path, stop=7, model=str(folder), scale=SMALL, save=4)
    facts = json.loads(whole.with_suffix(".json").read_text())
    assert facts["held_out"] == 2
    assert set(facts["measured"]) == {"trained", "untrained"}
    model, processor = load(str(folder), device="cpu", dtype="float32")
    text = reference.prompt("what color is the dog?")
    sample = processor(images=world.scene(1).image, text=text, return_tensors="pt")
    with winnow.compress(model, f"{slug}:weights={whole}", processor=processor) as handle:
        model(**sample)
        assert handle.last.items[0].n_visual == 64
    with pytest.raises(WinnowError, match="trained for another model"):
        winnow.compress(load(device="cpu")[0], f"{slug}:weights={whole}")


def test_training_sees_no_scene_of_the_bench_nor_of_the_shipped_models_training():
    task = frozen.questions(40, seed=3)
    assert all(ask.image.startswith("world:train:") for ask in task.questions)
    seeds = {int(ask.image.split(":")[2]) for ask in task.questions}
    assert min(seeds) >= frozen.FIRST + 3 * frozen.APART
    assert max(seeds) < frozen.FIRST + 4 * frozen.APART
    assert max(sum(a.image == b.image for b in task.questions) for a in task.questions) <= frozen.PER_SCENE


def test_all_that_is_trained_is_a_learned_method_with_weights_and_a_command():
    for slug in trainable():
        assert "weights" in method_class(slug).settings()
        assert f"winnow train {slug}" in (method_class(slug).__doc__ or "")
    said = CliRunner().invoke(app, ["train", "--help"]).output
    assert all(slug in said for slug in trainable())
    assert CliRunner().invoke(app, ["train", "nothing"]).exit_code == 2
    with pytest.raises(WinnowError, match="not trained by winnow"):
        fit("fastv")
