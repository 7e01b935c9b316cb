"""Modes of `generate` on classes of each kind: what the plain model says in the same mode where the dropped tokens are
hidden from it, or a refusal that names what to do.

One class of each kind is in the fast suite: entered with the shortened sequence (1-D and 3-D positions), called with
the whole one (windows and masks that are made outside), and with linear layers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import content
from masked import _Force
from probes import Pick, forward, generate, step_logits
from subjects import HYBRID, SHORT, WHOLE, AtTheDoor, Deep, Subject, by_hand, compress, named, said
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import QuantizedLayer, StaticLayer
from transformers.generation.streamers import BaseStreamer

import winnow

STEPS = 6
FAST = ("llava_clip", "qwen2_5_vl", "gemma3", "qwen3_5")


def kinds(*groups: tuple[str, ...]) -> list[Any]:
    marks = [() if subject.name in FAST else (pytest.mark.full,) for subject in named(*groups)]
    return [pytest.param(s, marks=m, id=s.name) for s, m in zip(named(*groups), marks, strict=True)]


EVERY = kinds(SHORT, WHOLE, HYBRID)
MASKED = kinds(SHORT, WHOLE)

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "num_return_sequences": 2},
    "nucleus sampling": {"do_sample": True, "top_p": 0.8, "top_k": 30, "min_p": 0.001},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "output_scores": True},
    "sampled beams": {"num_beams": 3, "do_sample": True, "temperature": 1.5, "output_scores": True},
    "processed": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "no cache": {"use_cache": False},
}


def repeats_right(model: nn.Module, sample: dict[str, torch.Tensor]) -> bool:
    """Whether `generate` of the plain model embeds a prompt that it repeats as it embeds it once."""
    seen: list[torch.Tensor] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda m, a, k: seen.append(k["inputs_embeds"][:1]), with_kwargs=True
    )
    for rows in (1, 2):
        generate(model, sample, steps=1, do_sample=True, num_return_sequences=rows)
    hook.remove()
    return torch.equal(*seen)


@pytest.mark.parametrize("subject", named(SHORT, WHOLE, HYBRID), ids=lambda subject: subject.name)
def test_the_items_by_hand_are_those_of_the_engine(subject):
    """What an item is changes with a class's adapter: here the fast suite says so for every class of these tests."""
    model, sample = subject.model(), subject.sample("3 A 6")
    with compress(model, Pick(keep=3)) as handle:
        forward(model, sample)
        seen = content(model, sample, handle.last.items)
    assert [item.tolist() for item in seen] == [item.tolist() for item in subject.content(model, sample)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("subject", EVERY)
def test_a_mode_says_what_the_plain_model_says_on_what_is_left(subject, mode):
    """The same tokens from the same seed, and the logits that the choice was made from (for beams, their scores)."""
    if mode == "processed" and subject.name in HYBRID:
        pytest.skip("by hand it is called with rows, so that its processors do not see the prompt's tokens")
    model, sample = subject.model(), subject.sample("3 A 6")
    repeated = max(MODES[mode].get(name, 1) for name in ("num_beams", "num_return_sequences")) > 1
    if repeated and not repeats_right(model, sample):
        pytest.skip("the plain model gives repeated rows of this prompt other embeddings than the row alone")
    hand = by_hand(subject, model, sample)
    torch.manual_seed(11)
    want = hand.generate(sample, max_new_tokens=STEPS, **MODES[mode])
    with compress(model, hand.plan):
        torch.manual_seed(11)
        found = generate(model, sample, steps=STEPS, **MODES[mode])
    assert torch.equal(said(found, STEPS), said(want, STEPS))
    if "num_beams" in MODES[mode]:
        assert (found.sequences_scores - want.sequences_scores).abs().max() <= 1e-5
    else:
        assert (step_logits(found) - step_logits(want)).abs().max() <= 1e-5


@pytest.mark.parametrize("subject", EVERY)
def test_the_plans_of_these_tests_change_what_is_said(subject):
    """Equality with the masked model would prove nothing if the plain model said the same."""
    model, sample = subject.model(), subject.sample("3 A 6")
    plain = step_logits(generate(model, sample, steps=1))
    with compress(model, by_hand(subject, model, sample).plan):
        assert (step_logits(generate(model, sample, steps=1)) - plain).abs().max() > 1e-2


@pytest.mark.parametrize("how", ["assistant", "lookup"])
@pytest.mark.parametrize("subject", MASKED)
def test_assisted_modes_say_what_the_plain_model_says_in_them(subject, how, monkeypatch):
    """Candidates are tried several at a time, and the cache is cropped by those that are refused, windows and all."""
    model, sample = subject.model(), subject.sample("9 A 9")
    for part in (sample["input_ids"][0, :9], sample["input_ids"][0, -9:]):
        part[:] = torch.tensor([21, 22, 23]).repeat(3)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if how == "assistant":
        options = {"assistant_model": subject.model(seed=3)}
    hand = Deep(subject, model, sample)
    want = hand.generate(sample, max_new_tokens=12, **options)
    crops: list[int] = []
    crop = DynamicCache.crop
    monkeypatch.setattr(DynamicCache, "crop", lambda self, n: (crops.append(n), crop(self, n))[1])
    with compress(model, hand.plan):
        found = generate(model, sample, steps=12, **options)
    assert any(crops)
    assert torch.equal(found.sequences, want.sequences)
    assert (step_logits(found) - step_logits(want)).abs().max() <= 1e-5


def test_assisted_decoding_of_stateful_models_is_refused_by_transformers_itself():
    subject = Subject("qwen3_5")
    model, sample = subject.model(), subject.sample("3 A 6")
    with compress(model, Pick(keep=3)), pytest.raises(ValueError, match="stateful"):
        generate(model, sample, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("subject", EVERY)
def test_a_conversation_goes_on_from_its_cache(subject):
    """The next turn's tokens come at once; the plain model is forced through the same words one by one."""
    model, sample = subject.model(), subject.sample("3 A 6")
    hand, turn = by_hand(subject, model, sample), torch.tensor([[31, 32, 33, 34]])
    with compress(model, hand.plan):
        first = generate(model, sample, steps=3)
        ids = torch.cat([first.sequences, turn], 1)
        talk = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second = generate(model, talk, steps=3, past_key_values=first.past_key_values)
    words = second.sequences[0, sample["input_ids"].shape[1] :].tolist()
    start = 0 if isinstance(hand, AtTheDoor) else sample["input_ids"].shape[1]
    want = hand.generate(sample, max_new_tokens=len(words), logits_processor=[_Force(words, start)])
    assert (step_logits(second)[0] - step_logits(want)[0, -3:]).abs().max() <= 1e-5


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        pass


@pytest.mark.parametrize("subject", EVERY)
def test_streaming_gives_the_same_tokens(subject):
    model, sample = subject.model(), subject.sample("3 A 6")
    with compress(model, by_hand(subject, model, sample).plan):
        expected, streamer = generate(model, sample), Collector()
        model.generate(**sample, max_new_tokens=STEPS, do_sample=False, streamer=streamer)
    assert streamer.ids == expected.sequences[0].tolist()


@pytest.mark.parametrize("subject", EVERY)
def test_inputs_embeds_give_what_the_plain_model_gives_for_them(subject):
    """Rows of the embedding table instead of ids; the picture's placeholders are recognised by theirs."""
    model, sample = subject.model(), subject.sample("3 A 6")
    hand = by_hand(subject, model, sample)
    given = {k: v for k, v in sample.items() if k != "input_ids"}
    given["inputs_embeds"] = model.get_input_embeddings()(sample["input_ids"]).detach()
    if subject.name in ("gemma3", "paligemma"):
        with compress(model, hand.plan), pytest.raises(ValueError, match="inputs_embeds"):
            generate(model, given)  # transformers' own refusal
        return
    want = hand.generate(given, max_new_tokens=STEPS)
    with compress(model, hand.plan):
        found = generate(model, given)
    assert torch.equal(said(found, STEPS), said(want, STEPS))
    assert (step_logits(found) - step_logits(want)).abs().max() <= 1e-5


def merged(model: nn.Module, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    """What enters the language model: text, and the pictures' features in their places."""
    seen: list[torch.Tensor] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True
    )
    generate(model, sample, steps=1)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("subject", kinds(("llava_clip",), ("idefics3",)))
def test_embeddings_with_pictures_in_them_are_compressed_where_the_caller_says(subject, options):
    """The mask says which rows are a picture's; then it is as with ids and pixels."""
    model, sample = subject.model(), subject.sample("3 A 6")
    hand = Deep(subject, model, sample)
    want = hand.generate(sample, max_new_tokens=STEPS, **options)
    where = torch.zeros_like(sample["input_ids"], dtype=torch.bool)
    where[0, torch.cat(hand.items)] = True
    given = {"inputs_embeds": merged(model, sample), "attention_mask": sample["attention_mask"]}
    with compress(model, hand.plan) as handle:
        generate(model, given)
        assert "inputs_embeds" in handle.last.read_in_full
        with handle.using(hand.plan, placeholders=where):
            found = generate(model, given, **options)
    assert torch.equal(said(found, STEPS), said(want, STEPS))
    assert (step_logits(found) - step_logits(want)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("plan", "where", "reason"),
    [
        (Pick(keep=3), torch.ones(1, 5, dtype=torch.bool), "placeholders"),
        (Pick(keep=3), torch.ones(1, 5), "booleans"),
        ("visionzip:keep=5", None, "behind it"),
        ("fastervlm:keep=5", None, "not recorded"),
    ],
    ids=["width", "numbers", "features", "tower"],
)
def test_placeholders_that_say_too_little_are_refused(plan, where, reason):
    subject = Subject("llava_clip")
    model, sample = subject.model(), subject.sample("3 A 6")
    if where is None:
        where = torch.zeros_like(sample["input_ids"], dtype=torch.bool)
        where[0, torch.cat(subject.content(model, sample))] = True
    given = {"inputs_embeds": merged(model, sample), "attention_mask": sample["attention_mask"]}
    with (
        compress(model, Pick(keep=3)) as handle,
        pytest.raises(winnow.WinnowError, match=reason),
        handle.using(plan, placeholders=where),
    ):
        generate(model, given)


@pytest.mark.parametrize("subject", EVERY)
def test_eager_attention_says_the_same(subject):
    """Eager attention gives every layer a mask of its own, a lone token's too."""
    model, sample = subject.model(), subject.sample("3 A 6")
    hand = by_hand(subject, model, sample)
    want = hand.generate(sample, max_new_tokens=STEPS)
    model.set_attn_implementation("eager")
    with compress(model, hand.plan):
        found = generate(model, sample)
    assert torch.equal(said(found, STEPS), said(want, STEPS))
    assert (step_logits(found) - step_logits(want)).abs().max() <= 1e-5


@pytest.mark.parametrize("subject", MASKED)
def test_attentions_are_those_of_what_each_layer_read(subject):
    """Rows and columns are the slots that are left: the plain model's rows and columns of the same tokens."""
    model, sample = subject.model(), subject.sample("3 A 6")
    hand = Deep(subject, model, sample)
    want, hiding = hand.reference.generate(sample, hand.items, hand.cuts, max_new_tokens=2, output_attentions=True)
    model.set_attn_implementation("eager")
    with compress(model, hand.plan):
        found = generate(model, sample, steps=2, output_attentions=True)
    for layer, weights in enumerate(found.attentions[0]):
        left = (~hiding.keys[layer]).nonzero()[:, 0]
        expected = want.attentions[0][layer][0][:, left][:, :, left]
        assert weights.shape[1:] == expected.shape
        assert (weights[0] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("subject", EVERY)
def test_hidden_states_have_their_logical_length(subject):
    model, sample = subject.model(), subject.sample("3 A 6")
    with compress(model, by_hand(subject, model, sample).plan):
        states = generate(model, sample, steps=2, output_hidden_states=True).hidden_states
    assert {state.shape[1] for state in states[0]} == {sample["input_ids"].shape[1]}
    assert {state.shape[1] for state in states[1]} == {1}


@pytest.mark.parametrize("subject", kinds(("llava_clip",), WHOLE, HYBRID))
def test_guidance_weighs_the_compressed_prompt_against_the_unconditional_one(subject):
    """The unconditional run reads no picture; the one with the picture is the compressed one."""
    if subject.name in ("qwen2_vl", "qwen3_5"):
        pytest.skip("the plain model cannot run this mode: its positions are those of the picture's prompt")
    model, sample = subject.model(), subject.sample("3 A 6")
    hand = by_hand(subject, model, sample)
    with compress(model, hand.plan):
        found = generate(model, sample, guidance_scale=1.5, output_scores=True)
    words = said(found, STEPS)[0].tolist()
    free, cache = [], DynamicCache(config=model.config.get_text_config())
    for word in [int(sample["input_ids"][0, -1]), *words[:-1]]:
        output = forward(model, {"input_ids": torch.tensor([[word]])}, past_key_values=cache)
        free.append(output.logits[0, -1].log_softmax(-1))
    led = hand.generate(sample, max_new_tokens=STEPS, logits_processor=[_Force(words, sample["input_ids"].shape[1])])
    for score, a, b in zip(found.scores, step_logits(led)[0].log_softmax(-1), free, strict=True):
        assert (score[0] - (1.5 * (a - b) + b)).abs().max() <= 1e-4


class Stream:
    """A stream of a device, on a machine that has none: nothing runs beside anything else."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass


@pytest.mark.parametrize("subject", EVERY)
def test_offloaded_caches_hold_a_reduced_prompt(subject, monkeypatch):
    """Layers are fetched and put away around each update; where they wait is another device only on a GPU."""
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", Stream)
    model, sample = subject.model(), subject.sample("3 A 6")
    hand = by_hand(subject, model, sample)
    want = hand.generate(sample, max_new_tokens=STEPS)
    with compress(model, hand.plan):
        found = generate(model, sample, cache_implementation="offloaded")
    assert found.past_key_values.offloading
    assert torch.equal(said(found, STEPS), said(want, STEPS))
    assert (step_logits(found) - step_logits(want)).abs().max() <= 1e-5


class Rounded(QuantizedLayer):
    """A quantized layer as transformers has them, without a library for it."""

    def _quantize(self, tensor, axis):
        return tensor

    def _dequantize(self, tensor):
        return tensor


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "static": ({"cache_implementation": "static"}, "use the default dynamic cache"),
    "offloaded static": ({"cache_implementation": "offloaded_static"}, "use the default dynamic cache"),
    "static layers": ({"layers": lambda: StaticLayer(max_cache_len=512)}, "use the default dynamic cache"),
    "quantized layers": ({"layers": lambda: Rounded(residual_length=4)}, "use the default dynamic cache"),
    "chunks": ({"prefill_chunk_size": 8}, "leave prefill_chunk_size unset"),
}


@pytest.mark.parametrize("mode", REFUSED)
@pytest.mark.parametrize("subject", EVERY)
def test_what_cannot_be_done_is_refused_with_what_to_do(subject, mode):
    options, reason = REFUSED[mode]
    model, sample = subject.model(), subject.sample("3 A 6")
    if "layers" in options:
        cache = DynamicCache(config=model.config.get_text_config())
        cache.layers = [options["layers"]() for _ in cache.layers]
        options = {"past_key_values": cache}
    with compress(model, by_hand(subject, model, sample).plan):
        expected = generate(model, sample)
        with pytest.raises(winnow.UnsupportedError, match=reason):
            generate(model, sample, **options)
        assert torch.equal(generate(model, sample).sequences, expected.sequences)


@pytest.mark.parametrize("subject", kinds(("paligemma",), ("internvl", "gemma3")))
def test_flex_attention_of_a_model_that_is_called_whole_is_refused(subject):
    model, sample = subject.model(), subject.sample("3 A 6")
    model.set_attn_implementation({"text_config": "flex_attention"})  # the tower would be compiled first
    with compress(model, Pick(keep=3)), pytest.raises(winnow.UnsupportedError, match="attn_implementation='sdpa'"):
        generate(model, sample)
