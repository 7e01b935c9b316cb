"""ZipVL by its card: the count from raw attention, the choice from that of one probe, and prefills among the chosen."""

from __future__ import annotations

import math

import pytest
import torch

import winnow
from tests import kvdecode, kvhand
from winnow.contract import Attend, KVView, Observe, State
from winnow.core.errors import WinnowError
from winnow.methods.zipvl import ZipVL
from winnow.parts.quantize import quantized_naive

STEPS = torch.randint(2, 120, (3, 5), generator=torch.Generator().manual_seed(5))


def view_of(weights, heads=2, group=2, **known):
    """A view in which query i gives key j a share of its attention that is proportional to `weights[b, i, j]`."""
    b, n = weights.shape[:2]
    keys = torch.eye(n).expand(b, heads, n, n)
    queries = (weights.log() * n**0.5)[:, None].expand(b, heads * group, n, n)
    return KVView.of(keys, torch.ones(b, heads, n, 4), queries, **known)


def random_view(seed, n, b=1, sharp=4.0, dtype=torch.float32, **known):
    generator = torch.Generator().manual_seed(seed)
    keys, values, queries = (torch.randn(b, h, n, 16, generator=generator).to(dtype) for h in (2, 2, 6))
    return KVView.of(keys, values, queries * sharp, **known)


def kept(action, lane=0):
    return action.k.lane(lane).lane(0).index.tolist()


def naive(view, rows, tau, last, raw=False):
    """The card, in lists, for the first sample of a view."""
    n, heads = view.n, view.queries.shape[1]
    given, readers = [0.0] * n, [0] * n
    for i in rows:
        for j in range(i + 1):
            readers[j] += 1
        for h in range(heads):
            q, keys = view.queries[0, h, i].double(), view.keys[0, h // view.group].double()
            logits = [float(q @ keys[j]) * view.scaling for j in range(i + 1)]
            exp = [math.exp(x - max(logits)) for x in logits]
            for j, e in enumerate(exp):
                given[j] += e / sum(exp) / heads
    held, count = 0.0, 0
    for a in sorted(given, reverse=True):
        if held >= tau * len(rows):
            break
        held, count = held + a, count + 1
    score = given if raw else [a / max(1, r) for a, r in zip(given, readers, strict=True)]
    count = max(count, last)
    order = sorted(range(n), key=lambda j: (j < n - last, -score[j], j))
    return sorted(order[:count])


def _is_the_card(find):
    for seed in range(4):
        view = random_view(seed, 40)
        for tau in (0.3, 0.7, 0.95):
            method = ZipVL(keep=f"mass={tau}", last=5, random=9)
            assert find(method, view) == naive(view, method.probes(view).tolist(), tau, 5)


@pytest.mark.system("zipvl", "exact")
def test_equals_the_card_written_naively():
    _is_the_card(lambda method, view: kept(method.evict(view, State())[0]))


def _all_in_one(method, view):
    """Counts and ranks by the same normalised score."""
    score = method.score(view)[:, 0]
    need = int((score.sort(descending=True).values.cumsum(1) < method.keep.mass * score.sum()).sum()) + 1
    return sorted(score[0].topk(need).indices.tolist())


@pytest.mark.parametrize(
    "stub",
    [
        lambda method, view: naive(view, method.probes(view).tolist(), method.keep.mass, 5, raw=True),
        lambda method, view: list(range(20)),
        _all_in_one,
    ],
    ids=["raw", "first", "one score"],
)
def test_the_card_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_the_card(stub)


@pytest.mark.system("zipvl", "exact")
def test_probes_are_the_last_queries_and_random_ones_the_same_for_all_samples():
    view = random_view(0, 200, b=2)
    rows = ZipVL(last=64, random=64).probes(view).tolist()
    assert rows == sorted(set(rows))
    assert len(rows) == 128
    assert rows[-64:] == list(range(136, 200))
    assert rows == ZipVL().probes(random_view(1, 200, b=1)).tolist()
    assert rows != ZipVL().probes(random_view(0, 200, layer=1, depth=2)).tolist()
    assert ZipVL().probes(random_view(0, 50)).tolist() == list(range(50))


@pytest.mark.system("zipvl", "exact")
def test_all_of_the_mass_is_everything_and_counts_grow_with_it():
    view = random_view(3, 60, sharp=2.0)
    counts = []
    for tau in (0.2, 0.4, 0.6, 0.8, 0.9, 0.99):
        counts.append(len(kept(ZipVL(keep=f"mass={tau}", last=1).evict(view, State())[0])))
    assert counts == sorted(counts)
    assert counts[0] < counts[2] < counts[-1] < 60
    assert isinstance(ZipVL(keep="mass=1").evict(view, State())[0], Observe)
    assert isinstance(ZipVL(keep="100%").evict(view, State())[0], Observe)


@pytest.mark.system("zipvl", "exact")
def test_samples_have_their_own_numbers_bit_for_bit():
    sharp, flat = random_view(0, 48, sharp=9.0), random_view(1, 48, sharp=1.0)
    parts = zip((sharp.keys, sharp.values, sharp.queries), (flat.keys, flat.values, flat.queries), strict=True)
    both = KVView.of(*(torch.cat(pair) for pair in parts))
    method = ZipVL(keep="mass=0.8", last=4, random=12)
    found = method.evict(both, State())[0]
    alone = [method.evict(view, State())[0] for view in (sharp, flat)]
    assert [kept(found, lane) for lane in (0, 1)] == [kept(one) for one in alone]
    assert alone[0].k.m < alone[1].k.m
    assert torch.equal(method.score(both)[:1], method.score(sharp))


@pytest.mark.system("zipvl", "exact")
def test_what_attends_before_is_what_the_cache_keeps_behind():
    view = random_view(2, 48, b=2, moment="before")
    method = ZipVL(keep="mass=0.6", last=4, random=12)
    before, state = method.evict(view, State())
    assert isinstance(before, Attend)
    assert before.rows.lanes == (2,)
    behind, after = method.evict(random_view(99, 48, b=2), state)  # of another view: the set is remembered
    assert not after.token
    for lane in (0, 1):
        rows = before.rows.lane(lane).index.tolist()
        assert rows[-4:] == [44, 45, 46, 47]
        assert [behind.k.lane(lane).lane(head).index.tolist() for head in (0, 1)] == [rows, rows]


def test_other_budgets_are_counts_by_the_same_score():
    view = random_view(4, 40)
    method = ZipVL(keep=12, last=4, random=10)
    score = method.score(view)[0, 0].clone()
    score[-4:] = torch.inf
    assert kept(method.evict(view, State())[0]) == sorted(score.topk(12).indices.tolist())


def test_half_precision_is_scored_in_single_and_nan_is_kept_last():
    view = random_view(5, 40, dtype=torch.bfloat16)
    assert ZipVL(last=4).score(view).dtype == torch.float32
    view = random_view(5, 40)
    view.keys[0, 0, 7] = torch.nan
    found = ZipVL(keep=39, last=4).evict(view, State())[0]
    assert found.k.m == 39
    assert len(kept(ZipVL(keep="mass=0.5", last=4).evict(view, State())[0])) >= 4


def _scene(objects, strength, n=160):
    """Queries that give each token of a few objects, of 4 tokens each, more than they give another token."""
    weights = torch.rand(1, n, n, generator=torch.Generator().manual_seed(0)) + 0.5
    for start in objects:
        weights[..., start : start + 4] *= strength
    return view_of(weights)


def _few_for_one_object(count):
    assert count(_scene([40], 100)) < 0.8 * count(_scene([10, 30, 50, 70, 90, 110], 100))


@pytest.mark.system("zipvl", "directional")
def test_one_object_needs_fewer_tokens_than_clutter():
    method = ZipVL(keep="mass=0.6", last=8, random=40)
    _few_for_one_object(lambda view: len(kept(method.evict(view, State())[0])))


def test_one_object_fails_for_a_share():
    with pytest.raises(AssertionError):
        _few_for_one_object(lambda view: len(kept(ZipVL(keep="20%", last=8).evict(view, State())[0])))


def _late_evidence_stays(select):
    evidence = [120, 121, 122, 123]
    found = select(_scene([120], 6))
    assert set(evidence) <= set(found), found


@pytest.mark.system("zipvl", "directional")
def test_late_evidence_is_found_though_few_probes_see_it():
    method = ZipVL(keep=20, last=8, random=120)
    _late_evidence_stays(lambda view: kept(method.evict(view, State())[0]))


def test_late_evidence_fails_for_a_stub():
    def raw(view):
        method = ZipVL(keep=20, last=8, random=120)
        whole = method.mass(view)[0][0]
        whole[-8:] = torch.inf
        return whole.topk(20).indices.tolist()

    for stub in (raw, lambda view: list(range(20)), lambda view: list(range(0, 160, 8))):
        with pytest.raises(AssertionError):
            _late_evidence_stays(stub)


PLAN = "zipvl:keep=mass=0.8,last=3,random=8"


@pytest.mark.system("zipvl", "model")
@pytest.mark.parametrize("build", ["llama", "llava_clip"])
def test_on_a_model_equals_the_full_cache_with_the_others_masked_in_the_prefill_too(build):
    model, inputs, _ = kvdecode.case(build)
    with winnow.compress(model, PLAN):
        first = kvhand.written(model, inputs, STEPS[:, :1])
        evicted = kvhand.evicted_of(first.past_key_values)
        got = kvhand.written(model, inputs, STEPS)
    held = [int((~gone).sum()) for gone in evicted.values()]
    assert len(set(held)) > 1  # layers keep their own numbers
    with kvhand.evicting(model, lambda layer, n: evicted.get(layer), sparse=True):
        wanted = kvhand.written(model, inputs, STEPS)
    plain = kvhand.written(model, inputs, STEPS)
    for a, b in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert (got.logits[0] - plain.logits[0]).abs().max() > 1e-3


def test_a_padded_batch_equals_its_samples():
    kvdecode.case("llama").check_batch(PLAN, STEPS)


def test_all_of_it_changes_no_bit():
    model, inputs, _ = kvdecode.case("llama")
    plain = kvhand.written(model, inputs, STEPS)
    with winnow.compress(model, "zipvl:keep=100%"):
        got = kvhand.written(model, inputs, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, plain.logits, strict=True))


def mixed_by_hand(x, kept, along, high=4, low=2):
    """One sample `[G, n, d]`: channels over their tokens, or tokens over the scaled channels of all heads, in lists."""
    made = torch.zeros_like(x)
    for some, bits in ((kept, high), (~kept, low)):
        at = some.nonzero()[:, 0].tolist()
        if not at:
            continue
        rows = x[:, at]
        if along == "tokens":
            for g in range(x.shape[0]):
                for c in range(x.shape[2]):
                    made[g, at, c] = torch.tensor(quantized_naive(rows[g, :, c].tolist(), bits))
            continue
        flat = rows.transpose(0, 1).flatten(1)
        scale = flat.abs().amax(0).sqrt()
        for i, token in enumerate(at):
            line = torch.tensor(quantized_naive((flat[i] / scale).tolist(), bits)) * scale
            made[:, token] = line.unflatten(0, (x.shape[0], -1))
    return made


@pytest.mark.system("zipvl", "exact")
def test_the_first_version_keeps_all_in_two_kinds_of_integers():
    sharp, flat = random_view(0, 48, sharp=9.0), random_view(1, 48, sharp=1.0)
    parts = zip((sharp.keys, sharp.values, sharp.queries), (flat.keys, flat.values, flat.queries), strict=True)
    both = KVView.of(*(torch.cat(pair) for pair in parts))
    method = ZipVL(keep="mass=0.8", last=4, random=12, kv="mixed")
    sets = [kept(method.replace(kv="evict").evict(both, State())[0], lane) for lane in (0, 1)]
    assert len(sets[0]) != len(sets[1])
    block = method.evict(both, State())[0].encode(both.keys, both.values)
    keys, values = block.read()
    for lane in (0, 1):
        mask = torch.zeros(48, dtype=torch.bool)
        mask[sets[lane]] = True
        torch.testing.assert_close(keys[lane], mixed_by_hand(both.keys[lane], mask, "tokens"))
        torch.testing.assert_close(values[lane], mixed_by_hand(both.values[lane], mask, "channels"))
        moved = block.rows(lambda x, lane=lane: x[[lane]]).read()
        assert torch.equal(moved[0][0], keys[lane])
        one = KVView.of(*(x[lane : lane + 1] for x in (both.keys, both.values, both.queries)))
        alone = method.evict(one, State())[0].encode(one.keys, one.values).read()
        assert torch.equal(alone[0][0], keys[lane])
        assert torch.equal(alone[1][0], values[lane])
    every = method.replace(keep="100%").evict(both, State())[0].encode(both.keys, both.values).read()[0]
    torch.testing.assert_close(every[0], mixed_by_hand(both.keys[0], torch.ones(48, dtype=torch.bool), "tokens"))


@pytest.mark.system("zipvl", "directional")
def test_two_kinds_of_bits_err_less_in_the_attention_than_the_same_bits_at_random():
    """Where attention is concentrated, it pays to spend the bits there."""
    view = random_view(3, 120, sharp=3.0)
    method = ZipVL(keep="mass=0.8", last=8, random=60, kv="mixed")
    attention = view.attention()
    wanted = attention @ view.values.repeat_interleave(view.group, 1)

    def error(kept):
        keys, values = (x.repeat_interleave(view.group, 1) for x in method.stored(view.keys, view.values, kept).read())
        logits = view.queries @ keys.transpose(2, 3) * view.scaling
        weights = logits.masked_fill(~view.visible()[:, None], -torch.inf).softmax(-1)
        return float((weights @ values - wanted).norm())

    own = method.replace(kv="evict").evict(view, State())[0].k
    kept = torch.zeros(1, 120, dtype=torch.bool)
    kept[0, own.index[0, 0]] = True
    assert own.m < 80
    for seed in range(3):
        blind = kept[:, torch.randperm(120, generator=torch.Generator().manual_seed(seed))]
        assert error(kept) < 0.95 * error(blind)


@pytest.mark.system("zipvl", "model", build="llama")
def test_the_first_version_on_a_model_equals_a_plain_cache_changed_by_hand():
    model, inputs = kvhand.text_model("llama"), kvhand.prompt((26,))
    with winnow.compress(model, PLAN):
        evicted = kvhand.evicted_of(kvhand.written(model, inputs, STEPS[:1, :1]).past_key_values)
    with winnow.compress(model, f"{PLAN},kv=mixed") as handle:
        got = kvhand.written(model, inputs, STEPS[:1])
        assert handle.last.kv_bytes < 0.6 * handle.last.kv_bytes_full

    def change(cache, done=set()):  # noqa: B006
        for index, layer in enumerate(cache.layers):
            if index not in done:
                kept = ~evicted[index][0, 0]
                layer.keys[0] = mixed_by_hand(layer.keys[0], kept, "tokens")
                layer.values[0] = mixed_by_hand(layer.values[0], kept, "channels")
                done.add(index)

    with kvhand.evicting(model, lambda layer, n: evicted[layer] if n == 26 else None, sparse=True):
        wanted = kvhand.stepped(model, inputs, STEPS[0], change)
    for a, b in zip(got.logits, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.system("zipvl", "model")
@pytest.mark.parametrize("build", ["llava_clip"])
def test_the_first_version_in_a_padded_batch_equals_its_samples(build):
    kvdecode.case(build).check_batch(f"{PLAN},kv=mixed", STEPS, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"bits": 5}, {"kv": "both"}, {"last": 0}, {"random": -1}, {"keep": "mass=0"}, {"keep": 0}]
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(WinnowError):
        ZipVL(**settings)
