"""Where the slots of a cache stand: at the positions with which the model turned their keys, whatever was dropped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import winnow
from tests import kvhand, zoo
from tests.kvseen import projected, witnessed
from winnow.contract import KVView


@pytest.fixture
def views() -> Iterator[list[KVView]]:
    with witnessed() as seen:
        yield seen


PICTURES = ("", "divprune:keep=50% + ", "divprune:keep=50% + fastv:layer=2,keep=25% + ")


@pytest.mark.parametrize("build", ["llava_clip", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("pictures", PICTURES)
def test_turned_back_by_their_places_queries_and_keys_have_no_phase(
    build: str, pictures: str, views: list[KVView]
) -> None:
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    with winnow.compress(model, pictures + "a-witness-of-places"):
        kvhand.written(model, inputs, torch.full((3, 3), 7))
    prompts = [view for view in views if view.moment == "prefill"]
    assert len(prompts) == 3 * zoo.DEPTH  # samples of unequal length
    for view in prompts:
        for own, at, name in (
            (view.queries, view.query_positions()[:, None], "q_proj"),
            (view.keys, view.positions(), "k_proj"),
        ):
            back = view.turned(own, -at.expand(-1, own.shape[1], *at.shape[2:]))
            torch.testing.assert_close(back, projected(view, name), atol=2e-4, rtol=1e-4)
    for view in (view for view in views if view.moment == "decode"):
        steps = view.positions().diff(dim=2)[:, :, -1]
        assert (steps == 1).all()  # text behind the prompt
        assert torch.equal(view.query_positions(), view.positions()[:, 0, -1:])
    axes = 1 + (build == "qwen2_5_vl")
    assert all(view.positions().ndim == 2 + axes for view in views)


@pytest.mark.parametrize("build", ["llava_clip", "qwen2_5_vl"])
def test_numbered_as_they_were_read_they_would_have_one(build: str, views: list[KVView]) -> None:
    """Behind a reduction, the number of tokens that are left is another thing than a position."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    with winnow.compress(model, "divprune:keep=50% + a-witness-of-places"):
        model(**inputs)
    gaps = [view for view in views if view.layer == 0 and view.positions().diff(dim=2).amax() > 1]
    assert gaps
    for view in gaps:
        back = view.turned(view.keys, -view.slots)  # type: ignore[operator]
        assert (back - projected(view, "k_proj")).abs().max() > 0.1


@torch.no_grad()
def test_sinks_follow_the_window_to_where_it_stands(views: list[KVView]) -> None:
    model, (inputs,) = zoo.model("llava_clip"), zoo.samples("llava_clip", ("3 A 6",))
    image = "divprune:keep=25%"
    with winnow.compress(model, f"{image} + a-witness-of-places"):
        model(**inputs)
    plain = views[0]
    with winnow.compress(model, f"{image} + streaming-llm:keep=9,n_sink=2,shift=true"):
        held = model(**inputs).past_key_values.layers[0].store
    at, window = plain.positions(), plain.positions()[..., -7:]
    shift = window[..., :1] - 2 + torch.arange(2) - at[..., :2]
    wanted = torch.cat([plain.turned(plain.keys[:, :, :2], shift), plain.keys[:, :, -7:]], 2)
    torch.testing.assert_close(held.keys, wanted)
    assert (shift != plain.n - 9).all()  # as it would be, counted in slots


def test_a_batch_with_pictures_keeps_what_its_samples_keep() -> None:
    build = "qwen2_5_vl"
    model, steps = zoo.model(build), torch.full((3, 3), 7)
    with winnow.compress(model, "divprune:keep=50% + expected-attention:keep=40%"):
        batch = kvhand.written(model, zoo.inputs(build, zoo.RAGGED), steps)
        for row, one in enumerate(zoo.samples(build, zoo.RAGGED)):
            single = kvhand.written(model, one, steps[row : row + 1])
            for a, b in zip(batch.logits, single.logits, strict=True):
                torch.testing.assert_close(a[row], b[0], atol=2e-5, rtol=1e-5)


def test_places_are_taken_back_with_what_is_cropped(views: list[KVView]) -> None:
    model, (inputs,) = zoo.model("llava_clip"), zoo.samples("llava_clip", ("3 A 6",))
    with winnow.compress(model, "divprune:keep=50% + a-witness-of-places"), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        for token in (7, 8, 9):
            model(input_ids=torch.tensor([[token]]), past_key_values=cache)
        before = views[-1].positions()[..., :-2]
        cache.crop(-3)
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    assert torch.equal(views[-1].positions(), before)
