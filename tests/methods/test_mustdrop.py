"""MustDrop by its card: flat windows, key tokens, and the filter of sums and maxima; as released, in its order."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

import winnow
from tests import kvhand, zoo
from winnow.contract import TextAttention
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.reduction import Reduction
from winnow.core.step import Observe, State
from winnow.core.view import View
from winnow.methods.mustdrop import MustDrop
from winnow.signals.vision import VisionAttention
from winnow.testing import WITH_CLS, Picture

from .stubs import STUBS, first_k, ids, scores, tokens

LAST_CLS = VisionAttention(layer=-1)


def _released_merge(x, side, flat):
    """The code's merge of a batch of tiles without [CLS]: windows that become means first, the rest in raster order."""
    starts = [(r, c) for r in range(0, side, 3) for c in range(0, side, 3)]
    cells = [[(r + i) * side + c + j for i in range(3) for j in range(3)] for r, c in starts]
    maps = []
    for item in x:
        alike = [cosine_similarity(item[w][:, None], item[w][None], dim=2) for w in cells]
        maps.append(torch.stack([(a.sum() - a.diagonal().sum()) / 72 for a in alike]))
    r = min(int((m >= flat).sum()) for m in maps)
    out = []
    for item, m in zip(x, maps, strict=True):
        best = m.topk(r).indices.tolist()
        gone = {j for w in best for j in cells[w]}
        rest = [j for j in range(side * side) if j not in gone]
        out.append((torch.stack([item[cells[w]].mean(0) for w in best] + [item[j] for j in rest]), r))
    return out


def _flattened(seed, side, count, b=1):
    """Noise in which some windows are nearly flat."""
    x = tokens(seed, side * side, 12, b)
    grid = x.view(b, side, side, -1)
    for w in range(count):
        r, c = divmod(w * 2 % (side // 3) ** 2, side // 3)
        noise = tokens(seed + w + 1, 9, 12, b).view(b, 3, 3, -1)
        grid[:, 3 * r : 3 * r + 3, 3 * c : 3 * c + 3] = grid[:, 3 * r, 3 * c, None, None] + (0.05 + 0.02 * w) * noise
    return x


def _at_block(x, side):
    return View.of(torch.cat([tokens(99, 1, x.shape[-1], len(x)), x], 1), layout=Layout.grid(side, side, cls=True))


@pytest.mark.system("mustdrop", "exact")
def test_two_flat_windows_of_four():
    x = _flattened(0, 6, 2)
    found, state = MustDrop().merge(_at_block(x, 6), State())
    assert found.m == 1 + 36 - 16
    assert sorted(found.to_matrix()[0].ne(0).sum(1).tolist()) == [1] * 19 + [9] * 2
    assert found.representatives[0, 0] == 0
    assert found.is_stochastic
    merged = [
        x[0, torch.tensor(w)].mean(0) for w in ([0, 1, 2, 6, 7, 8, 12, 13, 14], [18, 19, 20, 24, 25, 26, 30, 31, 32])
    ]
    out = found.apply(_at_block(x, 6).tokens)[0]
    at = found.representatives[0].tolist()
    torch.testing.assert_close(out[[at.index(8), at.index(26)]], torch.stack(merged), atol=5e-7, rtol=0)
    rest = [i for i, a in enumerate(at) if a not in (8, 26)]
    assert torch.equal(out[rest], _at_block(x, 6).tokens[0, [at[i] for i in rest]])
    assert state.token["flatness"].isfinite().nonzero()[:, 1].tolist() == [8, 26]


@pytest.mark.system("mustdrop", "exact")
def test_noise_stays_and_each_item_has_its_own_windows():
    noise = _at_block(tokens(1, 36, 12), 6)
    assert isinstance(MustDrop(flat=0.99).merge(noise, State())[0], Observe)
    both = torch.cat([_flattened(0, 6, 2), tokens(1, 36, 12)])
    assert MustDrop().merge(_at_block(both, 6), State())[0].counts == (21, 37)
    assert isinstance(MustDrop(equal=True).merge(_at_block(both, 6), State())[0], Observe)


@pytest.mark.system("mustdrop", "exact")
@pytest.mark.parametrize("tiles", [1, 3])
def test_released_merges_what_the_code_merges_in_its_order(tiles):
    method = Plan.of("mustdrop:released").methods[0]
    for seed in range(3):
        x = _flattened(seed, 24, 9 + seed, tiles)
        x[-1, :72] = tokens(seed + 50, 72, 12)[0]  # the last tile has fewer flat windows
        view = _at_block(x, 24)
        found, state = method.merge(view, State())
        rows, flatness = (
            found.apply(view.tokens)[:, 1:],
            state.token["flatness"].gather(1, found.representatives)[:, 1:],
        )
        for lane, (want, r) in enumerate(_released_merge(x, 24, 0.8)):
            assert r > 0
            n = rows.shape[1]
            lm = View.of(rows[lane, None], scores(seed, n), layout=Layout.sequence(n))
            enter, _ = method.enter(lm, State(token={"flatness": flatness[lane, None]}))
            assert enter.separators == "drop"
            torch.testing.assert_close(enter.reduction.apply(lm.tokens)[0], want)


@pytest.mark.system("mustdrop", "exact")
@pytest.mark.parametrize("picture", [Picture.grid(24, 24), Picture.tiled(5, 2, 1)], ids=lambda p: p.name)
def test_key_tokens_are_the_share_of_each_tile_that_cls_sees_most(picture):
    n = picture.lm.n_content
    row = scores(3, n)
    reduction, state = MustDrop().enter(View.of(tokens(0, n), row, layout=picture.lm), State())
    assert ids(reduction) == list(range(n))
    want = set()
    for t in range(picture.lm.tiles.max() + 1):
        own = [j for j in range(n) if picture.lm.tiles[j] == t]
        want |= set(sorted(own, key=lambda j: -row[0, j])[: math.ceil(0.08 * len(own))])
    assert set(state.token["key"][0].nonzero()[:, 0].tolist()) == want


def _filter(text, overall, individual, key=()):
    """The code's filter on `[m, n]` attention, in lists."""
    g, p = text.sum(0).tolist(), text.amax(0).tolist()
    return [j for j in range(len(g)) if not (g[j] < sum(g) * overall and p[j] < individual) or j in key]


def _cut(method, text, key=()):
    view = View.of(tokens(0, text.shape[1]), torch.stack([text.sum(0), text.amax(0)], -1)[None])
    mask = torch.zeros(1, text.shape[1], dtype=torch.bool)
    mask[0, list(key)] = True
    return ids(method.cut(view, State(token={"key": mask}), TextAttention(), 1.0))


def _text(seed, m=7, n=60):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(-1)


def _is_the_filter(cut):
    for seed in range(5):
        text = _text(seed)
        for overall, individual in ((0.01, 0.05), (0.02, 0.02), (0.005, 0.2), (1.0, 0.1)):
            found = cut(MustDrop(overall=overall, individual=individual), text, (1, 5, 9))
            assert found == _filter(text, overall, individual, (1, 5, 9))


@pytest.mark.system("mustdrop", "exact")
def test_drops_what_all_of_the_text_and_every_word_ignores():
    _is_the_filter(_cut)


@pytest.mark.parametrize("stub", STUBS)
def test_the_filter_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_the_filter(lambda method, text, key: ids(stub(View.of(tokens(0, text.shape[1])), 20)))


@pytest.mark.system("mustdrop", "exact")
def test_thresholds_at_their_ends():
    text = _text(1)
    everything = list(range(60))
    assert _cut(MustDrop(individual=0), text, (3,)) == everything
    assert _cut(MustDrop(overall=0), text, (3,)) == everything
    assert _cut(MustDrop(overall=1.0, individual=2.0), text, (3, 8)) == [3, 8]


def _keeps_what_one_word_names(cut):
    """Token j is ignored by all words but one, which looks at it; all others share what is left."""
    for j in range(20, 50):
        text = torch.full((20, 50), 1 / 50)
        text[:, j] = 0.001
        text[j % 20, j] = 0.3
        assert j in cut(MustDrop(overall=0.018, individual=0.1), text)


@pytest.mark.system("mustdrop", "directional")
def test_a_thing_that_one_word_names_stays():
    _keeps_what_one_word_names(_cut)


@pytest.mark.parametrize("stub", ["the sum alone", "most looked at", "first k"])
def test_one_word_fails_for_a_stub(stub):
    stubs = {
        "the sum alone": lambda method, text: _cut(method.replace(individual=2.0), text),
        "most looked at": lambda method, text: text.sum(0).topk(40).indices.tolist(),
        "first k": lambda method, text: ids(first_k(View.of(tokens(0, 50)), 20)),
    }
    with pytest.raises(AssertionError):
        _keeps_what_one_word_names(stubs[stub])


@pytest.mark.system("mustdrop", "exact")
def test_a_budget_keeps_key_tokens_first_in_equal_steps():
    text, n = _text(2, n=256), 256
    view = View.of(tokens(0, n), torch.stack([text.sum(0), text.amax(0)], -1)[None])
    method = MustDrop().at_budget("6.25%", n)
    kept = [ids(method.cut(view, State(), TextAttention(), part)) for part in (0.25, 0.5, 0.75, 1.0)]
    assert [len(k) for k in kept] == [128, 64, 32, 16]
    assert kept[-1] == text.sum(0).topk(16).indices.sort().values.tolist()
    key = torch.zeros(1, n, dtype=torch.bool)
    key[0, :20] = True
    only = ids(method.cut(view, State(token={"key": key}), TextAttention(), 1.0))
    assert only == text.sum(0)[:20].topk(16).indices.sort().values.tolist()


@pytest.mark.parametrize(
    ("depth", "layers"), [(32, (2, 6, 10, 14)), (28, (1, 5, 8, 12)), (8, (0, 1, 2, 3)), (4, (0, 1)), (1, None)]
)
def test_default_layers_are_shares_of_the_depth(depth, layers):
    method, steps = MustDrop().bind(ModelInfo(depth=depth, vision_depth=24, points=WITH_CLS.points))
    assert method.layers == layers
    assert [str(s.at) for s in steps] == ["projected", "blocks[1]", *(f"layers[{k + 1}]" for k in layers or ())]


def test_layers_must_ascend():
    with pytest.raises(WinnowError, match="ascending"):
        MustDrop(layers=(6, 2))


@pytest.mark.system("mustdrop", "exact")
@pytest.mark.parametrize("build", ["llava_clip", "llava_next"])
def test_with_thresholds_off_logits_are_those_of_the_plain_model(build):
    model, (sample,) = zoo.model(build), zoo.samples(build, zoo.SINGLE)
    with torch.no_grad():
        plain = model(**sample).logits
        with winnow.compress(model, "mustdrop:flat=2.0,overall=0.0") as handle:
            assert torch.equal(model(**sample).logits, plain)
            assert len(set(handle.last.layer_tokens)) == 1


def _key(view, k):
    return Reduction.select(MustDrop(row=LAST_CLS).enter(view, State())[1].token["key"], counts=(k,) * view.b)


def _holds_evidence(sample, select):
    """The key tokens hold more of the evidence, and of all things, than as many that nobody has looked for."""
    from tests.methods.directional import at_random, evenly, gap

    k = math.ceil(0.08 * 256)
    kept = sample.kept(select, k)
    for blind in (evenly, at_random):
        for mask in (sample.evidence, sample.objects):
            assert gap(sample.recall(kept, mask), sample.recall(sample.kept(blind, k), mask)).low > 0


@pytest.mark.system("mustdrop", "directional")
@pytest.mark.xdist_group("samples")
def test_key_tokens_hold_evidence(sample):
    _holds_evidence(sample, _key)


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", ["first_k", "evenly", "at_random"])
def test_holding_evidence_fails_for_a_stub(sample, stub):
    from tests.methods import directional

    with pytest.raises(AssertionError):
        _holds_evidence(sample, first_k if stub == "first_k" else getattr(directional, stub))


STEPS = torch.randint(5, 240, (3, 5), generator=torch.Generator().manual_seed(5))
CUTS = "mustdrop:flat=2.0,key=0.2,overall=0.04,individual=0.05,layers=[1,2]"


@pytest.mark.system("mustdrop", "exact")
@pytest.mark.parametrize("build", ["llava_clip", "llava_next"])
@pytest.mark.parametrize("positions", ["", " | positions=compact"])
def test_decoding_reads_in_the_cut_layers_what_the_last_cut_left(build, positions):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    with winnow.compress(model, CUTS + positions) as handle:
        first = kvhand.written(model, inputs, STEPS[:, :1])
        evicted = kvhand.evicted_of(first.past_key_values)
        slots, tokens = handle.last.kv_slots, handle.last.layer_tokens
        got = kvhand.written(model, inputs, STEPS)
        alone = [
            kvhand.written(model, one, STEPS[row : row + 1]) for row, one in enumerate(zoo.samples(build, zoo.RAGGED))
        ]
    heads = 2
    assert slots == tuple(heads * sum(tokens[layer]) for layer in (0, 3, 3, 3))
    assert sum(tokens[1]) > sum(tokens[3])
    assert build == "llava_next" or sum(tokens[2]) > sum(tokens[3])
    with winnow.compress(model, f"{CUTS},cache=false{positions}"):
        with kvhand.evicting(model, lambda layer, n: evicted.get(layer)):
            wanted = kvhand.written(model, inputs, STEPS)
        whole = kvhand.written(model, inputs, STEPS)
    for step, (a, b) in enumerate(zip(got.logits, wanted.logits, strict=True)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        for row, one in enumerate(alone):
            torch.testing.assert_close(a[row], one.logits[step][0], atol=2e-5, rtol=1e-5)
    assert (got.logits[1] - whole.logits[1]).abs().max() > 1e-3


@pytest.mark.system("mustdrop", "exact")
def test_the_first_cut_layer_keeps_the_tokens_that_are_left_at_the_end():
    model, (sample,) = zoo.model("llava_clip"), zoo.samples("llava_clip", zoo.SINGLE)
    with (
        winnow.compress(model, CUTS.replace("[1,2]", "[0,2]")) as handle,
        torch.no_grad(),
    ):
        cache = model(**sample).past_key_values
        kept = handle.last.items[0].kept
    start = int((sample["input_ids"][0] == zoo.IMAGE).nonzero()[0])
    pictures = int((sample["input_ids"][0] == zoo.IMAGE).sum())
    want = [p for p in range(sample["input_ids"].shape[1]) if not start <= p < start + pictures]
    want = sorted(want + [start + int(j) for j in kept])
    store = cache.layers[0].store
    assert [head.tolist() for head in store.slots[0]] == [want, want]


def test_without_a_cache_there_is_nothing_to_cut():
    model, (sample,) = zoo.model("llava_clip"), zoo.samples("llava_clip", zoo.SINGLE)
    with winnow.compress(model, CUTS), torch.no_grad():
        with_cache = model(**sample).logits
        assert torch.equal(model(**sample, use_cache=False).logits, with_cache)
