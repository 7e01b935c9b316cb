"""Where the slots of a cache stand: at the positions with which the model turned their keys, whatever was dropped."""

from __future__ import annotations

import functools
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


LONG = torch.full((1, 150), 7)  # tokens, after which places have been forgotten more than once


@functools.cache
def whole_tables(build: str) -> tuple[dict[int, torch.Tensor], int]:
    """Layer → the positions of all that was read, and how much that was: of a cache from which nothing leaves."""
    model, inputs = zoo.model(build), zoo.samples(build, ("3 A 6",))[0]
    with witnessed() as views, winnow.compress(model, "divprune:keep=50% + a-witness-of-places"):
        layers = kvhand.written(model, inputs, LONG).past_key_values.layers
        tables = {view.layer: view.positions()[0, 0] for view in views}  # the last view of each layer
    (read,) = {layer.seen for layer in layers}
    assert all(len(layer.places.numbers) == read for layer in layers)
    return tables, read


@pytest.mark.parametrize("build", ["llava_clip", "qwen2_5_vl"])
@pytest.mark.parametrize("cache", ["knorm:keep=12,limit=12,every=1", "streaming-llm:keep=12,limit=12", "adakv:keep=12"])
def test_what_is_forgotten_of_places_is_what_no_head_holds(build: str, cache: str) -> None:
    """Places of held slots are those that the whole table had; in a stream the table would grow without end."""
    tables, read = whole_tables(build)
    model, inputs = zoo.model(build), zoo.samples(build, ("3 A 6",))[0]
    with witnessed() as views, winnow.compress(model, f"divprune:keep=50% + {cache} + a-witness-of-places"):
        held = kvhand.written(model, inputs, LONG).past_key_values.layers
        assert len(views) >= LONG.shape[1] * zoo.DEPTH
        for view in views:
            assert torch.equal(view.positions(), tables[view.layer][view.slots.long()])  # type: ignore[union-attr]
    for own in held:
        assert own.seen == read
        if "limit" in cache:
            assert len(own.places.numbers) <= 12 * own.store.heads + 64 < read


@pytest.mark.parametrize(
    "plan", ["expected-attention:keep=9,limit=9,every=2", "streaming-llm:keep=9,limit=9,shift=true"]
)
def test_samples_of_a_batch_keep_their_own_places_while_slots_leave(plan: str) -> None:
    rows = zoo.RAGGED[:2]  # of which the first is padded
    model, steps = zoo.model("llava_clip"), torch.full((2, 140), 7)
    with winnow.compress(model, f"divprune:keep=50% + {plan}"):
        batch = kvhand.written(model, zoo.inputs("llava_clip", rows), steps)
        for row, one in enumerate(zoo.samples("llava_clip", rows)):
            single = kvhand.written(model, one, steps[row : row + 1])
            for a, b in zip(batch.logits, single.logits, strict=True):
                torch.testing.assert_close(a[row], b[0], atol=1e-4, rtol=1e-4)  # sinks are turned at each token
