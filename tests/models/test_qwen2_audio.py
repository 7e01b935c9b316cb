"""Sounds as items of Qwen2-Audio, against the plain model: what is kept, and nothing else, is read."""

from __future__ import annotations

import builds
import pytest
import torch
from builds.qwen_audio import FRAMES, WINDOW, tokens
from cases import same
from families import RAGGED, by_hand, content, picks
from masked import Cut
from probes import Halve, Pick, forward, generate, new_tokens, step_logits

import winnow
from winnow.bench.baselines import baseline_plan
from winnow.core.errors import UnsupportedError, WinnowError

TOLERANCE = 1e-5  # of the largest logit: two orders of the same sums in float32
POINTS = ("projected", "layers[1]", "layers[2]")


@pytest.fixture(scope="module")
def own():
    return builds.every()["qwen2_audio"]


def apart(got, want) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("at", POINTS)
def test_keep_all_is_bit_identical(own, at):
    model, inputs = own.model(), own.batch(RAGGED)
    plain, logits = generate(model, inputs), forward(model, inputs).logits
    with winnow.compress(model, Pick(keep="100%", at=at)):
        assert torch.equal(forward(model, inputs).logits, logits)
        assert same(generate(model, inputs), plain)
    assert torch.equal(forward(model, inputs).logits, logits)
    assert "forward" not in model.model.audio_tower.__dict__


@pytest.mark.parametrize("keep", ["40%", 1])
@pytest.mark.parametrize("at", POINTS)
def test_a_subset_equals_the_plain_model_that_cannot_read_the_rest(own, at, keep):
    """Rows without a sound, with one and with two, padded on the left."""
    model, parts = own.model(), own.samples(RAGGED)
    inputs = own.collate(parts)
    plain = step_logits(generate(model, inputs, steps=1))
    with winnow.compress(model, Pick(keep=keep, at=at)) as handle:
        output, ledger = generate(model, inputs), handle.last
    logits, said = step_logits(output), new_tokens(output, inputs)
    layer = 0 if at == "projected" else int(at[7])
    for row, part in enumerate(parts):
        items = [item for item in ledger.items if item.row == row]
        positions = content(model, part, items)
        cut = Cut(layer, picks(keep, [len(own) for own in positions]))
        want = by_hand(model, part, positions, said[row, :-1].tolist(), cut)
        assert apart(logits[row], want.logits) <= TOLERANCE, row
        assert tuple(own[row] for own in ledger.layer_tokens) == want.lengths
        kept = [own[item.kept].tolist() for own, item in zip(positions, items, strict=True)]
        assert kept == [own.tolist() for own in want.kept]
    assert (logits[0, 0] - plain[0, 0]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("keep", ["40%", 1])
@pytest.mark.parametrize("at", POINTS)
def test_padding_on_the_right_changes_nothing(own, at, keep):
    model, parts = own.model(), own.samples(RAGGED)
    right = own.collate(parts, side="right")
    last = right["attention_mask"].sum(1) - 1
    with winnow.compress(model, Pick(keep=keep, at=at)):
        logits = forward(model, right).logits
        for row, part in enumerate(parts):
            assert apart(logits[row, last[row]], forward(model, part).logits[0, -1]) <= TOLERANCE


def test_a_batch_equals_its_samples(own):
    model, parts = own.model(), own.samples(RAGGED)
    with winnow.compress(model, "divprune:keep=3") as handle:
        logits, ledger = forward(model, own.collate(parts)).logits[:, -1], handle.last
        for row, part in enumerate(parts):
            assert apart(logits[row], forward(model, part).logits[0, -1]) <= TOLERANCE
            kept = [item.kept.tolist() for item in ledger.items if item.row == row]
            assert kept == [item.kept.tolist() for item in handle.last.items]


def test_padding_is_no_part_of_a_sound_and_a_token_covers_forty_milliseconds(own):
    model, inputs = own.model(), own.batch(("3 A 6", "2 B 4 C 5"))
    with winnow.compress(model, Halve(at="layers[0]")) as handle:
        forward(model, inputs)
    found = {item.layout.n: item for item in handle.last.items}
    assert sorted(found) == sorted(tokens(frames) for frames in FRAMES.values())
    assert max(found) < WINDOW // 4, "the encoder gave more tokens than the longest sound has"
    item = found[tokens(FRAMES["B"])]
    assert item.modality == "audio"
    starts, stops = item.layout.times.T
    assert stops[-1] == pytest.approx(0.04 * item.layout.n)
    assert (stops - starts).tolist() == pytest.approx([0.04] * item.layout.n)
    assert starts[1:].tolist() == pytest.approx(stops[:-1].tolist())


def test_what_lies_in_the_padding_changes_nothing(own):
    model, sample = own.model(), own.sample("3 A 6")
    other = dict(sample)
    noise = torch.randn_like(sample["input_features"]) * (1 - sample["feature_attention_mask"])[:, None]
    other["input_features"] = sample["input_features"] + noise
    with winnow.compress(model, "divprune:keep=3") as handle:
        forward(model, sample)
        kept = handle.last.items[0].kept.tolist()
        # The last frame of the sound sees one of the padding, through the convolutions of the encoder.
        other["input_features"][..., : FRAMES["A"] + 4] = sample["input_features"][..., : FRAMES["A"] + 4]
        forward(model, other)
    assert handle.last.items[0].kept.tolist() == kept


def test_one_placeholder_for_a_whole_sound_is_refused(own):
    """The older prompt of the class, which it lengthens inside."""
    model, sample = own.model(), own.sample("3 A 6")
    ids = sample["input_ids"][0]
    first = int((ids == model.config.audio_token_id).nonzero()[0])
    stay = (ids != model.config.audio_token_id) | (torch.arange(len(ids)) == first)
    short = sample | {"input_ids": ids[stay][None], "attention_mask": torch.ones(1, int(stay.sum()), dtype=torch.int64)}
    assert forward(model, short).logits.shape[1] == len(ids), "the plain class lengthens it"
    with winnow.compress(model, Pick(keep=3)), pytest.raises(UnsupportedError, match="1 audio placeholders for"):
        forward(model, short)


def test_the_encoder_alone_has_no_mask_and_is_refused(own):
    model, sample = own.model(), own.sample("3 A 6")
    with winnow.compress(model, Pick(keep=3)), pytest.raises(UnsupportedError, match="feature_attention_mask"):
        model.model.audio_tower(sample["input_features"])


def test_the_loudest_tokens_are_those_of_the_loudest_mel_frames(own):
    model, sample = own.model(), own.sample("2 B 4 C 5")
    plan = baseline_plan("drop-low-energy", "40%")
    with winnow.compress(model, plan) as handle:
        forward(model, sample)
    for item, mels in zip(handle.last.items, sample["input_features"], strict=True):
        level = mels[:, : 4 * item.n_visual].mean(0).reshape(-1, 4).mean(1)
        count = len(item.kept)
        assert item.kept.tolist() == level.topk(count).indices.sort().values.tolist()
        assert count < item.n_visual or item.n_visual == 1


@pytest.mark.parametrize("plan", ["speechprune:left=40%", "a-tome:keep=40%", "audio-pool:k=2", "audio-segments"])
def test_what_is_left_of_a_sound_is_in_order_and_its_gaps_are_in_the_ledger(own, plan):
    model, inputs = own.model(), own.batch(("3 A 6", "2 B 4 C 5"))
    with winnow.compress(model, plan) as handle:
        forward(model, inputs)
    for item in handle.last.items:
        assert item.times().diff().gt(0).all()
        assert 0 <= item.longest_dropped() <= 0.04 * (item.n_visual - 1)
        assert item.longest_dropped() == 0 or plan.startswith("speechprune")


def test_methods_that_look_at_a_vision_tower_are_refused(own):
    with pytest.raises(WinnowError, match="no vision tower"):
        winnow.compress(own.model(), "hiprune:keep=3")


def test_a_forward_that_somebody_wrapped_is_put_back(own):
    model, sample = own.model(), own.sample("3 A 6")
    plain, calls = model.model.audio_tower.forward, []

    def wrapped(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    model.model.audio_tower.forward = wrapped
    with winnow.compress(model, Pick(keep=3)) as handle:
        forward(model, sample)
        assert len(handle.last.items[0].kept) == 3
    assert calls == [1]
    assert model.model.audio_tower.forward is wrapped
