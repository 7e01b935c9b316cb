"""EMS by its card: scores of window and of all rows, eviction by mass, and merging into classes with a zero class."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kvdecode import BUILDS, case, words
from winnow.contract import KVBudget, KVReduce, KVView, Observe, State
from winnow.core.errors import WinnowError
from winnow.methods.ems import EMS

from .kvchecks import attention_by_hand, sample, view_of

SMALL = {"window": 4, "kernel": 3, "zero": 0.6}


def _scores(view: KVView, method: EMS) -> Tensor:
    """`[b, G, N]` by the card's formulas, from attention written out by hand."""
    attention = attention_by_hand(view)
    n, w = view.n, min(method.window, attention.shape[2])
    local = attention[:, :, -w:].mean(2)
    whole = attention.sum(2) / torch.arange(n, 0, -1)
    whole = whole / whole.sum(-1, keepdim=True) * local.sum(-1, keepdim=True)
    both = torch.maximum(local, whole)
    half = method.kernel // 2
    padded = torch.nn.functional.pad(both, (half, half))
    pooled = torch.stack([padded[..., i : i + method.kernel].mean(-1) for i in range(n)], -1)
    return pooled.unflatten(1, (view.heads, view.group)).mean(2)


def _by_hand(view: KVView, method: EMS, count: int) -> list[tuple[list[int], Tensor, Tensor, tuple[int, int, int]]]:
    """Kept slots, values, merged keys, and how many slots are in classes, in the zero class and evicted, by lane."""
    found = []
    for s, keys, values in zip(
        _scores(view, method).flatten(0, 1), view.keys.flatten(0, 1), view.values.flatten(0, 1), strict=True
    ):
        n, w = view.n, method.window
        order = sorted(range(n - w), key=lambda j: (-s[j], j))
        centres, rest = sorted(order[: count - w]), order[count - w :]
        total, held, candidates = s[: n - w].sum(), s[centres].sum(), []
        for j in rest:
            if held < method.mass * total and len(candidates) < int(method.reach * count):
                candidates.append(j)
            held = held + s[j]
        members: dict[int, list[int]] = {c: [c] for c in centres}
        zero = 0
        for j in candidates:
            alike = [torch.cosine_similarity(keys[j], keys[c], dim=0).item() for c in centres]
            best = max(range(len(centres)), key=lambda i: alike[i])
            if alike[best] >= method.zero:
                members[centres[best]].append(j)
            else:
                zero += 1
        kept = [*centres, *range(n - w, n)]
        means = [
            torch.stack([
                (s[members.get(c, [c])].float() @ x[members.get(c, [c])]) / s[members.get(c, [c])].sum() for c in kept
            ])
            for x in (values, keys)
        ]  # fmt: skip
        sizes = sum(map(len, members.values()))
        found.append((kept, means[0].float(), means[1].float(), (sizes, zero, n - w - sizes - zero)))
    return found


def _is_the_card(shorten) -> None:
    for seed in range(3):
        view = view_of(b=2, n=48, d=4, seed=seed)
        for settings in (SMALL, SMALL | {"mass": 0.7, "kernel": 5}, SMALL | {"reach": 0.5, "merge_keys": True}):
            method = EMS(keep=14, **settings)
            action = shorten(view, method)
            keys, values = (x.apply(y).flatten(0, 1) for x, y in ((action.k, view.keys), (action.v, view.values)))
            slots = action.k.representatives.flatten(0, 1).tolist()
            for lane, (kept, means, merged, _) in enumerate(_by_hand(view, method, 14)):
                assert slots[lane] == kept
                torch.testing.assert_close(values[lane], means, atol=1e-5, rtol=1e-5)
                own = view.keys.flatten(0, 1)[lane, kept]
                torch.testing.assert_close(keys[lane], merged if method.merge_keys else own, atol=1e-5, rtol=1e-5)


@pytest.mark.system("ems", "exact")
def test_equals_the_card_written_naively() -> None:
    _is_the_card(lambda view, method: method.evict(view, State())[0])


@pytest.mark.parametrize("changes", [{"scores": "window"}, {"scores": "all"}, {"zero": 0.9}, {"mass": 0.3}])
def test_the_card_fails_for_other_settings(changes) -> None:
    with pytest.raises(AssertionError):
        _is_the_card(lambda view, method: method.replace(**changes).evict(view, State())[0])


@pytest.mark.system("ems", "exact")
def test_classes_the_zero_class_and_what_is_evicted_are_all_but_the_window() -> None:
    view, method = view_of(b=1, n=48, d=4, seed=1), EMS(keep=14, **SMALL)
    action = method.evict(view, State())[0]
    lanes = _by_hand(view, method, 14)
    merged = sum(own[3][0] - 10 for own in lanes)
    assert 0 < int(view.notes["merged"]) == merged
    assert 0 < int(view.notes["unlike"]) == sum(own[3][1] for own in lanes)
    for lane, (_, _, _, sizes) in enumerate(lanes):
        assert sum(sizes) == 48 - method.window
        fed = int((action.v.to_matrix()[0, lane] != 0).sum())
        assert fed == sizes[0] + method.window


@pytest.mark.system("ems", "exact")
@pytest.mark.parametrize("settings", [{"zero": 1.01}, {"mass": 0.0}, {"reach": 0}])
def test_without_merging_it_is_pure_eviction(settings) -> None:
    view, method = view_of(b=2, n=48), EMS(keep=14, **(SMALL | settings))
    action = method.evict(view, State())[0]
    at = action.k.representatives[..., None].expand(-1, -1, -1, 8)
    assert torch.equal(action.v.apply(view.values), view.values.gather(2, at))
    assert torch.equal(action.k.apply(view.keys), view.keys.gather(2, at))
    assert action.log_bias is None


@pytest.mark.system("ems", "exact")
@pytest.mark.parametrize("keep", [48, 60, "100%"])
def test_a_budget_that_holds_all_is_the_identity(keep) -> None:
    assert isinstance(EMS(keep=keep, **SMALL).evict(view_of(n=48), State())[0], Observe)


@pytest.mark.parametrize("keep", [1, 4, 5, 47])
def test_small_and_large_budgets_keep_the_newest(keep: int) -> None:
    action = EMS(keep=keep, **SMALL).evict(view_of(n=48), State())[0]
    assert action.k.m == max(keep, 4)
    assert action.k.representatives[0, 0].tolist()[-4:] == [44, 45, 46, 47]


@pytest.mark.system("ems", "exact")
def test_scores_add_up_over_decoding_and_classes_carry_their_sum() -> None:
    """A prompt, sixteen tokens, and the second compression, with sums kept by hand."""
    whole, prompt = view_of(n=56, d=4, seed=2), 40
    method = EMS(keep=16, limit=16, every=16, **SMALL)
    first = KVView.of(*(x[:, :, :prompt] for x in (whole.keys, whole.values, whole.queries)))
    action, state = method.evict(first, State())
    attention = attention_by_hand(first)
    mass, rows = attention.sum(2), torch.arange(prompt, 0, -1).double().expand(1, 4, -1)
    feeds = (action.v.to_matrix()[0] != 0).double()  # [G, 16, 40]
    assert int(feeds.sum(-1).max()) > 1
    mass = torch.stack([feeds[h // 2] @ mass[0, h] for h in range(4)])
    rows = torch.stack([rows[0, h, action.k.representatives[0, h // 2]] for h in range(4)])
    summed = action.v.to_matrix() != 0
    state = State(
        {"rows": state.token["rows"].gather(2, action.k.representatives)},
        summed={"mass": summed.to(torch.float32) @ state.summed["mass"]},
    )
    keys, values = action.k.apply(first.keys), action.v.apply(first.values)
    for at in range(prompt, 56):
        keys = torch.cat([keys, whole.keys[:, :, at : at + 1]], 2)
        values = torch.cat([values, whole.values[:, :, at : at + 1]], 2)
        recent = whole.queries[:, :, max(0, at - 63) : at + 1][:, :, -keys.shape[2] :]
        view = KVView.of(keys, values, recent, moment="decode", fresh=1)
        state = State(
            {"rows": torch.nn.functional.pad(state.token["rows"], (0, 1))},
            summed={"mass": torch.nn.functional.pad(state.summed["mass"], (0, 0, 0, 1))},
        )
        action, state = method.evict(view, state)
        now = attention_by_hand(KVView.of(keys, values, recent[:, :, -1:]))[0, :, 0]
        mass = torch.nn.functional.pad(mass, (0, 1)) + now
        rows = torch.nn.functional.pad(rows, (0, 1)) + 1
        assert isinstance(action, Observe) == (at < 55)
    torch.testing.assert_close(state.summed["mass"][0].transpose(1, 2).reshape(4, -1).double(), mass, atol=1e-5, rtol=0)
    local = attention_by_hand(KVView.of(keys, values, recent[:, :, -4:]))[0].mean(1)
    score = mass / rows
    both = torch.maximum(score / score.sum(-1, keepdim=True), local)
    padded = torch.nn.functional.pad(both, (1, 1))
    pooled = torch.stack([padded[:, i : i + 3].mean(1) for i in range(32)], 1).unflatten(0, (2, 2)).mean(1)
    for head in range(2):
        best = sorted(range(28), key=lambda j: (-pooled[head, j], j))[:12]
        assert action.k.representatives[0, head].tolist() == [*sorted(best), 28, 29, 30, 31]


def test_a_batch_equals_its_samples_and_broken_keys_do_no_harm() -> None:
    view, method = view_of(b=3, n=48, d=4), EMS(keep=14, **SMALL)
    view.values[1, 0, 20] = torch.nan
    action = method.evict(view, State())[0]
    for row in range(3):
        own = method.evict(sample(view, row), State())[0]
        assert torch.equal(own.v.lane(0).to_matrix(), action.v.lane(row).to_matrix())
    broken = view_of(n=48)
    broken.keys[0, 0, 7] = torch.nan
    assert method.evict(broken, State())[0].k.m == 14
    half = view_of(n=48)
    half = KVView.of(half.keys.bfloat16(), half.values.bfloat16(), half.queries.bfloat16())
    assert method.score(half).dtype == torch.float32
    assert method.shorten(half, KVBudget("25%")).k.m == 12


@pytest.mark.parametrize(
    ("settings", "said"), [({"reach": -1.0}, "reach"), ({"mass": 1.5}, "mass"), ({"pool": "sum"}, "mean, max")]
)
def test_settings_that_do_not_fit_are_refused(settings, said) -> None:
    with pytest.raises(WinnowError, match=said):
        EMS(**settings)


def _needles(scores: str) -> set[int]:
    """A slot that many early rows see, and one that the window alone sees, among 400; which of them stay at 5 %."""
    n, early, late = 400, 60, 200
    logits = 0.2 * torch.randn(n, n, generator=torch.Generator().manual_seed(0))
    logits[early:250, early] += 5
    logits[-8:, late] += 5
    logits[100:-8, 20:50:2] += 3  # what all rows but the last see
    keys = torch.eye(n)[None, None]
    view = KVView.of(keys, keys, logits[None, None] * n**0.5)
    method = EMS(keep="5%", window=8, kernel=1, scores=scores, zero=2)
    return set(method.evict(view, State())[0].k.representatives[0, 0].tolist()) & {early, late}


@pytest.mark.system("ems", "directional")
def test_both_scores_keep_both_needles_and_each_alone_loses_one() -> None:
    assert _needles("both") == {60, 200}
    assert _needles("window") == {200}
    assert _needles("all") == {60}


def _repeats(seed: int) -> tuple[KVView, Tensor]:
    """Few contents, each there many times with its own noise, and a later query."""
    generator = torch.Generator().manual_seed(seed)
    n, d = 240, 32
    of = torch.randint(0, 12, (n,), generator=generator)
    content, value = (torch.randn(12, d, generator=generator) for _ in range(2))
    keys = 2 * content[of] + 0.2 * torch.randn(n, d, generator=generator)
    values = value[of] + torch.randn(n, d, generator=generator)
    queries = content[torch.randint(0, 12, (n + 40,), generator=generator)][None, None]
    return KVView.of(keys[None, None], values[None, None], queries[:, :, :n]), queries[:, :, n:]


def _check_merging(shorten) -> None:
    errors = torch.zeros(2)
    for seed in range(6):
        view, query = _repeats(seed)
        weights = (query @ view.keys.transpose(2, 3) * view.scaling).softmax(-1)
        full = weights @ view.values
        method = EMS(keep=72, window=8, kernel=1, mass=1.0)
        for i, action in enumerate((shorten(view, method), method.replace(zero=2).evict(view, State())[0])):
            keys, values = action.k.apply(view.keys), action.v.apply(view.values)
            out = (query @ keys.transpose(2, 3) * view.scaling).softmax(-1) @ values
            errors[i] += (out - full).norm() / full.norm()
    assert errors[0] < 0.8 * errors[1], errors


@pytest.mark.system("ems", "directional")
def test_merging_repeats_is_nearer_to_the_full_cache_than_evicting_them() -> None:
    _check_merging(lambda view, method: method.evict(view, State())[0])


def _merged_anyhow(view: KVView, method: EMS) -> KVReduce:
    action = method.replace(zero=2).evict(view, State())[0]
    shuffled = torch.randperm(view.n, generator=torch.Generator().manual_seed(0))
    other = KVView.of(view.keys[:, :, shuffled], view.values, view.queries)
    return KVReduce(action.k, method.evict(other, State())[0].v)


@pytest.mark.parametrize("stub", [_merged_anyhow, lambda view, method: method.replace(zero=2).evict(view, State())[0]])
def test_the_direction_fails_for_a_stub(stub) -> None:
    with pytest.raises(AssertionError):
        _check_merging(stub)


@pytest.mark.system("ems", "model")
@pytest.mark.parametrize("build", BUILDS)
def test_without_merging_decoding_equals_the_full_cache_with_evicted_keys_masked(build: str) -> None:
    case(build, layers=2).check_evictions("ems:keep=50%,window=2,kernel=3,limit=13,every=3,zero=2", words(6))


@pytest.mark.system("ems", "model")
@pytest.mark.parametrize("build", BUILDS)
def test_decoding_reads_merged_values(build: str) -> None:
    """As the full cache, in the place of which the maps that were asked for are applied to it."""
    method = EMS(keep="50%", window=2, kernel=3, zero=-1.0, mass=1.0)
    maps = case(build, layers=2).check_maps(method, words(5))
    assert not any(action.v.is_selection for action in maps)


@pytest.mark.parametrize("build", BUILDS[:2])
def test_a_padded_batch_equals_its_samples(build: str) -> None:
    case(build, layers=2).check_batch("ems:keep=50%,window=2,kernel=3,limit=12,every=3,zero=0.1", words(6))
