"""Selective S4's chooser as it was trained: what it keeps of long clips in which little happens, and what it is for."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from methods.connectors import frozen, of_method

from tests.learn.resuming import check_resumes
from tests.learn.tiny_video import tiny
from tests.methods.directional import gap
from winnow.learn.connectors.fit import fit
from winnow.learn.connectors.selective_s4 import KEPT, Recipe
from winnow.learn.longform.classifier import Selective
from winnow.learn.longform.clips import CLASSES, clip_record, enrichment, found_in, scores
from winnow.learn.toy import stacked
from winnow.parts.learned import SHIPPED_VIDEO, learned, untrained

SMALL = 0.025
CLIPS = 60


def test_a_run_is_its_seed_and_goes_on_where_it_stopped(tmp_path):
    model = str(tiny(tmp_path / "model"))
    whole = check_resumes(functools.partial(fit, "selective-s4"), tmp_path, stop=11, model=model, scale=SMALL, save=4)
    facts = json.loads(whole.with_suffix(".json").read_text())
    assert facts["measured"]["trained"]["tokens"] == 18


@functools.cache
def trained():
    info = frozen().info
    module = learned("selective-s4", None, info, lambda **sizes: Selective(info.width, CLASSES, **sizes))
    return frozen().model, module.eval()


@functools.cache
def told():
    """Long clips that nobody was trained on."""
    model, _ = trained()
    return stacked([clip_record(model, seed, "test") for seed in range(CLIPS)])


@functools.cache
def kept_by():
    """Scores of the tokens of these clips, by choice."""
    model, module = trained()
    clips = told()
    fresh = untrained(lambda: Selective(model.config.text_config.hidden_size, CLASSES, **Recipe.sizes))
    noise = torch.rand(clips["names"].shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return {
            "chosen": scores(module.choose, clips),
            "untrained": scores(fresh.choose, clips),
            "random": noise,
            "first": -torch.arange(noise.shape[1]).expand_as(noise).float(),
            "norm": clips["tokens"].float().norm(dim=-1),
        }


WORSE = ("untrained", "random", "first")


def _rich(name):
    """What is kept shows things at least twice as often as chance, and more often than what looks at nothing."""
    ours = enrichment(kept_by()[name], told()["names"], KEPT).numpy()
    assert ours.mean() > 2
    for other in WORSE:
        assert gap(ours, enrichment(kept_by()[other], told()["names"], KEPT).numpy()).low > 0, other


@pytest.mark.system("selective-s4", "directional")
@pytest.mark.xdist_group("connectors")
def test_a_tenth_of_the_tokens_shows_what_happens():
    _rich("chosen")


@pytest.mark.xdist_group("connectors")
@pytest.mark.parametrize("stub", WORSE)
def test_that_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _rich(stub)


@pytest.mark.system("selective-s4", "directional")
@pytest.mark.xdist_group("connectors")
@torch.no_grad()
def test_its_classifier_finds_more_in_chosen_tokens_than_in_random_ones():
    _, module = trained()
    found = {name: found_in(module, told(), score, KEPT).numpy() for name, score in kept_by().items()}
    for other in WORSE:
        assert gap(found["chosen"], found[other]).low > 0, other


@pytest.mark.system("selective-s4", "directional")
@pytest.mark.xdist_group("connectors")
def test_trained_scans_keep_more_answers_than_untrained_ones():
    found = of_method("selective-s4")
    assert found.tokens == 18
    assert found.over_untrained.low > 0


def test_what_is_shipped_says_how_it_was_made():
    facts = json.loads((SHIPPED_VIDEO / "selective-s4.json").read_text(encoding="utf-8"))
    assert facts["command"] == "winnow train selective-s4"
    assert (SHIPPED_VIDEO / "selective-s4.safetensors").stat().st_size < 1_500_000
    trained, untrained = (facts["measured"][name] for name in ("trained", "untrained"))
    for name in ("accuracy", "enrichment", "found_in_chosen"):
        assert trained[name] > untrained[name]
