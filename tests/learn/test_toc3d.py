"""ToC3D by its card, on a detector of winnow's: routing by history leaves the grid whole and finds what matters."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.learn.resuming import check_resumes
from tests.methods.directional import gap
from winnow.cli import app
from winnow.learn.detection import blocks
from winnow.learn.detection.blocks import TOKENS, unwindowed, windowed
from winnow.learn.detection.detector import Detector, Memory, centers
from winnow.learn.detection.drives import as_record, precision, recall
from winnow.learn.detection.toc3d import KEPT, at, followed, load, scores, shown, train
from winnow.parts.history import MOTION, MotionQueries, QueryScores, moved, waves
from winnow.parts.learned import SHIPPED
from winnow.world.streets import drive

SMALL = 0.012
DRIVES = 120


def images(b=2, seed=0):
    return torch.rand(b, 4, 64, 64, 3, generator=torch.Generator().manual_seed(seed))


def remembered(b=2, width=64, queries=16, seed=1):
    g = torch.Generator().manual_seed(seed)
    pose = torch.eye(4)[:3].expand(b, -1, -1).clone()
    points = torch.randn(b, queries, 3, generator=g)
    content = torch.randn(b, queries, width, generator=g)
    return Memory(content, points, torch.zeros(b, queries, 2), pose, torch.full((b,), 0.5))


@pytest.mark.system("toc3d", "exact")
@torch.no_grad()
def test_keeping_all_is_the_plain_detector_with_and_without_history():
    made = Detector().eval()
    plain = made(images(), ratios=None)
    for memory in (None, remembered()):
        whole = made(images(), memory, ratios=(1.0, 1.0))
        assert torch.equal(whole.kinds, plain.kinds)
        assert torch.equal(whole.values, plain.values)
    less = made(images(), remembered())
    assert less.kinds.shape == plain.kinds.shape == (2, TOKENS, 4)
    assert less.features.shape == plain.features.shape
    assert not torch.equal(less.kinds, plain.kinds)


@pytest.mark.system("toc3d", "exact")
@torch.no_grad()
def test_windows_keep_equal_shares_of_one_camera_each(monkeypatch):
    numbers = torch.arange(TOKENS)[None, :, None].float()
    for side in (4, 8):
        own = windowed(numbers, side)
        assert torch.equal(unwindowed(own, side, 1), numbers)
        assert all(len({int(t) // 64 for t in window.flatten()}) == 1 for window in own)
    seen = []

    def counting(x, score, keep, attention, mlp, **more):
        seen.append((x.shape[1], keep))
        return x

    monkeypatch.setattr(blocks, "slow_fast", counting)
    Detector()(images(), remembered())
    assert seen == [(16, 16), (16, 8), (64, 32), (16, 5), (16, 5), (64, 20)]


@pytest.mark.system("toc3d", "exact")
@torch.no_grad()
def test_scores_by_queries_are_the_formula_written_out():
    torch.manual_seed(0)
    made = QueryScores(6, 8, 3)
    x, q, mask = torch.randn(2, 5, 6), torch.randn(2, 3, 8), torch.rand(2, 5)
    got = made(x, q, mask)
    for b in range(2):
        for n in range(5):
            own = made.project(mask[b, n] * x[b, n])
            products = torch.stack([own @ q[b, k] / 8**0.5 for k in range(3)])
            logits = made.judge(products)
            torch.testing.assert_close(got[b, n], logits - logits.logsumexp(0))


@torch.no_grad()
def test_queries_know_where_points_are_now():
    pose = torch.tensor([[[0.0, -1, 0, 2], [1, 0, 0, 3], [0, 0, 1, 0]]])
    assert moved(torch.tensor([[[1.0, 5, 4]]]), pose).tolist() == [[[-3, 4, 4]]]
    assert waves(torch.zeros(1, MOTION)).shape[-1] == 180
    made, memory = MotionQueries(64, 14.0), remembered()
    given = memory.content, memory.points, memory.velocity, memory.elapsed
    here, there = made(*given, memory.pose), made(*given, memory.pose + torch.eye(3, 4) * 0.5)
    assert here.shape == memory.content.shape
    assert not torch.allclose(here, there)


def test_targets_speak_of_the_centres_of_things():
    record = as_record(drive(2, frames=2))
    for moment in range(2):
        own = at({name: x[None] for name, x in record.items()}, moment)
        where = own["kind"][0] >= 0
        found = centers(own["values"])[0][where]
        things = own["things"][0][own["things"][0][:, 0].isfinite(), :3]
        assert torch.cdist(found, things).amin(1).max() < 1e-3


def test_precision_counts_each_object_once():
    made = as_record(drive(2, frames=2))
    own = at({name: x[None] for name, x in made.items()}, 0)
    kinds = torch.full((1, TOKENS, 4), -9.0)
    where = (own["kind"][0] >= 0).nonzero()[:, 0]
    kinds[0, where, own["kind"][0, where]] = 9.0
    found = Detector()(images(1), ratios=None)
    perfect = type(found)(kinds, own["values"], found.features, (), ())
    things = own["things"]
    seen = torch.cdist(centers(own["values"])[0][where], things[0, :, :3].nan_to_num(1e3)).amin(0) < 1
    assert precision(perfect, things)[0] >= 0.7 * float(seen.sum()) / float(things[0, :, 0].isfinite().sum())
    assert precision(type(found)(-kinds, 0 * own["values"], found.features, (), ()), things)[0] < 0.2


def test_a_run_is_its_seed_and_goes_on_where_it_stopped(tmp_path):
    whole = check_resumes(train, tmp_path, stop=7, scale=SMALL, save=4)
    assert sum(p.numel() for p in load(whole).parameters()) == sum(p.numel() for p in Detector().parameters())


def test_it_has_a_command():
    assert "toc3d" in CliRunner().invoke(app, ["train", "--help"]).output


@functools.cache
def told():
    """Both moments of drives that nobody was trained on."""
    records = [as_record(drive(seed, frames=2, split="test")) for seed in range(DRIVES)]
    return {name: torch.stack([own[name] for own in records]) for name in records[0]}


@functools.cache
def found_by():
    """The share of the tokens that show objects among the best 30 %, for each way to rank them."""
    now = at(told(), 1)
    ranked = scores(load(), told())
    ranked["untrained"] = scores(load("untrained"), told())["history_first"]
    return {name: recall(score, now["inside"], KEPT) for name, score in ranked.items()}


WORSE = ("norm_first", "random", "untrained")


def _finds(ours):
    """History of another drive is not among what is worse: on this toy a token's look gives an object away."""
    for other in WORSE:
        assert gap(ours, found_by()[other]).low > 0, other


@pytest.mark.system("toc3d", "directional")
@pytest.mark.xdist_group("samples")
def test_history_finds_objects_where_norms_and_chance_do_not():
    _finds(found_by()["history_first"])


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", WORSE)
def test_that_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _finds(found_by()[stub])


def precisions(made):
    with torch.no_grad():
        _, second = followed(made, told())
        return precision(second, at(told(), 1)["things"])


@pytest.mark.system("toc3d", "directional")
@pytest.mark.xdist_group("samples")
def test_trained_selectors_leave_more_precision_than_untrained_ones():
    trained, blind = load(), load()
    untrained = load("untrained")
    for name in ("by_history", "by_token", "motion", "remember"):
        setattr(blind, name, getattr(untrained, name))
    ours = precisions(trained)
    assert gap(ours, precisions(blind)).low > 0
    assert gap(ours, precisions(untrained)).low > 0
    with torch.no_grad():
        plain = precision(trained(shown(told()["images"][:, 1]), ratios=None), at(told(), 1)["things"])
    assert gap(ours, plain).low > -0.1


def test_what_is_shipped_says_how_it_was_made():
    facts = json.loads((SHIPPED / "toc3d.json").read_text(encoding="utf-8"))
    assert facts["command"] == "winnow train toc3d"
    assert (SHIPPED / "toc3d.safetensors").stat().st_size < 1_000_000
    assert facts["measured"]["trained"]["recall_history_first"] > facts["measured"]["untrained"]["recall_history_first"]
    assert np.isfinite(list(facts["measured"]["trained"].values())).all()
