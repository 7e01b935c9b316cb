"""Sounds of Qwen2.5-Omni: items for methods of sounds alone, beside pictures that these leave as they are."""

from __future__ import annotations

import builds
import pytest
import torch
from builds.qwen_omni import SOUND
from cases import same
from families import by_hand, picks
from masked import Cut
from probes import Pick, forward, generate, new_tokens, step_logits

import winnow
from winnow.core.errors import UnsupportedError

TOLERANCE = 1e-5  # of the largest logit: two orders of the same sums in float32
ROWS = ("3 U 6", "2 A 3 U 5", "9", "2 U 4 B 5")


class Heard(Pick):
    """As `Pick`, of sounds."""

    modalities = ("audio",)


@pytest.fixture(scope="module")
def own():
    return builds.every()["qwen2_5_omni_thinker"]


def apart(got, want) -> float:
    return float((got - want).abs().max() / want.abs().max())


def sounds(model, sample) -> list[torch.Tensor]:
    """The positions of the tokens of the sound of a sample, if there is one."""
    at = (sample["input_ids"][0] == model.config.audio_token_id).nonzero()[:, 0]
    return [at] if len(at) else []


@pytest.mark.parametrize("at", ["projected", "layers[1]"])
def test_keep_all_is_bit_identical(own, at):
    model, inputs = own.model(), own.batch(ROWS)
    plain, logits = generate(model, inputs), forward(model, inputs).logits
    with winnow.compress(model, Heard(keep="100%", at=at)) as handle:
        assert torch.equal(forward(model, inputs).logits, logits)
        assert sorted(item.modality for item in handle.last.items) == ["audio"] * 3 + ["image"] * 2
        assert same(generate(model, inputs), plain)


@pytest.mark.parametrize("keep", ["40%", 1])
@pytest.mark.parametrize("at", ["projected", "layers[1]", "layers[2]"])
def test_a_subset_equals_the_plain_model_that_cannot_read_the_rest(own, at, keep):
    model, parts = own.model(), own.samples(ROWS)
    inputs = own.collate(parts)
    with winnow.compress(model, Heard(keep=keep, at=at)) as handle:
        output, ledger = generate(model, inputs), handle.last
    logits, said = step_logits(output), new_tokens(output, inputs)
    layer = 0 if at == "projected" else int(at[7])
    for row, part in enumerate(parts):
        positions = sounds(model, part)
        cut = Cut(layer, picks(keep, [len(own) for own in positions]))
        want = by_hand(model, part, positions, said[row, :-1].tolist(), cut)
        assert apart(logits[row], want.logits) <= TOLERANCE, row
        assert tuple(own[row] for own in ledger.layer_tokens) == want.lengths
        items = [item for item in ledger.items if item.row == row]
        kept = [own[item.kept].tolist() for own, item in zip(positions, heard(items), strict=True)]
        assert kept == [own.tolist() for own in want.kept]
        assert all(len(item.kept) == item.n_visual for item in items if item.modality == "image")


def heard(items):
    return [item for item in items if item.modality == "audio"]


def test_a_batch_equals_its_samples_and_a_plan_can_act_on_both(own):
    model, parts = own.model(), own.samples(ROWS)
    with winnow.compress(model, "a-tome:keep=40% + divprune:keep=3") as handle:
        logits, ledger = forward(model, own.collate(parts)).logits[:, -1], handle.last
        for row, part in enumerate(parts):
            assert apart(logits[row], forward(model, part).logits[0, -1]) <= TOLERANCE
            items = [item for item in ledger.items if item.row == row]
            assert [item.kept.tolist() for item in items] == [item.kept.tolist() for item in handle.last.items]
            for item in items:
                methods = [slug for _, slug, _ in item.reductions]
                assert methods == (["a-tome"] if item.modality == "audio" else ["divprune"])
                assert len(item.kept) == (12 if item.modality == "audio" else 3)


def test_a_token_covers_forty_milliseconds(own):
    model, inputs = own.model(), own.batch(("3 U 6",))
    with winnow.compress(model, "speechprune:left=40%") as handle:
        forward(model, inputs)
    (item,) = handle.last.items
    assert item.n_visual == SOUND // 4
    assert item.layout.seconds == pytest.approx(SOUND / 100)
    assert item.longest_dropped() > 0


def test_methods_of_pictures_leave_sounds_as_they_are(own):
    """They are no items, and count as text: the question begins behind the last picture."""
    model, inputs = own.model(), own.batch(("2 A 3 U 5",))
    with winnow.compress(model, "divprune:keep=3") as handle:
        forward(model, inputs)
        assert [item.modality for item in handle.last.items] == ["image"]


def test_a_prompt_in_embeddings_does_not_say_what_is_a_sound(own):
    model, sample = own.model(), own.sample("3 U 6")
    embeds = model.get_input_embeddings()(sample["input_ids"]).detach()
    where = sample["input_ids"] == model.config.audio_token_id
    with (
        winnow.compress(model, "a-tome:keep=40%") as handle,
        handle.using("a-tome:keep=40%", placeholders=where),
        pytest.raises(UnsupportedError, match="does not act in"),
    ):
        forward(model, {"inputs_embeds": embeds, "attention_mask": sample["attention_mask"]})
