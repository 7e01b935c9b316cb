"""The shipped model and its card."""

from __future__ import annotations

import json

import pytest
import torch

from winnow import reference, world
from winnow.core.errors import WinnowError
from winnow.learn import card, card_page, evaluate


@pytest.fixture(scope="module")
def shipped():
    torch.set_num_threads(1)
    return reference.load()


@pytest.fixture(scope="module")
def shipped_card():
    return json.loads((reference.path() / "card.json").read_text())


def test_the_model_is_small(shipped):
    model, _ = shipped
    assert sum(p.numel() for p in model.parameters()) <= 12_000_000
    assert sum(p.stat().st_size for p in reference.path().glob("*.safetensors")) <= 30_000_000
    assert model.config.text_config.num_hidden_layers >= 8
    assert model.dtype == torch.float32


def test_it_answers_through_generate_as_the_card_says(shipped, shipped_card):
    """Four questions of each type through the processor and `generate`: within 3 standard errors of the card."""
    model, processor = shipped
    sample = evaluate.draw_sample(4, seed=50_000)
    right = [reference.answer(model, processor, s.image, q.text) == q.answer for s, q in sample.flat]
    rate, said = sum(right) / len(right), shipped_card["overall"]
    assert abs(rate - said) < 3 * (said * (1 - said) / len(right)) ** 0.5 + 0.02


def test_it_needs_the_picture(shipped, shipped_card):
    model, _ = shipped
    sample = evaluate.draw_sample(10, seed=60_000)
    tokens = evaluate.visual_tokens(model, [s.pixels for s in sample.scenes])
    swapped = evaluate.by_type(sample, evaluate.answers_right(model, tokens.roll(1, 0), sample.questions))
    own = evaluate.by_type(sample, evaluate.answers_right(model, tokens, sample.questions))
    assert own["overall"] > swapped["overall"] + 0.25


def test_the_card_has_its_fields(shipped_card):
    assert shipped_card["questions"] >= 2000
    assert set(shipped_card["per_type"]) == set(world.TYPES)
    for row in shipped_card["per_type"].values():
        assert row["blind"] == max(row["no_image"], row["majority"])
        assert row["target"] == pytest.approx((row["accuracy"] - row["blind"]) / (1 - row["blind"]), abs=2e-3)
    assert shipped_card["generate_check"]["questions"] >= 50
    assert shipped_card["generate_check"]["agree"] >= shipped_card["generate_check"]["questions"] - 1
    assert len(shipped_card["depth_of_use"]["before_layer"]) == shipped_card["layers"] + 1


def test_a_card_can_be_made_of_any_model(tmp_path, micro):
    from winnow.learn.run import export
    from winnow.reference.presets import preset

    export(micro, preset("micro"), tmp_path)
    made = card.make(tmp_path, per_type=2, page=tmp_path / "page.md")
    assert made == json.loads((tmp_path / "card.json").read_text())
    assert made["training"] is None
    page = (tmp_path / "page.md").read_text()
    assert page == card_page.page(made)
    assert all(f"| {kind} |" in page for kind in world.TYPES)


def test_a_model_that_is_not_shipped_is_refused():
    with pytest.raises(WinnowError, match="small"):
        reference.load("large")
