"""Rotary positions stretched for a request, beside a plain model whose frequencies were set by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import zoo
from cases import same
from clips import CLIPS
from probes import forward, generate, step_logits

import winnow
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.models.families import unwrap

WINDOW = 9
PLAN = f"visual-context-window-extension:strides=[1.0],window={WINDOW}"
ROWS = {"llava_clip": ("3 A 6", "2 B 4 C 5"), "llava_next_video": ("3 W 6", "2 W 4 W 5")}


def of_build(build: str) -> tuple[Any, Any]:
    """The model, and what makes inputs for it."""
    return (CLIPS[build].model(), CLIPS[build]) if build in CLIPS else (zoo.model(build), zoo)


def samples(build: str, rows) -> list[dict[str, Any]]:
    return CLIPS[build].samples(rows) if build in CLIPS else zoo.samples(build, rows)


def visual(model: Any, sample: dict[str, Any]) -> int:
    """Placeholders of pictures and videos."""
    names = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
    known = {getattr(model.config, name, None) for name in names} - {None}
    return sum(int((sample["input_ids"] == token).sum()) for token in known)


def by_hand(build: str, scale: float, window: int = WINDOW) -> Any:
    """A plain model whose rotation was set, pair by pair."""
    model, _ = of_build(build)
    rotary = model.model.language_model.rotary_emb
    made = []
    for theta in rotary.inv_freq.tolist():
        turns = window * theta / (2 * math.pi)
        stay = min(1, max(0, (turns - 1) / 31))
        made.append((1 - stay) * theta / scale + stay * theta)
    rotary.inv_freq = torch.tensor(made)
    rotary.attention_scaling = 0.1 * math.log(scale) + 1
    return model


@pytest.mark.system("visual-context-window-extension", "model")
@pytest.mark.parametrize("build", ROWS)
def test_a_request_is_what_a_model_gives_whose_rotation_was_set_by_hand(build):
    """Prefill and what is decoded; and the model is as it was, once the plan is gone."""
    model, _ = of_build(build)
    for sample in samples(build, ROWS[build]):
        plain = generate(model, sample)
        scale = visual(model, sample) / WINDOW
        assert scale > 2
        want = generate(by_hand(build, scale), sample)
        with winnow.compress(model, PLAN) as handle:
            found = generate(model, sample)
            assert handle.last.notes["stretched"] == pytest.approx(scale)
        assert (step_logits(found) - step_logits(want)).abs().max() <= 1e-4
        assert (step_logits(found)[:, 0] - step_logits(plain)[:, 0]).abs().max() > 1e-2
        assert same(generate(model, sample), plain)


def test_rows_of_a_batch_have_scales_of_their_own():
    model, parts = zoo.model("llava_clip"), zoo.samples("llava_clip", ("3 A 6", "11", "2 B 4 C 5"))
    with winnow.compress(model, PLAN):
        together = generate(model, zoo.collate(parts))
        for row, part in enumerate(parts):
            alone = generate(model, part)
            assert (step_logits(together)[row] - step_logits(alone)[0]).abs().max() <= 1e-4


def test_where_there_are_no_more_tokens_than_the_window_nothing_changes():
    model, sample = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    plain = generate(model, sample)
    for plan in ("visual-context-window-extension", PLAN.replace(f"={WINDOW}", f"={visual(model, sample)}")):
        with winnow.compress(model, plan):
            assert same(generate(model, sample), plain)
    with winnow.compress(model, PLAN):
        text = zoo.sample("llava_clip", "9")
        assert same(generate(model, text), generate(zoo.model("llava_clip"), text))


def test_beams_and_tokens_that_left_before():
    """The scale follows from what reaches the language model."""
    model, sample = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    with winnow.compress(model, "divprune:keep=18 + " + PLAN) as handle:
        generate(model, sample, num_beams=2)
        assert handle.last.notes["stretched"] == pytest.approx(18 / WINDOW)


def test_a_later_turn_goes_on_as_it_began_under_any_plan():
    model, sample = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    later = torch.randint(10, 200, (1, 4), generator=torch.Generator().manual_seed(0))
    hand = by_hand("llava_clip", visual(model, sample) / WINDOW)
    first = forward(hand, sample, use_cache=True)
    want = forward(hand, {"input_ids": later}, past_key_values=first.past_key_values).logits
    for plan in (PLAN, "full"):
        with winnow.compress(model, PLAN) as handle:
            cache = forward(model, sample, use_cache=True).past_key_values
            with handle.using(plan):
                found = forward(model, {"input_ids": later}, past_key_values=cache).logits
        assert (found - want).abs().max() <= 1e-4


def test_a_later_turn_that_needs_more_is_refused():
    model = zoo.model("llava_clip")
    first, second = zoo.sample("llava_clip", "6"), zoo.sample("llava_clip", "3 A 6")
    second.pop("attention_mask")
    with winnow.compress(model, PLAN):
        cache = forward(model, first, use_cache=True).past_key_values
        with pytest.raises(WinnowError, match=r"say the largest scale in advance \(scale=…\)"):
            forward(model, second, past_key_values=cache)


def test_a_fixed_scale_is_that_of_every_request():
    model, text = zoo.model("llava_clip"), zoo.sample("llava_clip", "9")
    with winnow.compress(model, PLAN + ",scale=3.0"):
        for row in ("9", "3 A 6"):
            sample = zoo.sample("llava_clip", row)
            want = generate(by_hand("llava_clip", 3.0), sample)
            assert (step_logits(generate(model, sample)) - step_logits(want)).abs().max() <= 1e-4
        second = zoo.sample("llava_clip", "3 A 6")
        second.pop("attention_mask")
        hand = by_hand("llava_clip", 3.0)
        caches = [forward(m, text, use_cache=True).past_key_values for m in (model, hand)]
        pairs = zip((model, hand), caches, strict=True)
        found, want = (forward(m, second, past_key_values=cache).logits for m, cache in pairs)
        assert (found - want).abs().max() <= 1e-4
    assert same(generate(model, text), generate(zoo.model("llava_clip"), text))


def test_what_is_not_understood_is_refused():
    with pytest.raises(UnsupportedError, match="one plain rotation of 1-D positions"):
        winnow.compress(zoo.model("qwen2_5_vl"), PLAN)
    winnow.compress(zoo.model("qwen2_5_vl"), "visual-context-window-extension:window=none").detach()
    model = zoo.model("llava_clip")
    with pytest.raises(UnsupportedError, match="methods of the cache turn keys"):
        winnow.compress(model, PLAN + " + snapkv:keep=20%")
    with pytest.raises(WinnowError, match="stretches positions twice"):
        winnow.compress(model, PLAN + " + " + PLAN.replace("window=9", "window=8"))
    with pytest.raises(UnsupportedError, match=r"use winnow\.compress"):
        winnow.prepare(model, zoo.sample("llava_clip", "3 A 6"), PLAN)
    assert unwrap(model) is model
