"""Every model class against its plain self: the tokens that a plan keeps, and nobody else, are read.

The reference hides the keys of what is dropped from the plain model (`masked`), so that windows, chunks, prefix blocks,
DeepStack, per-layer inputs and shared keys are the model's own.
"""

from __future__ import annotations

import pytest
import torch
from cases import TURN, prolonged, same
from families import RAGGED, build, by_hand, content, halves, kinds, picks
from masked import Cut, MaskedReference
from probes import Halve, Look, Pick, Probed, Tapped, forward, generate, new_tokens, step_logits

import winnow
from winnow.core.errors import UnsupportedError
from winnow.models.families import family_of
from winnow.models.supported_versions import trying
from winnow.signals.language import LMAttention

TOLERANCE = 1e-5  # of the largest logit: two orders of the same sums in float32
SHARED_KEYS = ("gemma3n", "gemma4")  # their later layers read the keys of layers 0 and 1: nothing is cut behind those


@pytest.fixture(autouse=True)
def unchecked():
    """The generic adapter without its checks: here the tests are the checks."""
    with trying():
        yield


def rows_of(own) -> tuple[str, ...]:
    return RAGGED if own.padding == "left" else RAGGED[:1]


def apart(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def places(name: str) -> tuple[str, ...]:
    return ("projected",) if name in SHARED_KEYS else ("projected", "layers[1]", "layers[2]")


@pytest.mark.parametrize("name", kinds())
def test_keep_all_is_bit_identical(name):
    own = build(name)
    model, inputs = own.model(), own.batch(rows_of(own))
    plain, logits = generate(model, inputs), forward(model, inputs).logits
    for at in places(name):
        with winnow.compress(model, Pick(keep="100%", at=at)):
            assert torch.equal(forward(model, inputs).logits, logits), at
            assert same(generate(model, inputs), plain), at
    assert torch.equal(forward(model, inputs).logits, logits)


@pytest.mark.parametrize("name", kinds())
def test_keep_all_gives_hidden_tokens_what_the_plain_model_gives_them(name):
    """Nobody reads pictures that the caller's mask hides; their own outputs are those of the plain model."""
    own = build(name)
    model, inputs = own.model(), own.batch(rows_of(own))
    placeholders = torch.tensor([getattr(model.config, name) for *_, name in family_of(model).encoders])
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).clone()
    mask[-1, torch.isin(inputs["input_ids"][-1], placeholders)] = 0
    inputs = {**inputs, "attention_mask": mask}
    logits = forward(model, inputs).logits
    for at in places(name):
        with winnow.compress(model, Pick(keep="100%", at=at)):
            assert torch.equal(forward(model, inputs).logits, logits), at


@pytest.mark.parametrize("at", ["projected", "layers[1]", "layers[2]"])
@pytest.mark.parametrize("name", kinds())
def test_a_subset_equals_the_plain_model_that_cannot_read_the_rest(name, at):
    """Per-step logits, kept tokens and tokens of each layer, for each row of a padded batch."""
    if at not in places(name):
        with pytest.raises(UnsupportedError, match="read the keys of"):
            winnow.compress(build(name).model(), Pick(keep="40%", at=at))
        return
    own = build(name)
    model, parts = own.model(), own.samples(rows_of(own))
    inputs = own.collate(parts)
    plain = step_logits(generate(model, inputs, steps=1))
    with winnow.compress(model, Pick(keep="40%", at=at)) as handle:
        output, ledger = generate(model, inputs), handle.last
    logits, tokens = step_logits(output), new_tokens(output, inputs)
    layer = 0 if at == "projected" else int(at[7])
    for row, part in enumerate(parts):
        items = [item for item in ledger.items if item.row == row]
        positions = content(model, part, items)
        cut = Cut(layer, picks("40%", [len(own) for own in positions]))
        want = by_hand(model, part, positions, tokens[row, :-1].tolist(), cut)
        assert apart(logits[row], want.logits) <= TOLERANCE, row
        assert tuple(own[row] for own in ledger.layer_tokens) == want.lengths
        kept = [own[item.kept].tolist() for own, item in zip(positions, items, strict=True)]
        assert kept == [own.tolist() for own in want.kept]
    assert (logits[0, 0] - plain[0, 0]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl", "mistral3", "paligemma", "internvl"])
def test_merged_rows_equal_the_plain_model_with_these_rows(name):
    """Also where features are added between layers: DeepStack's are merged as their rows were."""
    own = build(name)
    model, parts = own.model(), own.samples(rows_of(own))
    inputs = own.collate(parts)
    with winnow.compress(model, Halve(at="layers[0]")) as handle:
        output, ledger = generate(model, inputs), handle.last
    logits, tokens = step_logits(output), new_tokens(output, inputs)
    for row, part in enumerate(parts):
        positions = content(model, part, [item for item in ledger.items if item.row == row])
        reference = MaskedReference(model)
        if hasattr(reference.lm, "_deepstack_process"):
            merge_deepstack(reference.lm, positions)
        want = reference.run(part, positions, tokens[row, :-1].tolist(), [halves()])
        assert apart(logits[row], want.logits) <= TOLERANCE, row


def merge_deepstack(lm, positions) -> None:
    """By hand: the features of two neighbours become their mean, at the place of the first."""
    plain, pairs = (
        lm._deepstack_process,
        [(int(o[i]), int(o[i + 1])) for o in positions for i in range(0, len(o) - 1, 2)],
    )

    def process(hidden, mask, features):
        dense = features.new_zeros(*mask.shape, features.shape[-1])
        dense[mask] = features
        for first, second in pairs:
            dense[0, first] = (dense[0, first] + dense[0, second]) / 2
        return plain(hidden, mask, dense[mask])

    lm._deepstack_process = process


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "internvl", "qwen3_vl", "cohere2_vision"])
def test_attention_is_what_the_eager_model_computes(name):
    """Windows and outer masks included; of a layer that has run, and of one that is about to."""
    own = build(name)
    model, inputs = own.model(), own.batch(rows_of(own))
    signals = LMAttention(1), LMAttention(2)
    look = Look(signals, at="layers[2]")
    with winnow.compress(model, look) as handle:
        logits, items = forward(model, inputs).logits, handle.last.items
    assert torch.equal(logits, forward(model, inputs).logits)
    eager = own.model()
    eager.set_attn_implementation("eager")
    weights = forward(eager, inputs, output_attentions=True).attentions
    tokens = {getattr(model.config, name) for *_, name in family_of(model).encoders}
    for signal in signals:
        seen = look.seen(signal)
        assert len(seen) == len(items)
        starts: dict[int, int] = {}
        for item, values in zip(items, seen, strict=True):
            ids = inputs["input_ids"][item.row]
            where = torch.cat([(ids == token).nonzero()[:, 0] for token in tokens]).sort().values
            first = starts.get(item.row, 0)
            starts[item.row] = first + item.layout.n
            at = where[first : first + item.layout.n][torch.from_numpy(item.layout.content)]
            want = weights[signal.layer][item.row, :, -1, at].mean(0)
            assert (values - want).abs().max() <= TOLERANCE


@pytest.mark.parametrize("plan", [Tapped(), Probed()], ids=["tapped", "probed"])
@pytest.mark.parametrize("name", ["gemma3", "internvl", "qwen3_vl", "mistral3"])
def test_a_batch_equals_its_samples(name, plan):
    """Selection by attention inside the LM, in a padded batch and alone."""
    own = build(name)
    model, parts = own.model(), own.samples(RAGGED)
    inputs = own.collate(parts)
    with winnow.compress(model, plan) as handle:
        logits, ledger = forward(model, inputs).logits[:, -1], handle.last
        for row, part in enumerate(parts):
            alone = forward(model, part).logits[0, -1]
            assert apart(logits[row], alone) <= TOLERANCE
            kept = [item.kept.tolist() for item in ledger.items if item.row == row]
            assert kept == [item.kept.tolist() for item in handle.last.items]


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen3_vl", "internvl", "qwen3_5", "cohere2_vision"])
def test_a_second_turn_on_the_cache_equals_one_run(name):
    """Text behind a reduced prompt, on the cache that `generate` returned: windows count what the layers forgot."""
    own = build(name)
    model, parts = own.model(), own.samples(RAGGED[:1])
    inputs = own.collate(parts)
    with winnow.compress(model, Pick(keep="40%")) as handle:
        first = generate(model, inputs, steps=3)
        ledger = handle.last
        more = prolonged(inputs, first.sequences, TURN[:1])
        for key in own.per_token:
            more[key] = torch.nn.functional.pad(inputs[key], (0, more["input_ids"].shape[1] - inputs[key].shape[1]))
        second = generate(model, more, steps=3, past_key_values=first.past_key_values)
    said = second.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    positions = content(model, parts[0], ledger.items)
    want = by_hand(model, parts[0], positions, said[:-1], Cut(0, picks("40%", [len(own) for own in positions])))
    behind = len(said) - 3
    assert apart(step_logits(second)[0], want.logits[behind:]) <= TOLERANCE


@pytest.mark.parametrize("name", ["gemma3", "internvl", "qwen3_vl"])
def test_a_method_that_reads_the_question_runs_on_a_batch(name):
    """A mask that is one for all rows of a batch is read for each of them."""
    own = build(name)
    model, parts = own.model(), own.samples(("3 A 6", "3 A 6"))
    with winnow.compress(model, "todre:keep=6") as handle:
        logits = forward(model, own.collate(parts)).logits[:, -1]
        for row, part in enumerate(parts):
            assert apart(logits[row], forward(model, part).logits[0, -1]) <= TOLERANCE
            assert len(handle.last.items[0].kept) <= 6
