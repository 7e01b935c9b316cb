"""RazorAttention by its card: full heads, sinks, buffers and one slot for the rest; the search for full heads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import winnow
from tests import kvhand, zoo
from tests.kvdecode import BUILDS, LENGTHS, case, close, words
from winnow.contract import Budget, KVBudget, KVView, Observe, State
from winnow.core.errors import WinnowError
from winnow.engine.calibrate import ordinary_tokens
from winnow.methods.razorattention import RazorAttention
from winnow.parts.retrieval import best_heads, head_scores, heads_of, known_heads, repeated

from .kvchecks import attention_by_hand, sample, view_of


def _output(keys: Tensor, values: Tensor, query: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = query @ keys.transpose(-1, -2) * keys.shape[-1] ** -0.5
    return (logits if bias is None else logits + bias[..., None, :]).softmax(-1) @ values


def _razed(view: KVView, method: RazorAttention) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Keys, values and bias of each head of one sample."""
    action = method.evict(view, State())[0]
    bias = torch.zeros(1, view.heads, action.k.m) if action.log_bias is None else action.log_bias
    counts = action.k.counts or (action.k.m,) * view.heads
    parts = [action.k.apply(view.keys)[0], action.v.apply(view.values)[0], bias[0]]
    return [tuple(x[head, :n] for x in parts) for head, n in enumerate(counts)]  # type: ignore[misc]


def _by_hand(view: KVView, full: set[int], sinks: int, room: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    found = []
    for head in range(view.heads):
        k, v = view.keys[0, head], view.values[0, head]
        if head in full:
            found.append((k, v, torch.zeros(view.n)))
            continue
        buffer = room - sinks - 1
        rows = [*range(sinks), None, *range(view.n - buffer, view.n)]
        dropped = range(sinks, view.n - buffer)
        keys = torch.stack([sum(k[j] for j in dropped) / len(dropped) if i is None else k[i] for i in rows])
        values = torch.stack([sum(v[j] for j in dropped) / len(dropped) if i is None else v[i] for i in rows])
        bias = torch.tensor([float(len(dropped)) if i is None else 1.0 for i in rows]).log()
        found.append((keys, values, bias))
    return found


def _is_the_paper(razed) -> None:
    for seed in range(3):
        view = replace(view_of(g=3, n=30, seed=seed), layer=1, depth=2)
        for sinks, room in ((4, 12), (0, 5), (2, 29)):
            method = RazorAttention(keep=room, heads=("L0H0", "L1H2"), sinks=sinks)
            for got, wanted in zip(razed(view, method), _by_hand(view, {2}, sinks, room), strict=True):
                assert [x.shape for x in got] == [x.shape for x in wanted]
                for a, b in zip(got, wanted, strict=True):
                    torch.testing.assert_close(a, b)


@pytest.mark.system("razorattention", "exact")
def test_equals_the_paper_written_naively() -> None:
    _is_the_paper(_razed)


@pytest.mark.parametrize("changes", [{"heads": None}, {"compensate": False}, {"sinks": 1}])
def test_the_paper_fails_for_other_methods(changes) -> None:
    with pytest.raises(AssertionError):
        _is_the_paper(lambda view, method: _razed(view, method.replace(**changes)))


@pytest.mark.system("razorattention", "exact")
def test_the_compensation_token_is_exact_where_dropped_keys_are_equal() -> None:
    view = view_of(g=1, group=1, n=40)
    view.keys[:, :, 4:29] = view.keys[:, :, 4:5].clone()
    query = torch.randn(1, 1, 7, 8, generator=torch.Generator().manual_seed(9))
    full = _output(view.keys, view.values, query)
    (keys, values, bias), *_ = _razed(view, RazorAttention(keep=16))
    torch.testing.assert_close(_output(keys[None, None], values[None, None], query, bias[None, None]), full)


@pytest.mark.system("razorattention", "exact")
@pytest.mark.parametrize("settings", [{"least": 40}, {}, {"keep": "100%"}, {"keep": 40}, {"keep": 90}])
def test_a_buffer_that_holds_the_prompt_is_the_identity(settings) -> None:
    method, view = RazorAttention(**settings), view_of(n=40)
    action, state = method.evict(view, State())
    assert isinstance(action, Observe)
    later = replace(view_of(n=41, rows=1), moment="decode", fresh=1)
    stays = settings not in ({"least": 40}, {"keep": 40})
    assert isinstance(method.evict(later, state)[0], Observe) == stays


def test_the_buffer_is_the_larger_of_the_least_and_a_part_of_the_prompt() -> None:
    view = view_of(n=60)
    for least, part, left in ((20, 0.2, 20), (20, 0.5, 30), (0, 0.3, 18)):
        assert RazorAttention(least=least, part=part).evict(view, State())[0].k.m == left
    assert RazorAttention(keep=7, least=20).evict(view, State())[0].k.m == 7
    assert RazorAttention().shorten(view, KVBudget("50%")).k.m == 30


def test_small_buffers_keep_sinks_and_the_newest() -> None:
    view = view_of(n=10)
    for keep, wanted in ((1, [0, 1, 8, 9]), (4, [0, 1, 8, 9]), (5, [0, 1, 7, 8, 9])):
        method = RazorAttention(keep=keep, sinks=2)
        assert method.evict(view, State())[0].k.representatives[0, 0].tolist() == wanted
    dropped = RazorAttention(keep=1, sinks=2, compensate=False).evict(view, State())[0]
    assert dropped.log_bias is None
    assert dropped.k.index[0, 0].tolist() == [0, 1, 9]


@pytest.mark.system("razorattention", "exact")
def test_decoded_tokens_join_the_running_means() -> None:
    whole = view_of(n=50, seed=4)
    for every in (1, 4):
        method, state = RazorAttention(keep=10, sinks=3, every=every), State()
        keys, values, bias = whole.keys[:, :, :20], whole.values[:, :, :20], None
        for at in range(20, 51):
            known = {"moment": "decode", "fresh": 1} if at > 20 else {}
            view = KVView.of(keys, values, keys[:, :, -1:], bias=bias, **known)
            action, state = method.evict(view, state)
            if not isinstance(action, Observe):
                keys, values, bias = action.k.apply(keys), action.v.apply(values), action.log_bias
            assert keys.shape[2] < 10 + every
            if keys.shape[2] == 10:
                wanted = _by_hand(KVView.of(whole.keys[:, :, :at], whole.values[:, :, :at]), set(), 3, 10)
                for head in range(2):
                    for a, b in zip((keys, values, bias), wanted[head], strict=True):
                        torch.testing.assert_close(a[0, head], b, atol=2e-6, rtol=1e-5)
            if at < 50:
                keys, values = (
                    torch.cat([x, own[:, :, at : at + 1]], 2) for x, own in ((keys, whole.keys), (values, whole.values))
                )
                bias = torch.nn.functional.pad(bias, (0, 1))


def test_a_batch_equals_its_samples_and_broken_keys_do_no_harm() -> None:
    view = view_of(b=3)
    view.keys[1, 0, 20] = torch.nan
    method = RazorAttention(keep=12, heads=("L0H1",))
    action = method.evict(view, State())[0]
    whole = action.k.apply(view.keys)
    for row in range(3):
        one = sample(view, row)
        own = method.evict(one, State())[0]
        torch.testing.assert_close(own.k.apply(one.keys)[0], whole[row], atol=0, rtol=0, equal_nan=True)
    assert whole[1].isnan().any(-1).nonzero().tolist() == [[0, 4], [1, 20]] or whole[1, 0, 4].isnan().all()


# The search.


def _heads(period: int, d: int = 64, seed: int = 0) -> tuple[KVView, Tensor]:
    """Six KV heads on repeated words, and the words: one finds what followed a word, one the word itself, one looks at
    the token before, one at the first token, two at nothing."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(period).repeat(4)
    word = torch.nn.functional.normalize(torch.randn(period, d, generator=generator), dim=-1)
    n = 4 * period
    place = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=-1)
    before = word[ids.roll(1)]
    sink = torch.randn(d, generator=generator)
    first = torch.zeros(n, d)
    first[0] = sink
    noise = torch.randn(2, n, d, generator=generator)
    keys = torch.stack([before, word[ids], place.roll(1, 0), first, noise[0], noise[1]])
    queries = torch.stack([word[ids], word[ids], place, sink.expand(n, d), noise[1], 0 * noise[0]])
    values = word[ids] * torch.tensor([1.0, *(0.2,) * 5])[:, None, None]  # what copies writes most
    return KVView.of(keys[None], values[None], 20 * d**0.5 * queries[None]), word


@pytest.mark.system("razorattention", "exact")
def test_scores_are_means_over_pairs() -> None:
    view = view_of(g=2, n=25, group=2)  # one token ahead of 4 times 6
    attention = attention_by_hand(view)[0]
    wanted = torch.zeros(2, 2, dtype=torch.float64)
    for head in range(2):
        for score, shift in ((0, 1), (1, 0)):
            means = []
            for h in (2 * head, 2 * head + 1):
                cells = [
                    attention[h, i, i - 6 * times + shift]
                    for i in range(25)
                    for times in (1, 2, 3)
                    if i - 6 * times >= 1
                ]
                assert len(cells) == 6 * (3 + 2 + 1)
                means.append(sum(cells) / len(cells))
            wanted[score, head] = max(means)
    torch.testing.assert_close(head_scores(view, 6), wanted.float())


def test_the_union_takes_the_best_of_each_score_over_all_layers() -> None:
    scores = {
        0: torch.tensor([[0.1, 0.9], [0.0, 0.1]]),
        2: torch.tensor([[0.5, 0.2], [0.7, torch.nan]]),
        5: torch.tensor([[0.5, 0.1], [0.2, 0.3]]),
    }
    assert best_heads(scores, Budget(2), Budget(1)) == ("L0H1", "L2H0")
    assert best_heads(scores, Budget(3), Budget(1)) == ("L0H1", "L2H0", "L5H0")
    assert best_heads(scores, Budget("14%", rounding="floor"), Budget("1%", rounding="floor")) == ("L0H1", "L2H0")


def _copies(view: KVView, word: Tensor, full: list[int], local: int) -> float:
    """How often the next word is read off the outputs of some heads, the others hold the last slots alone."""
    hits, period = [], view.n // 4
    for at in range(2 * period, view.n - 1):
        out = 0
        for head in range(6):
            keys, values = (x[0, head, : at + 1][0 if head in full else max(0, at + 1 - local) :]
                            for x in (view.keys, view.values))  # fmt: skip
            out = out + _output(keys, values, view.queries[0, head, at : at + 1])
        hits.append((out @ word.T).argmax().item() == (at + 1) % period)
    return sum(hits) / len(hits)


def _check_direction(find) -> None:
    view, word = _heads(24)
    names = find(view)
    found = [head for head in range(6) if f"L0H{head}" in names]
    others = [head for head in range(6) if head not in found]
    assert 0 < len(found) <= 2
    whole = _copies(view, word, list(range(6)), 8)
    assert whole > 0.9
    assert _copies(view, word, found, 8) > 0.9 * whole
    assert _copies(view, word, others, 8) < 0.3 * whole


def _search(view: KVView) -> tuple[str, ...]:
    return best_heads({0: head_scores(view, view.n // 4)}, Budget("14%"), Budget("1%"))


@pytest.mark.system("razorattention", "directional")
def test_copying_lives_in_the_heads_that_are_found() -> None:
    _check_direction(_search)


@pytest.mark.parametrize("stub", [lambda view: ("L0H4", "L0H5"), lambda view: ("L0H1", "L0H2")])
def test_the_direction_fails_for_a_stub(stub) -> None:
    with pytest.raises(AssertionError):
        _check_direction(stub)


@pytest.mark.system("razorattention", "directional")
def test_outputs_are_nearer_with_the_compensation_token_than_without() -> None:
    errors = torch.zeros(2)
    for seed in range(20):
        view = view_of(g=1, group=1, n=200, d=16, seed=seed)
        view.queries.mul_(0.5)
        view.values.add_(1)
        query = view.queries[:, :, -4:]
        full = _output(view.keys, view.values, query)
        for i, compensate in enumerate((True, False)):
            (k, v, bias), *_ = _razed(view, RazorAttention(keep=24, compensate=compensate))
            errors[i] += (_output(k[None, None], v[None, None], query, bias[None, None]) - full).norm() / full.norm()
    assert errors[0] < 0.8 * errors[1]


def test_the_search_repeats_distinct_ordinary_words() -> None:
    ids = repeated(torch.arange(100, 160), 50)
    assert ids.shape == (1, 200)
    assert len(set(ids[0, :50].tolist())) == 50
    assert torch.equal(ids[0, :50], ids[0, 150:])
    assert repeated(torch.arange(9), 50).shape == (1, 36)
    model = zoo.model("llava_clip")
    named = {model.config.image_token_id, model.config.get_text_config().pad_token_id}
    assert not named & set(ordinary_tokens(model).tolist())


@pytest.mark.parametrize("build", BUILDS)
def test_calibrate_finds_heads_of_a_model_and_its_plan_says_them(build: str) -> None:
    model, inputs, _ = case(build, layers=2)
    plan = winnow.calibrate(model, "snapkv + razorattention:keep=30%,tokens=12,induction=25%")
    razor = plan.methods[1]
    assert plan.methods[0] == winnow.plan("snapkv").methods[0]
    assert razor.heads
    assert winnow.plan(str(plan)) == plan
    with winnow.compress(model, razor):
        got = model.generate(**inputs, max_new_tokens=3)
    assert got.shape[0] == 3


def test_calibrate_scores_what_the_model_attends_to() -> None:
    model = kvhand.text_model("llama", layers=2)
    razor = winnow.calibrate(model, "razorattention:tokens=12,induction=1,echo=1").methods[0]
    ids = repeated(ordinary_tokens(model), 12)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    at = torch.arange(48)
    copies = {(i, j) for i in range(48) for j in range(i) if (i - j) % 12 == 0}
    names = set()
    for shift in (1, 0):
        rows, columns = zip(*((i, j + shift) for i, j in sorted(copies)), strict=True)
        means = [a[0, :, at[list(rows)], at[list(columns)]].mean(1).view(2, 2).amax(1) for a in attentions]
        best = int(torch.cat(means).argmax())
        names.add(f"L{best // 2}H{best % 2}")
    assert set(razor.heads) == names


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"heads": ("3.1",)}, "L3H0"), ({"tokens": 1}, "at least 2"), ({"sinks": -1}, "sinks"), ({"keep": 0}, "keep")],
)
def test_settings_that_do_not_fit_are_refused(settings, said) -> None:
    with pytest.raises(WinnowError, match=said):
        RazorAttention(**settings)


def test_heads_that_a_model_does_not_have_are_refused() -> None:
    assert heads_of(["L10H2", "L0H1", "L10H0"]) == {0: {1}, 10: {0, 2}}
    assert known_heads(("L0H1",), view_of()) == {1}
    for name in ("L1H0", "L0H2"):
        with pytest.raises(WinnowError, match=r"winnow\.calibrate"):
            known_heads((name,), view_of())


# In models.


def _held(lengths: tuple[int, ...], full: set[tuple[int, int]], prompt: int, sinks: int, share: float) -> kvhand.Held:
    """Heads that do not retrieve hide all but sinks and buffer, and read one more slot; at every length."""

    def held(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, g, n, _ = keys.shape
        added = torch.zeros(b, g, n + 1)
        mean = [x[:, :, :1].clone() for x in (keys, values)]
        for row, length in enumerate(lengths):
            added[row, :, : prompt - length] = -torch.inf
            room = max(1, int(share * length))
            stop = n - 1 - (room - sinks - 1)  # the newest token came after the last fold
            for head in range(g):
                start = prompt - length + sinks
                if (layer, head) in full or length <= room:
                    added[row, head, -1] = -torch.inf
                    continue
                added[row, head, start:stop] = -torch.inf
                added[row, head, -1] = torch.tensor(float(stop - start)).log()
                for one, x in zip(mean, (keys, values), strict=True):
                    one[row, head, 0] = x[row, head, start:stop].mean(0)
        return torch.cat([keys, mean[0]], 2), torch.cat([values, mean[1]], 2), added

    return held


@pytest.mark.system("razorattention", "model")
@pytest.mark.parametrize("build", BUILDS)
def test_decoding_equals_the_softmax_with_one_slot_for_the_rest(build: str) -> None:
    model, inputs, _ = case(build, layers=2)
    tokens = words(8)
    lengths = LENGTHS if build == "llama" else tuple(inputs["attention_mask"].sum(1).tolist())
    plan = "razorattention:keep=60%,sinks=2,heads=[L0H1,L1H0,L1H1]"
    with winnow.compress(model, plan):
        got = kvhand.written(model, inputs, tokens)
    full = {(0, 1), (1, 0), (1, 1)}
    with kvhand.holding(model, _held(lengths, full, inputs["input_ids"].shape[1], 2, 0.6)):
        wanted = kvhand.written(model, inputs, tokens)
    close(got.logits, wanted.logits)
    stores = [layer.store for layer in got.past_key_values.layers]
    held = [int(0.6 * n) if head == 0 else n + 7 for n in lengths for head in (0, 1)]
    assert stores[0].lengths == held
    assert not hasattr(stores[1], "lengths")
    plain = kvhand.written(model, inputs, tokens)
    assert (got.logits[-1] - plain.logits[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("build", BUILDS[:2])
def test_without_compensation_it_is_the_full_cache_with_evicted_keys_masked(build: str) -> None:
    plan = "razorattention:keep=50%,sinks=1,heads=[L0H0],compensate=false"
    case(build, layers=2).check_evictions(plan, words(4))


@pytest.mark.parametrize("plan", ["keep=14,sinks=2,heads=[L0H1]", "keep=40%,every=3,sinks=2,heads=[L1H0]"])
def test_a_padded_batch_equals_its_samples(plan: str) -> None:
    case("llama", layers=2).check_batch(
        f"razorattention:{plan}", words(9)
    )  # with 14, the shortest is cut while it is decoded


def test_beams_of_ragged_heads_go_on_with_what_they_remember() -> None:
    model, inputs, _ = case("llama", layers=2)
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    with winnow.compress(model, "razorattention:keep=60%,sinks=2,heads=[L0H1,L1H0,L1H1]"):
        got = model.generate(**inputs, **options)
    lengths = tuple(n for n in LENGTHS for _ in range(3))
    with kvhand.holding(model, _held(lengths, {(0, 1), (1, 0), (1, 1)}, max(LENGTHS), 2, 0.6)):
        wanted = model.generate(**inputs, **options)
    assert torch.equal(got, wanted)


@torch.no_grad()
def test_a_later_turn_cuts_the_same_heads() -> None:
    model, first, second = kvhand.text_model("llama", layers=2), kvhand.prompt((30,)), kvhand.prompt((10,), seed=3)
    with winnow.compress(model, "razorattention:keep=50%,sinks=2,heads=[L1H0],compensate=false"):
        cache = model(**first).past_key_values
        evicted = kvhand.evicted_of(cache)
        got = model(input_ids=second["input_ids"], past_key_values=cache).logits
        assert cache.layers[1].store.lengths == [40, 15 + 5]
        assert cache.layers[0].store.length == 20
        kept = (~kvhand.evicted_of(cache)[1][0, 1]).nonzero()[:, 0].tolist()
        assert kept == [0, 1, *range(22, 40)]
    with kvhand.evicting(model, lambda layer, n: evicted.get(layer)):
        full = model(**first).past_key_values
        wanted = model(input_ids=second["input_ids"], past_key_values=full).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
