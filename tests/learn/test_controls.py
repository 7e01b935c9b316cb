"""The part of the card that compares: runs, towers, methods on two models."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from winnow.bench import processes
from winnow.core.errors import WinnowError
from winnow.learn import card, card_page, controls, evaluate
from winnow.learn.recipes import curriculum
from winnow.learn.recipes import reference as recipe
from winnow.models.load import load

pytestmark = pytest.mark.xdist_group("controls")  # the runs are made once, by one worker

QUICK = {"tower_batch": 2, "every": 1, "quiet": True}
BRIEF = {"threads": 1, "max_new_tokens": 2, "checked": 0}  # what is answered is not looked at
SHARES = ["0.5", "0.25", "0.125", "0.05"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three micro runs of a few steps: the recipe, its twin without dropout on the same tower, the dense tower."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "tower_stages", lambda scale: curriculum.tower_stages(0.005))
        patch.setattr(recipe, "language_stages", lambda scale: [replace(curriculum.language_stages(0.01)[-1], batch=2)])
        recipe.train("micro", folder / "plain", seed=2, **QUICK)
        recipe.train("micro", folder / "twin", seed=2, dropout=False, tower=folder / "plain", **QUICK)
        recipe.train("micro", folder / "dense", seed=2, cls_objective=False, until="tower-full", **QUICK)
    return folder


@pytest.fixture(scope="module")
def stores(runs):
    """`winnow bench` on the run and on its twin."""
    made = []
    for name in ("plain", "twin"):
        store = runs / f"{name}.sqlite"
        sweep = processes.Sweep(
            str(store), ("fastervlm",), processes.budgets_of("16"), str(runs / name / "model"), None, 6, **BRIEF
        )
        processes.run_all(sweep, 1, progress=False)
        made.append(store)
    return tuple(made)


def test_a_card_with_its_controls(runs, stores):
    folder = runs / "plain" / "model"
    made = card.make(
        folder,
        preset="micro",
        seed=2,
        log=runs / "plain" / "log.jsonl",
        per_type=3,
        page=runs / "page.md",
        runs=[runs / "plain", runs / "twin"],
        dense=runs / "dense",
        stores=stores,
    )
    held = made["controls"]
    plain, twin = held["runs"]
    assert (plain["seed"], plain["dropout"], twin["seed"], twin["dropout"]) == (2, True, 2, False)
    assert plain["overall"] == made["overall"]
    assert plain["dropping"] == made["dropping"]
    for what in ("recall", "accuracy"):
        assert list(held["towers"][what]) == ["shipped", "dense heads only", "untrained", "random"]
        assert all(list(row) == SHARES for row in held["towers"][what].values())
    assert held["towers"]["recall"]["random"]["0.5"] > held["towers"]["recall"]["random"]["0.05"]
    assert held["towers"]["named"]["shipped"].keys() == {"patch", "word", "tens", "color"}
    assert held["methods"]["questions"] == 6
    assert {row["label"] for row in held["methods"]["without_dropout"]} >= {"full", "fastervlm", "random-M"}
    assert made["not_run"] == ["spread over three training seeds (here: 1)", "the preset base"]
    page = (runs / "page.md").read_text()
    assert page == card_page.page(json.loads((folder / "card.json").read_text()))
    for said in ("seed 2, no dropout", "## Methods on the twin", "| dense heads only | recall |", "16 tokens, twin"):
        assert said in page


def test_the_tokens_of_cls_are_those_of_the_tower(runs):
    """The same as the highest [CLS] attention of the feature layer, read from the tower itself."""
    model, processor = load(runs / "plain" / "model", device="cpu", dtype="float32")
    sample = evaluate.draw_sample(1)
    kept = controls.kept_by_cls(model, processor, sample, 9)
    model.set_attn_implementation("eager")
    pixels = processor(images=[s.image for s in sample.scenes], text=["<image>"] * len(sample.scenes), padding=True,
                       return_tensors="pt")["pixel_values"]  # fmt: skip
    with torch.no_grad():
        seen = model.model.vision_tower(pixels, output_attentions=True).attentions[-2][:, :, 0, 1:].mean(1)
    assert torch.equal(kept, seen.topk(9).indices.sort(-1).values)


def test_recall_is_a_share_of_the_evidence():
    sample = evaluate.draw_sample(2)
    everything = torch.arange(64).expand(len(sample.scenes), -1)
    assert controls.recall(sample, everything, 8) == 1
    left = torch.arange(0, 64, 2).expand(len(sample.scenes), -1)
    right = torch.arange(1, 64, 2).expand(len(sample.scenes), -1)
    assert controls.recall(sample, left, 8) + controls.recall(sample, right, 8) == pytest.approx(1)
    assert 0 < controls.recall(sample, left, 8) < 1


def test_what_is_no_control_is_refused(runs, stores, tmp_path):
    model, processor = load(runs / "plain" / "model", device="cpu", dtype="float32")
    sample = evaluate.draw_sample(1)
    with pytest.raises(WinnowError, match="--no-cls-objective"):
        controls.towers(model, processor, sample, None, None, runs / "plain" / "log.jsonl", runs / "twin")
    other = tmp_path / "other.sqlite"
    sweep = processes.Sweep(
        str(other), ("fastervlm",), processes.budgets_of("16"), str(runs / "twin" / "model"), None, 4, **BRIEF
    )
    processes.run_all(sweep, 1, progress=False)
    with pytest.raises(WinnowError, match="different questions"):
        controls.methods(stores[0], other)
    with pytest.raises(WinnowError, match="There is no store"):
        controls.methods(stores[0], tmp_path / "none.sqlite")
