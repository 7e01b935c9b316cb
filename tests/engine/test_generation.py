"""Every way of `generate` works as before, on a reduced prompt: beams, sampling, streaming, look-up, no cache."""

from __future__ import annotations

import threading

import pytest
import torch
import zoo
from byhand import Reference
from cases import CASES, SOME, identities, pairs, same
from probes import Drawn, Halve, Pick, Probed, forward, generate, new_tokens, step_logits
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import winnow
from winnow.core.plan import Plan


@pytest.mark.parametrize(("kind", "build"), pairs(SOME))
def test_beams_score_what_they_say_by_hand(kind, build):
    """Three beams, two returned: the score of each sequence is the sum of its own log-probabilities, worked by hand."""
    model, parts = zoo.model(build), zoo.samples(build, zoo.MIXED)
    inputs, (plan, by_hand) = zoo.collate(parts), CASES[kind]
    reference = Reference(model)
    with winnow.compress(model, plan):
        options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0, "output_scores": True}
        output = generate(model, inputs, **options)
    said = new_tokens(output, inputs)
    assert said.shape == (6, 6)
    for row, tokens in enumerate(said):
        part = parts[row // 2]
        worked = by_hand(reference, part, reference.entry(part))
        trace = reference.run(worked.entry, tokens[:-1].tolist(), worked.cuts)
        total = trace.logits.log_softmax(-1).gather(1, tokens[:, None]).sum()
        assert abs(float(total - output.sequences_scores[row])) <= 1e-4


@pytest.mark.parametrize(("kind", "build"), pairs(SOME))
def test_beams_of_a_batch_are_those_of_each_sample_alone(kind, build):
    model, parts = zoo.model(build), zoo.samples(build, zoo.MIXED)
    inputs = zoo.collate(parts)
    with winnow.compress(model, CASES[kind].plan):
        together = generate(model, inputs, num_beams=3, num_return_sequences=2)
        for row, part in enumerate(parts):
            alone = generate(model, part, num_beams=3, num_return_sequences=2)
            assert torch.equal(new_tokens(alone, part), new_tokens(together, inputs)[2 * row : 2 * row + 2])


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_beams_under_identity_are_bit_identical(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    plain = generate(model, inputs, **options)
    for plan in identities(build):
        with winnow.compress(model, plan):
            found = generate(model, inputs, **options)
        assert same(found, plain), plan
        assert torch.equal(found.sequences_scores, plain.sequences_scores)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_sampling_with_a_seed_is_bit_identical_under_identity(build):
    """Methods draw from generators of their own: not a number of the global one is used."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    options = {"do_sample": True, "temperature": 1.3, "num_return_sequences": 2}
    torch.manual_seed(5)
    plain = generate(model, inputs, **options)
    for plan in [*identities(build), Drawn(keep="100%")]:
        with winnow.compress(model, plan):
            torch.manual_seed(5)
            assert same(generate(model, inputs, **options), plain), plan


@pytest.mark.parametrize(("kind", "build"), pairs(SOME))
def test_sampled_logits_equal_by_hand(kind, build):
    """Two sampled continuations of each row: the batch is repeated before the prompt is read, pictures are not."""
    model, parts = zoo.model(build), zoo.samples(build, zoo.MIXED)
    inputs, (plan, by_hand) = zoo.collate(parts), CASES[kind]
    reference = Reference(model)
    torch.manual_seed(7)
    with winnow.compress(model, plan) as handle:
        output = generate(model, inputs, do_sample=True, temperature=2.0, num_return_sequences=2)
        assert [item.row for item in handle.last.items] == [0, 1, 4, 4, 5, 5]
    said = new_tokens(output, inputs)
    assert not torch.equal(said[::2], said[1::2])
    for row, tokens in enumerate(said):
        part = parts[row // 2]
        worked = by_hand(reference, part, reference.entry(part))
        trace = reference.run(worked.entry, tokens[:-1].tolist(), worked.cuts)
        assert (step_logits(output)[row] - trace.logits).abs().max() <= 1e-5


class Collector(BaseStreamer):
    """What TextIteratorStreamer is, without a tokenizer: ids of one row, as they come."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = False

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize(("kind", "build"), pairs(SOME))
def test_a_streaming_thread_sees_the_plan(kind, build):
    """`Thread(target=model.generate)` is how text is streamed: the plan is the model's, not that of one thread."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    with winnow.compress(model, CASES[kind].plan) as handle:
        expected, ledger = generate(model, inputs), handle.last
        streamer = Collector()
        options = {"max_new_tokens": 6, "do_sample": False, "streamer": streamer}
        thread = threading.Thread(target=model.generate, kwargs={**inputs, **options})
        thread.start()
        thread.join()
        assert streamer.ended
        assert handle.last is not ledger
        assert handle.last.layer_tokens == ledger.layer_tokens
    assert streamer.ids == expected.sequences[0].tolist()


LOOKED_UP = {
    "before": Plan((Pick(keep=5),)),
    "merged": Plan((Halve(),)),
    "cut twice": Plan((Pick(keep=9, at="layers[1]"), Pick(keep=4, at="layers[3]"))),
}


@pytest.mark.parametrize("plan", LOOKED_UP.values(), ids=LOOKED_UP)
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_prompt_lookup_gives_the_greedy_tokens(build, plan):
    """Candidates are checked several at a time, the first with the prompt itself, and the cache is cropped.

    For plans that do not look at the text: what does sees the last candidate as the last token of the prompt.
    """
    model = zoo.model(build)
    inputs = zoo.sample(build, "9 A 9")
    phrase = torch.tensor([21, 22, 23])
    inputs["input_ids"][0, :9] = phrase.repeat(3)
    inputs["input_ids"][0, -9:] = phrase.repeat(3)
    with winnow.compress(model, plan):
        greedy = generate(model, inputs, steps=12)
        looked = generate(model, inputs, steps=12, prompt_lookup_num_tokens=3)
    assert torch.equal(looked.sequences, greedy.sequences)
    assert (step_logits(looked) - step_logits(greedy)).abs().max() <= 1e-5


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_prompt_lookup_really_crops(build):
    """The test above would prove nothing if no candidate were ever refused."""
    model, crops = zoo.model(build), []
    inputs = zoo.sample(build, "9 A 9")
    inputs["input_ids"][0, -9:] = torch.tensor([21, 22, 23]).repeat(3)
    cache = DynamicCache(config=model.config.get_text_config())
    crop = type(cache).crop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DynamicCache, "crop", lambda self, n: (crops.append(n), crop(self, n))[1])
        with winnow.compress(model, Pick(keep=5)):
            generate(model, inputs, steps=12, prompt_lookup_num_tokens=3, past_key_values=cache)
    assert any(n != 0 for n in crops)


@pytest.mark.parametrize("keep", [5, "100%"])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_prompt_lookup_may_propose_the_placeholders_of_a_picture(build, keep):
    """The first word of the answer stands right before the picture, so that what follows it there is proposed."""
    model, inputs = zoo.model(build), zoo.sample(build, "9 A 9")
    ids = inputs["input_ids"]
    with winnow.compress(model, Pick(keep=keep)):
        for _ in range(8):
            said = generate(model, inputs, steps=1).sequences[0, -1]
            if ids[0, 8] == said:
                break
            ids[0, 8] = said
        assert ids[0, 8] == said
        assert (ids[0] == ids[0, -1]).sum() == 1  # else the prompt itself would be looked up, which transformers cannot
        greedy = generate(model, inputs, steps=8)
        looked = generate(model, inputs, steps=8, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
    assert torch.equal(looked.sequences, greedy.sequences)


@pytest.mark.parametrize(("kind", "build"), pairs(("received", "picked", "folded")))
def test_without_cache_the_tokens_and_logits_are_the_same(kind, build):
    """Every step is a prefill of its own; what does not look at the last token chooses the same each time."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    with winnow.compress(model, CASES[kind].plan):
        cached = generate(model, inputs)
        uncached = generate(model, inputs, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert (step_logits(cached) - step_logits(uncached)).abs().max() <= 1e-5


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_logits_processors_and_stopping_criteria_see_the_prompt_as_given(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    seen: list[torch.Tensor] = []

    class Watch(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.clone())
            return scores

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= width + 3)

    width = inputs["input_ids"].shape[1]
    with winnow.compress(model, Pick(keep=3)):
        output = generate(
            model,
            inputs,
            steps=6,
            logits_processor=LogitsProcessorList([Watch()]),
            stopping_criteria=StoppingCriteriaList([Stop()]),
        )
    assert output.sequences.shape[1] == width + 3
    assert torch.equal(seen[0], inputs["input_ids"])
    assert torch.equal(output.sequences[:, :width], inputs["input_ids"])


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_max_length_counts_the_prompt_as_given(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    width = inputs["input_ids"].shape[1]
    with winnow.compress(model, Pick(keep=3)), torch.no_grad():
        output = model.generate(**inputs, max_length=width + 4, do_sample=False)
    assert output.shape[1] == width + 4


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_inference_mode_and_positional_ids(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    with winnow.compress(model, Probed()):
        expected = generate(model, inputs)
        with torch.inference_mode():
            output = model.generate(inputs["input_ids"], **rest, max_new_tokens=6, do_sample=False)
            logits = model(inputs["input_ids"], **rest).logits
        assert torch.equal(output, expected.sequences)
        assert torch.equal(logits, forward(model, inputs).logits)
