"""CompressKV by its card: calibrated heads vote, layers share the slots by their errors, and a file says both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import winnow
from tests import kvdecode, kvhand, zoo
from winnow.contract import KVView, State
from winnow.core.errors import WinnowError
from winnow.learn import needles
from winnow.methods.compresskv import CompressKV
from winnow.parts.retrieval_heads import Calibration, Trace, head_scores, layer_budgets, layer_shares

STEPS = torch.randint(2, 120, (3, 5), generator=torch.Generator().manual_seed(5))


def random_view(seed, n, b=1, heads=2, group=4, dtype=torch.float32, **known):
    generator = torch.Generator().manual_seed(seed)
    keys, values, queries = (torch.randn(b, h, n, 16, generator=generator) for h in (heads, heads, heads * group))
    return KVView.of(keys.to(dtype), values.to(dtype), (queries * 4).to(dtype), **known)


def kept(action, lane=0, head=0):
    return action.k.lane(lane).lane(head).index.tolist()


@pytest.fixture
def calibrated(tmp_path):
    """Writes a calibration; gives its path."""

    def write(heads, shares):
        path = tmp_path / "calibration.json"
        Calibration(tuple(map(tuple, heads)), tuple(shares)).save(path)
        return str(path)

    return write


def naive(view, heads, count, w=8, kernel=5):
    """The card, by loops over positions."""
    n, votes = view.n, torch.zeros(view.n - w)
    for head in heads:
        pooled = torch.zeros(n - w)
        summed = torch.zeros(n)
        for i in range(n - w, n):
            logits = view.queries[0, head, i] @ view.keys[0, head // view.group, : i + 1].T * view.scaling
            summed[: i + 1] += logits.float().softmax(0)
        for j in range(n - w):
            near = [summed[x] for x in range(j - kernel // 2, j + kernel // 2 + 1) if 0 <= x < n - w]
            pooled[j] = sum(near) / kernel
        votes += pooled / len(heads)
    best = sorted(range(n - w), key=lambda j: (-float(votes[j]), j))[: count - w]
    return sorted(best) + list(range(n - w, n))


def _is_the_card(select, calibrated):
    for seed in range(4):
        heads = [torch.randperm(8, generator=torch.Generator().manual_seed(seed + layer)).tolist() for layer in (0, 1)]
        method = CompressKV(keep=20, calibration=calibrated(heads, (0.5, 0.5)))
        for layer in (0, 1):
            view = random_view(seed, 60, layer=layer, depth=2)
            assert select(method, view) == naive(view, heads[layer][:4], 20)


@pytest.mark.system("compresskv", "exact")
def test_the_first_four_heads_of_a_layer_choose_as_the_card_says(calibrated):
    _is_the_card(lambda method, view: kept(method.evict(view, State())[0]), calibrated)


@pytest.mark.parametrize(
    "stub",
    [
        lambda method, view: kept(CompressKV(keep=20).evict(view, State())[0]),
        lambda method, view: kept(method.replace(kernel=1).evict(view, State())[0]),
        lambda method, view: list(range(12)) + list(range(52, 60)),
    ],
    ids=["all heads", "no pooling", "first"],
)
def test_the_card_fails_for_a_stub(stub, calibrated):
    with pytest.raises(AssertionError):
        _is_the_card(stub, calibrated)


@pytest.mark.system("compresskv", "exact")
def test_all_kv_heads_keep_the_same_slots_and_samples_their_own(calibrated):
    method = CompressKV(keep=20, calibration=calibrated([[5, 2, 0, 7]], [1.0]))
    both = random_view(1, 50, b=2)
    found = method.evict(both, State())[0]
    assert found.k is found.v
    assert kept(found, 0, 0) == kept(found, 0, 1) != kept(found, 1, 0)
    for lane in (0, 1):
        one = KVView.of(*(x[lane : lane + 1] for x in (both.keys, both.values, both.queries)))
        assert kept(method.evict(one, State())[0]) == kept(found, lane)
        assert torch.equal(method.score(one)[0], method.score(both)[lane])


@pytest.mark.system("compresskv", "exact")
def test_without_a_calibration_all_heads_choose():
    view = random_view(2, 60)
    assert kept(CompressKV(keep=20).evict(view, State())[0]) == naive(view, range(8), 20)


def _budgets_are_right(budgets):
    generator = torch.Generator().manual_seed(0)
    for depth in (1, 2, 7, 32):
        for average in (1, 5, 40, 128, 700):
            for power in (0.0, 1.0, 4.0):
                weights = torch.rand(depth, generator=generator) ** power
                shares = tuple((weights / weights.sum()).tolist())
                found = budgets(shares, average, 32)
                assert sum(found) == depth * average
                assert all(min(32, average) <= n <= 3 * average for n in found)
    assert budgets((0.7, 0.1, 0.1, 0.1), 100, 32) == (223, 59, 59, 59)  # 32 + round(272 r), then one for the first
    assert budgets((0.9, 0.1), 100, 32) == (154, 46)
    assert budgets((0.97, 0.01, 0.01, 0.01), 100, 32) == (296, 35, 35, 34)  # one too many: the last goes
    shares = (0.93, *(0.01,) * 7)
    assert budgets(shares, 100, 32) == (300, 72, 72, 72, 71, 71, 71, 71)  # what thrice the mean cuts off goes round


@pytest.mark.system("compresskv", "exact")
def test_budgets_sum_to_the_total_within_their_bounds():
    _budgets_are_right(layer_budgets)


@pytest.mark.parametrize(
    "stub",
    [lambda shares, average, floor: (average,) * len(shares), lambda shares, average, floor: tuple(
        floor + round(r * len(shares) * (average - floor)) for r in shares)],
    ids=["uniform", "not made good"],
)  # fmt: skip
def test_budgets_fail_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _budgets_are_right(stub)


@pytest.mark.system("compresskv", "exact")
def test_a_layer_keeps_its_budget_and_all_if_it_has_no_more(calibrated):
    method = CompressKV(keep=40, calibration=calibrated([[0], [1], [2]], [0.6, 0.3, 0.1]))
    wanted = layer_budgets((0.6, 0.3, 0.1), 40, 32)
    assert wanted == (47, 39, 34)
    for layer, count in enumerate(wanted):
        found = method.evict(random_view(3, 80, layer=layer, depth=3), State())[0]
        assert found.k.m == count
        short = method.evict(random_view(3, count, layer=layer, depth=3), State())[0]
        assert not hasattr(short, "k")
    share = method.replace(keep="50%").evict(random_view(3, 80, layer=0, depth=3), State())[0]
    assert share.k.m == 47


def _trace(attention, written, prompt, needle, values=None):
    """A trace with the same attention `[L, H, n]` at each step, and outputs as they are."""
    n = len(prompt)
    values = torch.eye(n).expand(attention.shape[0], 1, n, n) if values is None else values
    rows = [[torch.nn.functional.pad(layer, (0, 0)) for layer in attention] for _ in written]
    window = [layer[:, None].expand(-1, 8, -1) for layer in attention]
    return Trace(prompt, needle, written, window, rows, list(values), lambda layer, heads: heads)


@pytest.mark.system("compresskv", "exact")
def test_heads_are_scored_by_what_they_give_the_whole_needle():
    prompt, needle = (5, 6, 7, 8, 9, 5, 6, 1, 1, 1), (2, 5)
    attention = torch.rand(2, 3, 10, generator=torch.Generator().manual_seed(0))
    read = _trace(attention, (7, 5, 9, 9), prompt, needle)  # 7, 9 and 9 are of the needle
    missed = _trace(attention.flip(1), (7, 1, 1), prompt, needle)  # recalls a third
    assert read.recall == pytest.approx(2 / 3)
    torch.testing.assert_close(head_scores([read, missed]), 3 * attention[:, :, 2:5].sum(2))
    with pytest.raises(WinnowError, match="prompts that it answers"):
        head_scores([missed])


@pytest.mark.system("compresskv", "exact")
def test_errors_of_layers_are_those_of_their_outputs():
    generator = torch.Generator().manual_seed(1)
    attention = torch.rand(2, 4, 10, generator=generator).softmax(-1)
    values = torch.randn(2, 2, 10, 3, generator=generator)
    trace = _trace(attention, (1, 2), tuple(range(10)), (2, 4), values)
    stays = {0: [0, 1, 9], 1: [3, 4, 5, 6, 7, 8, 9]}
    errors = []
    for layer in (0, 1):
        full, less = [], []
        for head in range(4):
            a, v = attention[layer, head], values[layer, head // 2]
            full += (a @ v).tolist()
            part = a[stays[layer]] / a[stays[layer]].sum()
            less += (part @ v[stays[layer]]).tolist()
        full, less = torch.tensor(full), torch.tensor(less)
        errors.append(float((less - full).norm() / (full.norm() + 1e-5)))
    shares = layer_shares([trace, trace], lambda layer, window: torch.tensor(stays[layer]))
    torch.testing.assert_close(shares, torch.tensor(errors).double() / sum(errors), atol=1e-6, rtol=1e-5)


def test_the_file_is_plain_json_and_comes_back(tmp_path, calibrated):
    path = calibrated([[3, 1], [0, 2]], [0.25, 0.75])
    assert json.loads(Path(path).read_text()) == {"heads": {"0": [3, 1], "1": [0, 2]}, "shares": [0.25, 0.75]}
    assert Calibration.load(path) == Calibration(((3, 1), (0, 2)), (0.25, 0.75))


@pytest.mark.parametrize(
    "text",
    [
        None,
        "no json",
        "[]",
        '{"heads": {"0": [1]}}',
        '{"heads": {"0": []}, "shares": [1.0]}',
        '{"heads": {"0": [1, 1]}, "shares": [1.0]}',
        '{"heads": {"0": ["1"]}, "shares": [1.0]}',
        '{"heads": {"0": [1], "1": [0]}, "shares": [1.0]}',
        '{"heads": {"0": [1]}, "shares": [NaN]}',
        '{"heads": {"0": [-1]}, "shares": [1.0]}',
        '{"heads": {"0": [1]}, "shares": [0]}',
        '{"heads": {"0": [1]}, "shares": 1}',
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "broken.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(WinnowError, match="cannot be read as one"):
        CompressKV(calibration=str(path))


@pytest.mark.parametrize("settings", [{"window": 0}, {"kernel": 4}, {"heads": 0}, {"floor": -1}, {"calibration": 3}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(WinnowError):
        CompressKV(**settings)


def test_a_calibration_of_another_model_is_refused(calibrated):
    model = kvhand.text_model("llama")
    for heads, shares in ([[[0]], [1.0]], [[[0], [1], [9]], [0.2, 0.4, 0.4]]):
        with pytest.raises(WinnowError, match="Calibrate it"):
            winnow.compress(model, f"compresskv:calibration={calibrated(heads, shares)}")


def test_half_precision_and_nan():
    assert CompressKV().score(random_view(0, 40, dtype=torch.bfloat16)).dtype == torch.float32
    view = random_view(0, 40)
    view.keys[0, 0, 3] = torch.nan
    assert CompressKV(keep=20).evict(view, State())[0].k.m == 20


def _scene(seed, layer=0, n=200, heads=8, needle=6):
    """Two heads of each layer look at a needle; the others at the ends, and here and there, and louder."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(heads, n, generator=generator) * 0.2 + 1e-3
    start = int(torch.randint(20, n - 40, (1,), generator=generator))
    good = [(2 * layer + 1) % heads, (2 * layer + 4) % heads]
    for head in range(heads):
        if head in good:
            weights[head, start : start + needle] += 0.6
        else:
            weights[head, :4] += 20
            noisy = torch.randint(10, n - 20, (12,), generator=generator)
            weights[head, noisy] += 15
    return weights / weights.sum(1, keepdim=True), list(range(start, start + needle)), good


def _view(weights):
    """A view in which every query attends as the weights `[H, n]` say."""
    heads, n = weights.shape
    keys = torch.eye(n).expand(1, heads, n, n)
    return KVView.of(keys, torch.ones(1, heads, n, 2), (weights.log() * n**0.5)[None, :, None].expand(1, heads, 8, n))


def _recall(method_of, calibration, layers=3):
    found = []
    for seed in range(100, 110):
        for layer in range(layers):
            weights, evidence, _ = _scene(seed, layer)
            view = _view(weights)
            view = KVView(**{**view.__dict__, "layer": layer, "depth": layers})
            stays = set(kept(method_of(calibration).evict(view, State())[0]))
            found.append(len(stays & set(evidence)) / len(evidence))
    return sum(found) / len(found)


def _traces(layers=3):
    for seed in range(20):
        whole = [_scene(seed, layer) for layer in range(layers)]
        start = whole[0][1][0]
        attention = torch.stack([w for w, *_ in whole])
        prompt = tuple(range(1000, 1200))
        yield _trace(attention, prompt[start : start + 6], prompt, (start, start + 6))


def _retrievers_recall_more(best, everyone, worst):
    assert best > everyone + 0.1 > worst + 0.1


@pytest.mark.system("compresskv", "directional")
def test_calibrated_heads_recall_more_than_all_and_all_more_than_the_worst(tmp_path):
    path = str(tmp_path / "calibration.json")
    method = CompressKV(keep="10%", heads=2, kernel=1).calibrated(_traces(), path)
    known = Calibration.load(path)
    for layer, own in enumerate(known.heads):
        assert sorted(own[:2]) == sorted(_scene(0, layer)[2])
    turned = str(tmp_path / "turned.json")
    Calibration(tuple(own[::-1] for own in known.heads), known.shares).save(turned)
    best, worst = (_recall(lambda p: method.replace(calibration=p, floor=0), p) for p in (path, turned))
    everyone = _recall(lambda p: CompressKV(keep="10%", kernel=1), None)
    _retrievers_recall_more(best, everyone, worst)
    with pytest.raises(AssertionError):  # scores that look at nothing
        _retrievers_recall_more(everyone, everyone, worst)


def _error(attention, values, counts):
    """Mean over layers of the error of the output when the best slots of each layer are kept."""
    total = 0.0
    for a, v, count in zip(attention, values, counts, strict=True):
        best = a.mean(0).topk(count).indices
        part = torch.zeros_like(a)
        part[:, best] = a[:, best]
        full, less = a @ v, part / part.sum(1, keepdim=True) @ v
        total += float((less - full).norm() / full.norm())
    return total / len(counts)


def _errors_fall(budgets):
    generator = torch.Generator().manual_seed(3)
    n, sharp = 240, (12.0, 6.0, 3.0, 1.0)  # from a layer that looks at a few slots to one that looks at all
    shape = torch.randn(4, 1, n, generator=generator) + 0.3 * torch.randn(4, 4, n, generator=generator)
    attention = (shape * torch.tensor(sharp)[:, None, None]).softmax(-1)
    values = torch.randn(4, n, 16, generator=generator)

    def best(layer, window):
        return window.mean((0, 1)).topk(32).indices

    trace = _trace(attention, (1,), tuple(range(n)), (0, 2), values[:, None])
    shares = tuple(layer_shares([trace], best).tolist())
    uniform = _error(attention, values, (48,) * 4)
    assert _error(attention, values, budgets(shares)) < 0.97 * uniform


@pytest.mark.system("compresskv", "directional")
def test_budgets_by_error_leave_less_error_than_uniform_ones():
    _errors_fall(lambda shares: layer_budgets(shares, 48, 8))


def test_less_error_fails_for_a_stub():
    for stub in (lambda shares: (48,) * 4, lambda shares: layer_budgets(shares, 48, 8)[::-1]):
        with pytest.raises(AssertionError):
            _errors_fall(stub)


@torch.no_grad()
def test_traces_hold_what_a_model_attends_to_and_gives_out():
    model = kvhand.text_model("llama", layers=2)
    (prompt,) = needles.prompts(tuple(range(10, 40)), [((50, 51, 52), (60, 61))], (20,), (0.5,))
    assert (prompt.tokens[10:13], prompt.needle, len(prompt.tokens)) == ((50, 51, 52), (10, 13), 25)
    before = model.config._attn_implementation
    (trace,) = needles.traces(model, [prompt], window=8, steps=4)
    assert model.config._attn_implementation == before
    ids = torch.tensor([[*prompt.tokens, *trace.written[:-1]]])
    seen = []
    handles = [
        layer.self_attn.register_forward_hook(lambda module, args, out: seen.append(out[0][0]))
        for layer in model.model.layers
    ]
    model.set_attn_implementation("eager")
    out = model(input_ids=ids, output_attentions=True)
    for handle in handles:
        handle.remove()
    assert out.logits[0, 24:].argmax(-1).tolist() == list(trace.written)
    for layer in (0, 1):
        torch.testing.assert_close(trace.window[layer], out.attentions[layer][0, :, 17:25, :25])
        for step, row in enumerate(trace.rows):
            torch.testing.assert_close(row[layer], out.attentions[layer][0, :, 24 + step, : 25 + step])
            values = trace.values[layer][:, : 25 + step].repeat_interleave(2, 0)
            given = trace.project(layer, (row[layer][:, None] @ values).flatten())
            torch.testing.assert_close(given, seen[layer][24 + step], atol=1e-5, rtol=1e-5)


def test_a_model_is_calibrated_and_runs_with_it(tmp_path):
    model = kvhand.text_model("llama")
    asked = list(needles.prompts(tuple(range(10, 70)), [((100, 101), (60, 61))], (40, 50), (0.2, 0.8)))

    found = [
        Trace(**{**trace.__dict__, "written": (100, 101, 5)})  # a random model answers nothing
        for trace in needles.traces(model, asked, window=4, steps=3)
    ]
    method = CompressKV(keep=12, window=4, floor=6).calibrated(found, str(tmp_path / "tiny.json"), budget=10)
    known = Calibration.load(method.calibration)
    assert [sorted(own) for own in known.heads] == [[0, 1, 2, 3]] * 3
    assert sum(known.shares) == pytest.approx(1)
    assert len(set(known.shares)) == 3
    assert method.calibrate(print) is method
    with pytest.raises(WinnowError, match="prompts that a model answers"):
        CompressKV().calibrate(print)
    with winnow.compress(model, method) as handle:
        model(**kvhand.prompt((40,)))
    budgets = layer_budgets(known.shares, 12, 6)
    assert handle.last.kv_slots == tuple(2 * n for n in budgets)


@pytest.mark.system("compresskv", "model")
@pytest.mark.parametrize("build", ["llama", "llava_clip"])
def test_on_a_model_equals_the_full_cache_with_evicted_keys_masked(build, calibrated):
    model, inputs, samples = kvdecode.case(build)
    depth = 3 if build == "llama" else zoo.DEPTH
    path = calibrated(
        [[layer % 4, 2] if layer % 4 != 2 else [2] for layer in range(depth)], [1 + 2 * i for i in range(depth)]
    )
    with winnow.compress(model, f"compresskv:keep=40%,window=3,floor=4,calibration={path}"):
        first = kvhand.written(model, inputs, STEPS[:, :1])
        evicted = kvhand.evicted_of(first.past_key_values)
        got = kvhand.written(model, inputs, STEPS)
        alone = [kvhand.written(model, one, STEPS[row : row + 1]) for row, one in enumerate(samples)]
    assert len({int((~gone).sum()) for gone in evicted.values()}) == depth  # each layer has its own budget
    with kvhand.evicting(model, lambda layer, n: evicted.get(layer)):
        wanted = kvhand.written(model, inputs, STEPS)
    for step, (a, b) in enumerate(zip(got.logits, wanted.logits, strict=True)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        for row, one in enumerate(alone):
            torch.testing.assert_close(a[row], one.logits[step][0], atol=2e-5, rtol=1e-5)
