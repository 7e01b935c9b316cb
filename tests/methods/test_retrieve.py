"""Choosing the pictures that are nearest to a question, by features that are handed over."""

from __future__ import annotations

import pytest
import torch
import zoo
from picture_processors import QwenProcessor, asked, inputs_of, processor
from PIL import Image
from probes import forward

import winnow
from winnow.contract import PromptView, State
from winnow.core.errors import WinnowError
from winnow.core.step import Reduce
from winnow.methods.retrieve import Retrieve

QUESTION = torch.tensor([1.0, 0.0])
# Cosines with the question: 0.6, −1, 1, 0.6, 0, 0.8; lengths say nothing.
PAGES = torch.tensor([[3.0, 4.0], [-1.0, 0.0], [0.1, 0.0], [3.0, -4.0], [0.0, 9.0], [8.0, 6.0]])


def view_of(features=PAGES, question=QUESTION) -> PromptView:
    k = len(PAGES) if features is None else len(features)
    pixels = torch.zeros(1, k, 8, 8, 3, dtype=torch.uint8)
    sizes = torch.full((1, k, 2), 56)
    known = [None if x is None else x[None] for x in (features, question)]
    return PromptView(pixels, sizes, "what ?", *known)


def chosen(keep, view: PromptView) -> list[int]:
    (step,) = Retrieve(keep=keep).steps(None)  # type: ignore[arg-type]
    action, _ = step.act(view, State())
    assert isinstance(action, Reduce)
    return action.reduction.index[0].tolist()


@pytest.mark.system("retrieve", "exact")
@pytest.mark.parametrize(
    ("keep", "want"),
    [
        (1, [2]),
        (2, [2, 5]),
        (3, [0, 2, 5]),
        (4, [0, 2, 3, 5]),
        ("50%", [0, 2, 5]),
        (6, [*range(6)]),
        (9, [*range(6)]),
    ],
)
def test_the_nearest_pages_enter_in_their_own_order_and_of_equal_ones_the_earlier(keep, want):
    assert chosen(keep, view_of()) == want


@pytest.mark.system("retrieve", "exact")
def test_broken_features_come_last_and_are_counted():
    pages = PAGES.clone()
    pages[2] = torch.nan
    view = view_of(pages)
    assert chosen(3, view) == [0, 3, 5]
    assert int(view.notes["nan_scores"]) == 1


def finds_the_page(choose) -> None:
    """Of a hundred pages, the one that the question was made from is among three, however long its row is."""
    found = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        pages = torch.randn(100, 64, generator=generator) * torch.rand(100, 1, generator=generator).mul(9).add(1)
        page = int(torch.randint(0, 100, (1,), generator=generator))
        question = pages[page] / pages[page].norm() + 0.1 * torch.randn(64, generator=generator)
        found += page in choose(view_of(pages, question))
    assert found >= 19, found


@pytest.mark.system("retrieve", "directional")
def test_the_page_of_a_question_is_found():
    finds_the_page(lambda view: chosen(3, view))


def products(view: PromptView) -> list[int]:
    """A stub: products in the place of cosines."""
    return torch.einsum("bkd,bd->bk", view.features, -view.question_features)[0].topk(3).indices.tolist()


@pytest.mark.parametrize("stub", [products, lambda view: [0, 1, 2]])
def test_the_page_tells_a_stub(stub):
    with pytest.raises(AssertionError):
        finds_the_page(stub)


@pytest.mark.parametrize("view", [view_of(None), view_of(question=None), view_of(None, None)])
def test_features_are_needed(view):
    with pytest.raises(WinnowError, match=r"features=…, question_features=…"):
        chosen(2, view)


@pytest.mark.system("retrieve", "model")
@pytest.mark.parametrize("build", ["llava_clip", "llava_next", "qwen2_5_vl"])
def test_on_a_model_the_pages_that_enter_are_read_and_the_others_are_not(build):
    model, asking = zoo.model(build), processor(build)
    pages = [Image.effect_noise((56, 84 + 28 * i), 60).convert("RGB") for i in range(len(PAGES))]
    with winnow.compress(model, "retrieve:keep=2 + divprune:keep=3", processor=asking) as handle:
        entered = handle.prompt(asked(*pages), features=PAGES, question_features=QUESTION)
        with handle.using(handle.plan, prompt=entered):
            found = forward(model, inputs_of(asking, entered.messages)).logits
        items = handle.last.items
        with pytest.raises(WinnowError, match="question_features"):
            handle.prompt(asked(*pages))
    assert [(item.picture.number, len(item.kept)) for item in items] == [(2, 3), (5, 3)]
    with winnow.compress(zoo.model(build), "divprune:keep=3", processor=asking) as handle:
        assert torch.equal(found, forward(handle.model, inputs_of(asking, asked(pages[2], pages[5]))).logits)


def test_pages_that_enter_are_scaled_in_one_plan():
    model, asking = zoo.model("qwen2_5_vl"), QwenProcessor()
    pages = [Image.effect_noise((56, 84 + 28 * i), 60).convert("RGB") for i in range(len(PAGES))]
    with winnow.compress(model, "retrieve:keep=2 + downscale:keep=50%", processor=asking) as handle:
        handed = {"features": PAGES, "question_features": QUESTION}
        entered = handle.prompt(asked(*pages), **handed)
        with handle.using(handle.plan, prompt=entered):
            found = forward(model, inputs_of(asking, entered.messages)).logits
        items = handle.last.items
        with pytest.raises(WinnowError, match="question_features"):
            handle.prompt(asked(*pages))
    assert [item.picture.number for item in items] == [2, 5]
    assert [[slug for _, slug, _ in item.picture.steps] for item in items] == [["retrieve", "downscale"]] * 2
    sizes = {2: (28, 112), 5: (28, 140)}  # half of 5 × 2 and of 8 × 2 tokens
    by_hand = [pages[i].resize(size, Image.Resampling.BICUBIC) for i, size in sizes.items()]
    want = forward(zoo.model("qwen2_5_vl"), inputs_of(asking, asked(*by_hand))).logits
    assert torch.equal(found, want)
