"""Pictures read by cross-attention (Llama 3.2 Vision), against the plain model whose words cannot read the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from builds.mllama import BUILDS, IMAGE, MOST, SIDE
from cases import same
from probes import STEPS, Halve, Look, Pick, forward, generate, new_tokens, score, step_logits
from torch import Tensor
from transformers import DynamicCache

import winnow
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.engine.doctor import run_checks
from winnow.engine.flops import cross_flops
from winnow.signals.vision import VisionAttention

TOLERANCE = 1e-5
EACH = 1 + 16  # [CLS] and 4 × 4 patches
SHAPES = {"A": (2, 2), "B": (1, 1), "C": (6, 4)}  # of the canvas, as the class numbers them, and its real tiles
ROWS = ("3 A 6", "3 B 9", "2 C 4", "5 A 2 B 5")


@pytest.fixture
def model():
    return BUILDS[0].model()


def sample(row: str, places: int = 0, width: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """A row of text lengths and pictures; padded on the left to `width` words and with empty places for pictures."""
    generator = torch.Generator().manual_seed(seed + sum(map(ord, row)))
    ids, pictures, starts = [], [], []
    for word in row.split():
        if word.isdigit():
            ids += torch.randint(10, 200, (int(word),), generator=generator).tolist()
        else:
            starts.append(len(ids))
            ids.append(IMAGE)
            pictures.append(SHAPES[word])
    pad, places = max(0, width - len(ids)), max(places, len(pictures))
    pixels = torch.zeros(1, places, MOST, 3, SIDE, SIDE)
    kinds, real = torch.zeros(1, places, dtype=torch.int64), torch.zeros(1, places, MOST, dtype=torch.int64)
    reads = torch.zeros(1, pad + len(ids), places, MOST, dtype=torch.int64)
    ends = [*starts[1:], len(ids)][: len(starts)]
    for number, ((kind, tiles), start, end) in enumerate(zip(pictures, starts, ends, strict=True)):
        pixels[0, number, :tiles] = torch.randn(tiles, 3, SIDE, SIDE, generator=generator)
        kinds[0, number] = kind
        real[0, number, :tiles] = 1
        reads[0, pad + start : pad + end, number, :tiles] = 1
    mask = torch.tensor([[0] * pad + [1] * len(ids)])
    return {
        "input_ids": torch.tensor([[0] * pad + ids]),
        "attention_mask": mask,
        "pixel_values": pixels,
        "aspect_ratio_ids": kinds,
        "aspect_ratio_mask": real,
        "cross_attention_mask": reads,
    }


def batch(rows) -> dict[str, Tensor]:
    places = max(sum(not word.isdigit() for word in row.split()) for row in rows)
    width = max(sample(row)["input_ids"].shape[1] for row in rows) + 1
    parts = [sample(row, places, width) for row in rows]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class Hidden:
    """Hides states of pictures from a plain model, or puts others in their places, by a hook on its language model."""

    def __init__(self, plain, choose, rows=1):
        self.choose, self.gone, self.rows = choose, None, rows
        self.hook = plain.get_decoder().register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        states, mask = kwargs.get("cross_attention_states"), kwargs["cross_attention_mask"].clone()
        if states is not None:
            states, self.gone = self.choose(states.reshape(self.rows, -1, states.shape[-1]))
            kwargs = {**kwargs, "cross_attention_states": states}
        for row, gone in enumerate(self.gone):
            mask[row, ..., gone] = torch.finfo(mask.dtype).min
        return args, {**kwargs, "cross_attention_mask": mask}


def patches(inputs, row=0):
    """The columns of the patches of each picture of a row, and all columns that are empty."""
    found, idle = [], []
    for place, kind in enumerate(inputs["aspect_ratio_ids"][row].tolist()):
        start, tiles = place * MOST * EACH, {0: 0, **dict(SHAPES.values())}[kind]
        own = torch.arange(start, start + tiles * EACH)
        if tiles:
            found.append(own[(own - start) % EACH > 0])
        idle.append(torch.arange(start + tiles * EACH, start + MOST * EACH))
    return found, torch.cat(idle)


def picks(inputs, share):
    """By hand, what `Pick` leaves out of one row."""

    def choose(states):
        own, idle = patches(inputs)
        gone = [idle]
        for columns in own:
            keep = score(states[0, columns]).topk(max(1, round(share * len(columns)))).indices
            stays = torch.zeros(len(columns), dtype=torch.bool).scatter_(0, keep, True)
            gone.append(columns[~stays])
        return states, [torch.cat(gone)]

    return choose


def halves(inputs):
    """By hand, what `Halve` does: the mean of two patches in the place of the first."""

    def choose(states):
        own, idle = patches(inputs)
        states, gone = states.clone(), [idle]
        for columns in own:
            states[0, columns[::2]] = (states[0, columns[::2]] + states[0, columns[1::2]]) / 2
            gone.append(columns[1::2])
        return states, [torch.cat(gone)]

    return choose


def by_hand(model, inputs, choose, forced) -> Tensor:
    """`[T, vocabulary]` of a plain copy that cannot read what is left out, behind the prompt and each forced token."""
    plain = copy.deepcopy(model)
    Hidden(plain, choose)
    output = plain(**inputs, use_cache=True)
    logits, reads = [output.logits[0, -1]], inputs["cross_attention_mask"][:, -1:]
    for token in forced[:-1]:
        output = plain(
            input_ids=torch.tensor([[token]]), cross_attention_mask=reads, past_key_values=output.past_key_values
        )
        logits.append(output.logits[0, -1])
    return torch.stack(logits)


def apart(got, want) -> float:
    return float((got - want).detach().abs().max() / want.detach().abs().max())


@pytest.mark.parametrize("row", ROWS)
def test_keep_all_is_bit_identical(model, row):
    inputs = sample(row)
    plain, logits = generate(model, inputs), forward(model, inputs).logits
    with winnow.compress(model, Pick(keep="100%")):
        assert torch.equal(forward(model, inputs).logits, logits)
        assert same(generate(model, inputs), plain)
    assert torch.equal(forward(model, inputs).logits, logits)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("method", "hand"), [(Pick(keep="25%"), lambda i: picks(i, 0.25)), (Halve(), halves)])
def test_every_step_equals_the_plain_model_that_cannot_read_the_rest(model, row, method, hand):
    inputs = sample(row)
    full = forward(model, inputs).logits[0, -1]
    with winnow.compress(model, method) as handle:
        output = generate(model, inputs)
        ledger = handle.last
    forced = new_tokens(output, inputs)[0].tolist()
    want = by_hand(model, inputs, hand(inputs), forced)
    assert apart(step_logits(output)[0], want) <= TOLERANCE
    assert apart(want[0], full) > 1e-3
    left = sum(len(item.kept) for item in ledger.items)
    cls = sum(dict(SHAPES.values())[kind] for kind in inputs["aspect_ratio_ids"][0].tolist())
    cross = model.config.text_config.cross_attention_layers
    for index, (layer, read) in enumerate(zip(output.past_key_values.layers, ledger.layer_tokens, strict=True)):
        assert read == ((left + cls,) if index in cross else (inputs["input_ids"].shape[1],))
        assert layer.keys.shape[-2] == read[0] + (0 if index in cross else STEPS - 1)


def test_the_ledger_counts_what_is_held_and_computed(model):
    inputs = sample("3 A 6")
    full = forward(model, inputs)
    with winnow.compress(model, Pick(keep=5)) as handle:
        output, ledger = forward(model, inputs), handle.last

    def held(cache):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    assert (ledger.kv_bytes, ledger.kv_bytes_full) == (held(output.past_key_values), held(full.past_key_values))
    text, cross = model.config.text_config, model.config.text_config.cross_attention_layers
    assert ledger.flops == cross_flops(text, (10,), (7,), cross) < ledger.flops_full
    assert ledger.flops_full == cross_flops(text, (10,), (MOST * EACH,), cross)
    (item,) = ledger.items
    assert (item.n_visual, len(item.kept), item.layout.boxes[item.layout.content][0].tolist()) == (
        32, 5, [0, 0, 0.125, 0.25],
    )  # fmt: skip


@pytest.mark.parametrize("method", [Pick(keep="25%"), Pick(keep=7), Halve()])
def test_a_batch_equals_its_samples(model, method):
    """Of unequal prompts, shapes and numbers of pictures, so that rows hold unequal numbers of keys."""
    rows = ("3 A 6", "3 C 9", "5 A 2 B 5")
    with winnow.compress(model, method) as handle:
        together = generate(model, batch(rows))
        items = handle.last.items
        for number, row in enumerate(rows):
            alone = generate(model, sample(row))
            assert apart(step_logits(together)[number], step_logits(alone)[0]) <= TOLERANCE
            own = [item.kept.tolist() for item in items if item.row == number]
            assert own == [item.kept.tolist() for item in handle.last.items]


def test_a_row_without_a_picture_stays_as_it_is(model):
    rows = ("3 A 6", "9")
    inputs = batch(rows)
    with winnow.compress(model, Pick(keep=3)) as handle:
        got = forward(model, inputs).logits
        assert [item.row for item in handle.last.items] == [0]
    assert apart(got[1, -9:], forward(model, inputs).logits[1, -9:]) <= TOLERANCE


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}, {"use_cache": False}]
)
def test_modes_of_generate(model, options):
    inputs = sample("3 A 6")
    with winnow.compress(model, Pick(keep="25%")):
        got = model.generate(**inputs, max_new_tokens=5, do_sample=False, **options)
    plain = copy.deepcopy(model)
    rows = options.get("num_beams", 1)
    Hidden(plain, lambda states: _of_all(states, picks(inputs, 0.25)), rows)
    assert torch.equal(got, plain.generate(**inputs, max_new_tokens=5, do_sample=False, **options))


def _of_all(states, choose):
    _, (gone,) = choose(states[:1])
    return states, [gone] * states.shape[0]


def test_a_later_turn_reads_what_is_held(model):
    inputs, more = sample("3 A 6"), torch.tensor([[11, 12, 13]])
    reads = inputs["cross_attention_mask"][:, -1:].expand(-1, 3, -1, -1)
    with winnow.compress(model, Pick(keep="25%")):
        held = forward(model, inputs, use_cache=True).past_key_values
        copied = copy.deepcopy(held)
        got = model(input_ids=more, cross_attention_mask=reads, past_key_values=held).logits
        assert torch.equal(model(input_ids=more, cross_attention_mask=reads, past_key_values=copied).logits, got)
    plain = copy.deepcopy(model)
    Hidden(plain, picks(inputs, 0.25))
    past = plain(**inputs, use_cache=True).past_key_values
    want = plain(input_ids=more, cross_attention_mask=reads, past_key_values=past).logits
    assert apart(got, want) <= TOLERANCE


def test_gradients_flow_through_what_is_kept(model):
    inputs = sample("3 A 6")
    labels = inputs["input_ids"].clone()
    with winnow.compress(model, Pick(keep="25%")):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
    own = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    plain = copy.deepcopy(model)
    plain.zero_grad()
    Hidden(plain, picks(inputs, 0.25))
    want = plain(**inputs, labels=labels).loss
    want.backward()
    assert abs((loss - want).item()) <= 1e-5
    grads = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert own.keys() == grads.keys()
    assert "model.multi_modal_projector.weight" in own
    for name, grad in own.items():
        assert torch.allclose(grad, grads[name], rtol=1e-3, atol=1e-6), name


def test_what_cannot_be_right_is_refused(model):
    inputs = sample("3 A 6")
    for plan in (
        "fastv:layer=1,keep=50%",
        Look((VisionAttention(0, query="all"),)),
        "divprune:keep=4 | positions=compact",
    ):
        with pytest.raises(WinnowError):
            winnow.compress(model, plan)
    with pytest.raises(UnsupportedError, match="use winnow"):
        winnow.prepare(model, inputs, Pick(keep=3))
    with winnow.compress(model, Pick(keep=3)) as handle:
        with pytest.raises(UnsupportedError, match="static"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        held = forward(model, inputs, use_cache=True).past_key_values
        with pytest.raises(UnsupportedError, match="holds pictures already"):
            model(**inputs, past_key_values=held)
        with pytest.raises(WinnowError, match="cannot be cropped"):
            held.crop(-1)
        states = torch.randn(MOST, EACH, model.config.text_config.hidden_size)
        rest = {name: x for name, x in inputs.items() if "aspect" not in name and name != "pixel_values"}
        with pytest.raises(UnsupportedError, match="Pass pixel_values"):
            model(**rest, cross_attention_states=states)
        with handle.using("full"):
            model(**rest, cross_attention_states=states)
    with pytest.raises(WinnowError, match="no longer compressed"):
        model(input_ids=torch.tensor([[5]]), past_key_values=held)


def test_text_alone_goes_through(model):
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    want = model(**inputs).logits
    with winnow.compress(model, Pick(keep=3)) as handle:
        assert torch.equal(model(**inputs).logits, want)
        assert handle.last.read_in_full == "no picture came with the request"


def test_a_cache_of_the_caller_and_none_give_the_same(model):
    inputs = sample("3 A 6")
    with winnow.compress(model, "divprune:keep=6"):
        want = model(**inputs, use_cache=False).logits
        assert torch.equal(model(**inputs, past_key_values=DynamicCache()).logits, want)


def test_the_doctor_passes_and_sees_a_broken_mask(model, monkeypatch):
    samples = [sample("3 A 6"), sample("3 C 9")]
    checks = run_checks(model, samples, {})
    assert [check.detail for check in checks if not check.ok] == []
    last = lambda self, given, like: given[..., -self.index.shape[1] :]  # noqa: E731
    monkeypatch.setattr("winnow.engine.cross_pass.CrossKept.mask", last)
    red = [check.name for check in run_checks(model, samples, {}) if not check.ok]
    assert "a subset equals the same subset by hand" in red
