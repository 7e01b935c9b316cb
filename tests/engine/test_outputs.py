"""What a forward returns under a plan: loss, hidden states, logits, gradients, in the caller's own lengths."""

from __future__ import annotations

import pytest
import torch
import zoo
from byhand import Reference
from cases import CASES, SOME, TOWERS, identities, pairs
from probes import Pick, Probed, forward
from torch.nn.functional import cross_entropy
from training import IGNORED, batch_by_hand, labelled

import winnow


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("kind", "build"), pairs(["picked", "tapped", "probed"]))
def test_the_loss_equals_by_hand(kind, build, side):
    model, parts = zoo.model(build), zoo.samples(build, zoo.MIXED)
    inputs, (plan, by_hand) = zoo.collate(parts, side=side), CASES[kind]
    with winnow.compress(model, plan):
        loss = forward(model, inputs, labels=labelled(inputs)).loss
    assert abs(loss - torch.stack(batch_by_hand(Reference(model), parts, by_hand)).mean()) <= 1e-5


@pytest.mark.parametrize("build", TOWERS)
def test_the_loss_on_text_behind_merged_rows_equals_by_hand(build):
    """Merged rows stand out of order, so labels are on the text behind the last picture: there positions are rows."""
    model, parts = zoo.model(build), zoo.samples(build, ("3 A 6", "2 B 4 C 5"))
    inputs, (plan, by_hand) = zoo.collate(parts), CASES["folded"]
    labels = labelled(inputs)
    labels[:, :-4] = IGNORED
    with winnow.compress(model, plan):
        loss = forward(model, inputs, labels=labels).loss
    reference, losses = Reference(model), []
    for part in parts:
        worked = by_hand(reference, part, reference.entry(part))
        logits = reference.model.lm_head(reference.run(worked.entry, (), worked.cuts).hidden[0])
        losses.append(cross_entropy(logits[-5:-1], part["input_ids"][0, -4:]))
    assert abs(loss - torch.stack(losses).mean()) <= 1e-5


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_the_loss_under_identity_is_bit_identical(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    plain = forward(model, inputs, labels=labelled(inputs)).loss
    for plan in identities(build):
        with winnow.compress(model, plan):
            assert torch.equal(forward(model, inputs, labels=labelled(inputs)).loss, plain), plan


@pytest.mark.parametrize(("kind", "build"), pairs(SOME))
def test_gradients_flow_through_what_is_kept(kind, build):
    """The gather is differentiable in the values: pixels that were kept get a gradient, the choice gets none."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    inputs["pixel_values"].requires_grad_(True)
    with winnow.compress(model, CASES[kind].plan):
        model(**inputs, labels=labelled(inputs)).loss.backward()
    gradient = inputs["pixel_values"].grad
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    for name, weight in model.named_parameters():
        if "language_model.layers" in name or "projector" in name or "merger" in name:
            assert weight.grad is not None, name
            assert weight.grad.isfinite().all(), name


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_gradients_under_identity_are_bit_identical(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight
    model(**inputs, labels=labelled(inputs)).loss.backward()
    plain = weight.grad.clone()
    for plan in identities(build):
        model.zero_grad()
        with winnow.compress(model, plan):
            model(**inputs, labels=labelled(inputs)).loss.backward()
        assert torch.equal(weight.grad, plain), plan


@pytest.mark.parametrize(("kind", "build"), pairs(SOME))
def test_hidden_states_have_the_callers_length_and_the_rows_by_hand(kind, build):
    """One more than there are layers; where a token was read, its row; the state after the last layer is normed."""
    model, parts = zoo.model(build), zoo.samples(build, zoo.RAGGED)
    inputs, (plan, by_hand) = zoo.collate(parts), CASES[kind]
    with winnow.compress(model, plan):
        states = forward(model, inputs, output_hidden_states=True).hidden_states
    assert [tuple(s.shape) for s in states] == [(*inputs["input_ids"].shape, 64)] * (zoo.DEPTH + 1)
    reference = Reference(model)
    for row, part in enumerate(parts):
        padding = inputs["input_ids"].shape[1] - part["input_ids"].shape[1]
        entry = reference.entry(part)
        worked = by_hand(reference, part, entry)
        trace = reference.run(worked.entry, (), worked.cuts)
        text = torch.isin(torch.arange(part["input_ids"].shape[1]), torch.cat(entry.items), invert=True)
        for layer in range(1, zoo.DEPTH):
            expected = trace.layers[layer]
            shown = states[layer][row, padding:]
            for position in text.nonzero()[:, 0].tolist():
                own = expected.hidden[0, expected.held == position][0]
                assert (shown[position] - own).abs().max() <= 1e-4
        last = trace.hidden[0][torch.isin(trace.layers[-1].held, text.nonzero()[:, 0])]
        assert (states[-1][row, padding:][text] - last).abs().max() <= 1e-4


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_hidden_states_under_identity_are_bit_identical(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    plain = forward(model, inputs, output_hidden_states=True).hidden_states
    for plan in identities(build):
        with winnow.compress(model, plan):
            found = forward(model, inputs, output_hidden_states=True).hidden_states
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True)), plan


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_hidden_states_under_identity_are_those_that_gradients_flow_through(build):
    """Not copies of them: the caller can retain their gradients, which are the plain model's, with padding too."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)

    def gradients():
        output = model(**inputs, labels=labelled(inputs), output_hidden_states=True)
        for state in output.hidden_states[:-1]:
            state.retain_grad()
        output.loss.backward()
        return [state.grad for state in output.hidden_states[:-1]]

    plain = gradients()
    for plan in identities(build):
        with winnow.compress(model, plan):
            found = gradients()
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True)), plan


@pytest.mark.parametrize(("kind", "build"), pairs(SOME))
def test_fewer_logits_are_the_last_ones(kind, build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, CASES[kind].plan):
        full = forward(model, inputs).logits
        assert full.shape[:2] == inputs["input_ids"].shape
        some = torch.tensor([3, 5, full.shape[1] - 1])
        for asked, expected in ((1, full[:, -1:]), (4, full[:, -4:]), (some, full[:, some])):
            found = forward(model, inputs, logits_to_keep=asked).logits
            assert found.shape == expected.shape
            assert (found - expected).abs().max() <= 1e-5  # the head's product rounds by the number of its rows


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_dropped_position_repeats_the_survivor_before_it(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    with winnow.compress(model, Pick(keep=3)) as handle:
        logits = forward(model, inputs).logits[0]
        item = handle.last.items[0]
    start = int((inputs["input_ids"][0] == zoo.IMAGE).nonzero()[0])
    content = torch.from_numpy(item.layout.content) + start
    kept = set(content[item.kept].tolist())
    alive = [p for p in range(len(logits)) if p not in set(content.tolist()) or p in kept]
    for position in range(1, len(logits)):
        before = max(p for p in alive if p <= position)
        assert torch.equal(logits[position], logits[before])


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_outputs_as_tuples_are_those_of_the_mapping(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, Probed()):
        named = forward(model, inputs, output_hidden_states=True)
        plain = forward(model, inputs, output_hidden_states=True, return_dict=False)
    assert torch.equal(plain[0], named.logits)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_attentions_are_those_of_the_slots_that_each_layer_read(build):
    """Under eager attention: rows and columns are physical slots, ragged over the layers, as the ledger counts them."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    model.set_attn_implementation("eager")
    with winnow.compress(model, Probed()) as handle:
        attentions = forward(model, inputs, output_attentions=True).attentions
        lengths = [layer[0] for layer in handle.last.layer_tokens]
    assert [tuple(a.shape) for a in attentions] == [(1, 4, n, n) for n in lengths]
    for a in attentions:
        assert torch.allclose(a.sum(-1), torch.ones_like(a.sum(-1)), atol=1e-5)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_picture_features_are_returned_as_ever(build):
    """`image_hidden_states` is what the projector gave; a plan behind it does not touch that."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    plain = forward(model, inputs)
    with winnow.compress(model, Pick(keep=3)):
        found = forward(model, inputs)
    states = getattr(plain, "image_hidden_states", None)
    assert (states is None) == (build == "qwen2_5_vl")
    if states is not None:  # one tensor for all pictures; a list of one for each since transformers 5.24
        assert len(found.image_hidden_states) == len(states)
        assert all(torch.equal(a, b) for a, b in zip(found.image_hidden_states, states, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_train_mode_is_as_good_as_eval_mode(build, training):
    """No dropout in these models: the mode must change nothing."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, Probed()):
        expected = forward(model, inputs).logits
        model.train(training)
        assert torch.equal(forward(model, inputs).logits, expected)
