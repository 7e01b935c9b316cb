"""Pictures that plans of the tower encode once: the same as encoding each batch, and nothing shared that differs."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from tests import zoo
from winnow.bench import shared_pictures
from winnow.bench.requests import Batches, Request, joined
from winnow.bench.reuse import Encoded, listening
from winnow.bench.shared_layers import SharedLayers
from winnow.bench.shared_pictures import SharedPictures
from winnow.bench.tasks import Ask
from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.core.plan import Plan
from winnow.core.registry import method_class
from winnow.engine.compress import compress
from winnow.engine.encoding import record_of

from .conftest import BASELINES

SPECS = ("tome", "visionzip", "prumerge", "flowcut", "token-transforming", "fastervlm", "fastv", "visiondrop",
         "visionzip:keep=70% + fastervlm:keep=40%", "tome:r=2 + fastv:layer=1,keep=50%")  # fmt: skip


def _ask(number, picture):
    return Ask(str(number), "", "", "", picture)


def _requests(build, count):
    """One question about each of `count` pictures of equal shapes, and two more about the first and the last."""
    made = [zoo.inputs(build, ("3 A 6",), seed=seed) for seed in range(count)]
    own = [Request(_ask(seed, f"picture {seed}"), inputs, (), ()) for seed, inputs in enumerate(made)]
    return own, [own[-1], own[0], own[-1], own[1 % count]]


def _plans(handle, content):
    found = {}
    for spec in SPECS:
        try:
            alone = None if "+" in spec else method_class(spec).configured().at_budget(Budget("40%"), content)
            plan = Plan.of(alone or spec)
            handle.bind(plan)
        except WinnowError:
            continue
        found[spec] = plan
    return found


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_batch_gets_what_it_would_have_encoded(build):
    model = zoo.model(build)
    pictures, asked = _requests(build, 3)
    shared = set()
    with compress(model, Plan(())) as handle, SharedLayers(handle) as layers, torch.no_grad():
        plans = _plans(handle, zoo.tokens_of(build, "A"))
        reader = listening(handle, list(plans.values()))
        kept = SharedPictures(handle, reader, layers)
        kept.encode(plans.values(), pictures, rows=4)
        encoded = Encoded(handle, reader, inputs := joined(asked))
        for spec, plan in plans.items():
            with handle.using(plan):
                found, wanted = kept.under(plan, asked), encoded.under(plan)
                if found is None:
                    continue
                shared.add(spec)
                assert len(found.pooler_output) == len(wanted.pooler_output) == len(asked)
                for a, b in zip(found.pooler_output, wanted.pooler_output, strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
                assert record_of(found).layouts == record_of(wanted).layouts
                given = {name: x for name, x in inputs.items() if not name.startswith("pixel")}
                states, items = [], []
                for output in (found, wanted):
                    states.append(model(**given, mm_encoder_outputs={"image": output}).logits)
                    items.append(handle.last.items)
                torch.testing.assert_close(*states, rtol=0, atol=1e-4)
                for a, b in zip(*items, strict=True):
                    assert torch.equal(a.kept, b.kept)
                    assert a.row == b.row
                    torch.testing.assert_close(a.provenance().to_matrix(), b.provenance().to_matrix())
    acting = plans.keys() - {"fastervlm", "fastv"}
    assert len(acting) > 5 or build != "llava_clip"
    assert shared == (acting if not handle.bound.family.joined else set())


def test_every_picture_is_encoded_once_for_each_plan_of_the_tower(monkeypatch):
    model = zoo.model("llava_clip")
    pictures, asked = _requests("llava_clip", 5)
    calls = []
    plain = shared_pictures.encode
    monkeypatch.setattr(
        shared_pictures, "encode", lambda call, given: (calls.append(len(given["pixel_values"])), plain(call, given))[1]
    )
    with compress(model, Plan(())) as handle, SharedLayers(handle) as layers, torch.no_grad():
        plans = [Plan.of(spec) for spec in ("visionzip:keep=5", "fastv:keep=50%", "tome:r=2", "visionzip:keep=5")]
        kept = SharedPictures(handle, listening(handle, plans), layers)
        kept.encode(plans, pictures, rows=2)
        assert calls == [2] * 3 * 3, "three calls of two pictures, of the reader and of two plans"
        assert kept.under(plans[1], asked) is None
        strange = dataclasses.replace(asked[0], ask=_ask(9, "picture 9"))
        assert kept.under(plans[0], [asked[0], strange]) is None
        kept.encode(plans, pictures[:2], rows=2)
        assert kept.under(plans[0], asked) is None, "those of the window before are forgotten"


def test_a_plan_that_fails_is_left_to_its_batches(monkeypatch):
    pictures, asked = _requests("llava_clip", 3)
    plain = shared_pictures.encode
    with compress(zoo.model("llava_clip"), Plan(())) as handle, SharedLayers(handle) as layers, torch.no_grad():
        plans = [Plan.of("visionzip:keep=5"), Plan.of("tome:r=2")]

        calls = itertools.count()

        def failing(call, given):
            if next(calls) % 3 == 1:  # the first plan, behind the reader
                raise WinnowError("not this one")
            return plain(call, given)

        monkeypatch.setattr(shared_pictures, "encode", failing)
        kept = SharedPictures(handle, listening(handle, plans), layers)
        kept.encode(plans, pictures, rows=2)
        assert kept.under(plans[0], asked) is None
        assert kept.under(plans[1], asked) is not None


def test_windows_have_each_question_once_and_no_picture_twice():
    asks = [_ask(number, f"picture {number * 7 % 10}") for number in range(40)]
    whole = tuple(sorted(asks, key=lambda ask: ask.image))
    cut = Batches(4, (tuple(asks[:25]), tuple(asks[25:])), (), (whole,))
    assert [window.alike for window in cut.windows(1)] == [cut.batches]
    for count in (2, 3, 10, 99):
        windows = cut.windows(count)
        assert len(windows) == min(count, 10)
        for parts in ([window.alike for window in windows], [window.whole for window in windows]):
            assert sorted(ask.id for part in parts for own in part for ask in own) == sorted(ask.id for ask in asks)
            pictures = [{ask.image for own in part for ask in own} for part in parts]
            assert sum(map(len, pictures)) == 10
            assert all(len(own) <= 4 for part in parts for own in part)


def test_batches_of_whole_pictures_part_none_that_fits():
    counts = {"a": 3, "b": 2, "c": 1, "d": 6, "e": 2}
    asks = [_ask(f"{name}{n}", name) for name, count in counts.items() for n in range(count)]
    (window,) = Batches(4, (tuple(asks),), (), (tuple(asks),)).windows(1)
    made = ["".join(ask.image for ask in own) for own in window.whole]
    assert made == ["aaa", "bbc", "dddd", "ddee"]


def test_windows_have_room_for_their_pictures(monkeypatch):
    asks = [_ask(number, f"picture {number:02}") for number in range(30)]
    asked = Batches(4, (tuple(asks),), ())
    with compress(zoo.model("llava_clip"), Plan(())) as handle, SharedLayers(handle) as layers:
        plans = [Plan.of(spec) for spec in ("visionzip:keep=5", "fastv:keep=50%", "tome:r=2")]
        kept = SharedPictures(handle, Plan(()), layers)
        width = handle.model.config.text_config.hidden_size
        monkeypatch.setattr(shared_pictures, "BYTES", 7 * 2 * 16 * width * 4)
        counts = {
            "two plans of the tower": len(kept.windows(asked, plans, 16)),
            "for two processes": len(kept.windows(asked, plans, 16, 2)),
            "one plan of the tower": len(kept.windows(asked, plans[1:], 16)),
            "none": len(kept.windows(asked, plans[1:2], 16)),
            "none, for two processes": len(kept.windows(asked, plans[1:2], 16, 2)),
            "pictures of 100 times the tokens": len(kept.windows(asked, plans, 1600)),
        }
    assert list(counts.values()) == [5, 6, 3, 1, 2, 30]


def test_a_sweep_is_the_same_with_and_without_shared_pictures(sweep, exported, monkeypatch):
    methods = ("fastv", "visionzip", "tome", "flowcut")
    shared, _ = sweep("shared.sqlite", methods=methods, baselines=BASELINES, checked=8)
    monkeypatch.setattr(shared_pictures, "BYTES", 1)
    alone, _ = sweep("alone.sqlite", methods=methods, baselines=BASELINES, checked=8)
    assert exported(shared) == exported(alone)


def test_clips_are_left_to_their_batches():
    pictures, asked = _requests("qwen2_5_vl", 2)
    clips = [
        dataclasses.replace(one, inputs={n.replace("pixel_values", "pixel_values_videos").replace("image", "video"): x
                                         for n, x in one.inputs.items()})
        for one in pictures
    ]  # fmt: skip
    with compress(zoo.model("qwen2_5_vl"), Plan(())) as handle, SharedLayers(handle) as layers, torch.no_grad():
        plan = Plan.of("tome:r=2")
        kept = SharedPictures(handle, listening(handle, [plan]), layers)
        kept.encode([plan], pictures, rows=2)
        assert kept.under(plan, asked) is not None
        kept.encode([plan], clips, rows=2)
        assert kept.under(plan, clips) is None
