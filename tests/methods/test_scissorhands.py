"""Scissorhands by its card: counts of rows below average; the newest stay; several go at once, and counts with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import winnow
from tests import kvhand
from tests.kvdecode import BUILDS, case, recorded, words
from winnow.contract import KVBudget, KVView, Observe, State
from winnow.core.errors import WinnowError
from winnow.methods.scissorhands import Scissorhands, low_rows
from winnow.parts.bits import packed, unpacked

from .kvchecks import attention_by_hand, sample, view_of


def _stub(view: KVView, method: Scissorhands) -> list[list[int]]:
    """The newest slots."""
    return [list(range(view.n - view.budget(method.keep), view.n))] * (view.b * view.heads)


def _kept(view: KVView, method: Scissorhands) -> list[list[int]]:
    return method.evict(view, State())[0].k.index.flatten(0, 1).tolist()


def _low(view: KVView, history: int) -> Tensor:
    """`[b, G, w, N]` rows below average, one entry at a time."""
    attention = attention_by_hand(view).unflatten(1, (view.heads, view.group)).mean(2)[:, :, -history:]
    rows = attention.shape[2]
    low = torch.zeros(attention.shape, dtype=torch.bool)
    for row in range(rows):
        seen = view.n - rows + row + 1
        low[:, :, row, :seen] = attention[:, :, row, :seen] < 1 / seen
    return low


def _drop(counts: list[int], recent: int, keep: int) -> list[int]:
    """Drop the largest count, the older of equals, until so many are left."""
    left = list(range(len(counts)))
    while len(left) > keep:
        open_ = [j for j in left if j < len(counts) - recent]
        left.remove(max(open_, key=lambda j: (counts[j], -j)))
    return left


def _is_the_paper(kept) -> None:
    for seed in range(4):
        for history, recent, keep in ((5, 3, 9), (400, 10, 12), (12, 0, 20)):
            view = view_of(b=2, seed=seed)
            method = Scissorhands(keep=keep, history=history, recent_slots=recent)
            counts = _low(view, history).sum(2).flatten(0, 1).tolist()
            assert kept(view, method) == [_drop(own, recent, keep) for own in counts]


@pytest.mark.system("scissorhands", "exact")
def test_equals_the_paper_written_naively() -> None:
    _is_the_paper(_kept)


def test_the_paper_fails_for_a_stub() -> None:
    with pytest.raises(AssertionError):
        _is_the_paper(_stub)


@pytest.mark.system("scissorhands", "exact")
def test_decoding_equals_the_paper_written_naively() -> None:
    """Prompt and decoded tokens, one cache that is cut whenever it holds more than B; its history goes with it."""
    prompt, steps, limit, history, recent = 14, 40, 16, 9, 2
    whole = view_of(n=prompt + steps, seed=3)
    method = Scissorhands(keep="100%", limit=limit, history=history, recent_slots=recent, drop=5)
    state, now = State(), torch.arange(prompt).expand(1, 2, -1)
    rows: list[list[tuple[list[int], list[int]]]] = [[], []]  # of each head: what a row saw, and what was low of it
    held = [list(range(prompt)), list(range(prompt))]
    sizes = []
    for at in range(prompt, prompt + steps + 1):
        new = at - prompt or prompt
        queries = whole.queries[:, :, at - 1 : at] if at > prompt else whole.queries[:, :, :prompt]
        parts = [x.gather(2, now[..., None].expand(-1, -1, -1, x.shape[3])) for x in (whole.keys, whole.values)]
        moment, fresh = ("decode", 1) if at > prompt else ("prefill", new)
        action, state = method.evict(KVView.of(*parts, queries, moment=moment, fresh=fresh), state)

        for head in range(2):
            for row in range(queries.shape[2]):
                ids = [j for j in held[head] if j < at - queries.shape[2] + row + 1]
                both = whole.queries[0, 2 * head : 2 * head + 2, at - queries.shape[2] + row].double()
                logits = both @ whole.keys[0, head, ids].double().T * whole.scaling
                mean = logits.softmax(-1).mean(0)
                rows[head].append((ids, [j for j, a in zip(ids, mean, strict=True) if a < 1 / len(ids)]))
            if len(held[head]) > limit:
                counts = [sum(j in low for _, low in rows[head][-history:]) for j in held[head]]
                held[head] = [held[head][i] for i in _drop(counts, recent, limit + 1 - 5)]

        if not isinstance(action, Observe):
            now = now.gather(2, action.k.index)
            low = state.token["low"]
            at_ = action.k.index[..., None].expand(-1, -1, -1, low.shape[3])
            state = State({"low": low.gather(2, at_)})
        assert now[0].tolist() == held
        sizes.append(now.shape[2])
        now = torch.cat([now, torch.full((1, 2, 1), at)], 2)
        held = [[*own, at] for own in held]
        low = state.token["low"]
        state = State({"low": torch.cat([low, torch.zeros_like(low[:, :, :1])], 2)})
    assert sizes.count(limit + 1 - 5) >= 4
    assert max(sizes) == limit


@pytest.mark.system("scissorhands", "exact")
def test_a_limit_that_holds_the_whole_is_the_identity() -> None:
    view = view_of()
    for settings in ({"keep": "100%"}, {"keep": view.n}, {"keep": view.n + 5}):
        assert isinstance(Scissorhands(**settings).evict(view, State())[0], Observe)


@pytest.mark.system("scissorhands", "exact")
def test_in_a_model_the_cache_holds_at_most_b_and_the_newest_stay() -> None:
    model, inputs = kvhand.text_model("llama", layers=1), kvhand.prompt((18,))
    tokens, sizes = words(14)[:1], []
    with winnow.compress(model, "scissorhands:keep=18,limit=20,recent_slots=6,history=7"), recorded(model) as gone:
        kvhand.written(model, inputs, tokens)
    for read in range(18, 32):
        own = gone.get((0, read), torch.zeros(1, 2, read, dtype=torch.bool))
        assert not own[:, :, -6:].any()
        sizes.append(read - int(own[0, 0].sum()))
    assert sizes == [18, 19, 20, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 11]


def test_equal_counts_the_older_goes() -> None:
    keys = torch.zeros(1, 1, 12, 4)
    kept = _kept(KVView.of(keys, keys), Scissorhands(keep=5, recent_slots=2))
    assert kept == [[7, 8, 9, 10, 11]]


def test_each_layer_has_its_own_budget_and_limit() -> None:
    method = Scissorhands(keep=[6, 9], limit=[7, 12], recent_slots=1)
    for layer, (left, limit, after) in enumerate(((6, 7, 5), (9, 12, 7))):
        view = replace(view_of(), layer=layer, depth=2)
        assert method.evict(view, State())[0].k.m == left
        for n in (limit, limit + 1):
            last = replace(view_of(n=n, rows=1), layer=layer, depth=2, moment="decode", fresh=1)
            action = method.evict(last, State())[0]
            assert isinstance(action, Observe) if n == limit else action.k.m == after


def test_a_batch_equals_its_samples_and_broken_keys_do_no_harm() -> None:
    view = view_of(b=3, n=30)
    view.keys[1, 0, 4] = torch.nan
    method = Scissorhands(keep=9, history=6, recent_slots=2)
    kept = method.evict(view, State())[0].k.index
    for row in range(3):
        assert torch.equal(method.evict(sample(view, row), State())[0].k.index[0], kept[row])
    half = KVView.of(view.keys.bfloat16(), view.values.bfloat16(), view.queries.bfloat16())
    assert method.score(half).dtype == torch.float64
    assert method.shorten(view, KVBudget(9)).k.m == 9


def test_history_is_eight_steps_to_a_byte() -> None:
    flags = torch.rand(2, 3, 21, generator=torch.Generator().manual_seed(0)) > 0.5
    assert packed(flags).shape == (2, 3, 3)
    assert torch.equal(unpacked(packed(flags), 21), flags)
    view = view_of(n=50)
    _, state = Scissorhands(keep=20, limit=24, history=16, recent_slots=3).evict(view, State())
    assert state.token["low"].shape == (1, 2, 50, 2)
    assert torch.equal(unpacked(state.token["low"], 16), low_rows(view, 16))
    assert not Scissorhands(keep=20).evict(view, State())[1].token


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"history": 0}, "at least 1"),
        ({"limit": 10}, "newest"),
        ({"limit": 30, "drop": 25}, "newest"),
        ({"limit": 30, "drop": 0}, "drop"),
        ({"recent_slots": -1}, "recent_slots"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, said) -> None:
    with pytest.raises(WinnowError, match=said):
        Scissorhands(**settings)


def _errors(select) -> tuple[float, float, float]:
    """Error of attention outputs of later queries by a selection, random slots and the newest ones; evidence is early,
    and is attended to all the time."""
    generator = torch.Generator().manual_seed(0)
    n, d, later, k = 160, 32, 20, 32
    evidence = torch.arange(40, 60)
    keys, values, queries = (torch.randn(1, 1, m, d, generator=generator) for m in (n, n, n + later))
    u = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
    keys, queries = keys - (keys @ u)[..., None] * u, 0.5 * queries + 8 * u
    keys[:, :, evidence] += 3 * u
    values[:, :, evidence] += 2

    def attend(keys: Tensor, values: Tensor) -> Tensor:
        return (queries[:, :, n:] @ keys.transpose(2, 3) * d**-0.5).softmax(-1) @ values

    view, full = KVView.of(keys, values, queries[:, :, :n]), attend(keys, values)
    chosen = (select(view, k), _random(view, k), torch.arange(n - k, n))
    return tuple(float((attend(keys[:, :, at], values[:, :, at]) - full).norm() / full.norm()) for at in chosen)  # type: ignore[return-value]


def _scissors(view: KVView, k: int) -> Tensor:
    return Scissorhands(keep=k, history=12).evict(view, State())[0].k.index[0, 0]


def _random(view: KVView, k: int) -> Tensor:
    return torch.randperm(view.n, generator=torch.Generator().manual_seed(1))[:k]


def _check_direction(select) -> None:
    own, random, window = _errors(select)
    assert own < 0.6 * random
    assert own < 0.2 * window


@pytest.mark.system("scissorhands", "directional")
def test_at_a_fifth_early_evidence_is_better_kept_than_by_chance_or_by_a_window() -> None:
    _check_direction(_scissors)


@pytest.mark.parametrize("stub", [_random, lambda view, k: torch.arange(k)])
def test_the_direction_fails_for_a_stub(stub) -> None:
    with pytest.raises(AssertionError):
        _check_direction(stub)


@pytest.mark.system("scissorhands", "directional")
def test_one_peak_does_not_outvote_what_each_query_sees() -> None:
    """In each of twelve rows another slot takes a third of the attention; twenty slots are above average in all."""
    n, rows, evidence = 150, 12, range(5, 25)
    logits = torch.zeros(rows, n)
    logits[:, 5:25] = 2
    logits[torch.arange(rows), torch.arange(60, 60 + rows)] = 5
    keys = torch.eye(n)[None, None]
    view = KVView.of(keys, keys, logits[None, None] * n**0.5)
    kept = Scissorhands(keep=20, history=rows, recent_slots=0).evict(view, State())[0].k.index[0, 0].tolist()
    summed = view.mass(rows)[0, 0].topk(20).indices.tolist()
    assert kept == list(evidence)
    assert len(set(summed) & set(evidence)) < 10


PLAN = "scissorhands:keep=40%,limit=14,recent_slots=3,history=6,drop=4"


@pytest.mark.system("scissorhands", "model")
@pytest.mark.parametrize("build", BUILDS)
def test_decoding_equals_the_full_cache_with_evicted_keys_masked(build: str) -> None:
    case(build, layers=2).check_evictions(PLAN, words(6))


@pytest.mark.parametrize("build", BUILDS[:2])
def test_a_padded_batch_equals_its_samples(build: str) -> None:
    case(build, layers=2).check_batch(PLAN, words(6))
