"""VScan: local and global tokens, everything else merged into them; as released; and the cut in the LM's middle."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.fastervlm import FasterVLM
from winnow.methods.vscan import VScan
from winnow.signals.language import LMAttention
from winnow.testing import WITHOUT_CLS, Picture

from .stubs import STUBS, first_k, ids, scores, tokens

LLAVA = ModelInfo("LLaVA", depth=32, vision_depth=24, feature_layer=-2)
QWEN = ModelInfo("Qwen2.5-VL", depth=28, vision_depth=32, has_cls=False, merge=2, mrope=True)


def _view(x, near, deep, layout, method=None):
    return View.of(x, dict(zip((method or VScan()).signals(), (near, deep), strict=True)), layout=layout)


def _merged(x, kept):
    """Each kept token and the mean of it with all tokens that are most like it."""
    groups = {j: [j] for j in kept}
    for j in range(len(x)):
        if j not in groups:
            alike = cosine_similarity(x[j][None], x[kept], dim=1)
            groups[kept[int(alike.argmax())]].append(j)
    return torch.stack([x[groups[j]].mean(0) for j in kept])


def _llava(near, deep, keep, side, window):
    """The code for LLaVA: the same whole number of each window, and the best of the others."""
    each = keep // 2 // (side // window) ** 2
    local = []
    for r in range(0, side, window):
        for c in range(0, side, window):
            own = [(r + i) * side + c + j for i in range(window) for j in range(window)]
            local += sorted(own, key=lambda j: -near[j])[:each]
    rest = sorted((j for j in range(side * side) if j not in local), key=lambda j: -deep[j])
    return sorted(local + rest[: keep - keep // 2])


def _qwen(near, deep, keep, h, w, window):
    """The code for Qwen2.5-VL: in the order of attention, until the window's share is full."""
    down, across = h // window, w // window
    limit, taken, counts = -(-(keep // 2) // (down * across)), [], {}
    for j in sorted(range(h * w), key=lambda j: -near[j]):
        spot = min(j // w // window, down - 1), min(j % w // window, across - 1)
        if counts.get(spot, 0) < limit and len(taken) < keep // 2:
            counts[spot] = counts.get(spot, 0) + 1
            taken.append(j)
    rest = sorted((j for j in range(h * w) if j not in taken), key=lambda j: -deep[j])
    return sorted(taken + rest[: keep - keep // 2])


@pytest.mark.system("vscan", "exact")
@pytest.mark.parametrize("keep", [96, 64, 192, 100, 47])
def test_released_keeps_and_merges_what_the_code_for_llava_does(keep):
    step, cut = Plan.of(f"vscan:released,keep={keep}").methods[0].bind(LLAVA)[1]
    assert [(s.layer, s.query) for s in step.needs] == [(5, "cls"), (22, "cls")]
    for seed in range(2):
        x, near, deep = tokens(seed, 576), scores(seed + 1, 576), scores(seed + 2, 576)
        values = dict(zip(step.needs, (near, deep), strict=True))
        view = View.of(x, step.signals(values.__getitem__), layout=Layout.grid(24, 24))
        found = step.act(view, State())[0].reduction
        want = _llava(near[0].tolist(), deep[0].tolist(), keep, 24, 6)
        assert found.lane(0).representatives.tolist() == want
        assert len(want) == 16 * (keep // 2 // 16) + keep - keep // 2
        torch.testing.assert_close(found.apply(x)[0], _merged(x[0], want))
    assert (str(cut.at), cut.needs) == ("layers[16]", (LMAttention(16),))


@pytest.mark.system("vscan", "exact")
def test_released_leaves_a_third_in_the_middle_of_the_lm():
    _, cut = Plan.of("vscan:released").methods[0].bind(LLAVA)[1]
    row = scores(4, 96)
    view = View.of(tokens(0, 96), cut.signals(lambda signal: row), n_visual=576, n_lm=96, layout=Layout.grid(1, 96))
    assert ids(cut.act(view, State())[0].reduction) == row[0].topk(32).indices.sort().values.tolist()


def _is_the_paper(reduce):
    """Grids that windows do not divide, as the code for Qwen2.5-VL takes them."""
    for seed, (h, w) in enumerate(((8, 8), (9, 7), (4, 13), (10, 11))):
        n = h * w
        x, near, deep = tokens(seed, n), scores(seed + 1, n), scores(seed + 2, n)
        for keep in (1, 2, 9, 16, 25):
            found = reduce(_view(x, near, deep, Layout.grid(h, w)), keep)
            want = _qwen(near[0].tolist(), deep[0].tolist(), keep, h, w, 4)
            assert found.lane(0).representatives.tolist() == want
            torch.testing.assert_close(found.apply(x)[0], _merged(x[0], want))


@pytest.mark.system("vscan", "exact")
def test_equals_the_code_for_qwen_on_any_grid():
    _is_the_paper(lambda view, keep: VScan(keep=keep, window=4).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_the_paper_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_the_paper(stub)


@pytest.mark.system("vscan", "exact")
def test_tiles_are_scanned_and_merged_each_by_itself():
    layout, n = Picture.tiled(4, 2, 1).lm, 48
    x, near, deep = tokens(5, n), scores(6, n), scores(7, n)
    found = VScan(keep=18, window=2).reduce(_view(x, near, deep, layout))
    kept, out = found.representatives[0].tolist(), found.apply(x)[0]
    for t in range(3):
        own = [j for j in range(n) if layout.tiles[j] == t]
        place = {
            tuple(layout.place[layout.content][j][2:] - layout.place[layout.content][own].min(0)[2:]): j for j in own
        }
        raster = [place[r, c] for r in range(4) for c in range(4)]
        want = [raster[i] for i in _qwen(near[0, raster].tolist(), deep[0, raster].tolist(), 6, 4, 4, 2)]
        mine = [j for j in kept if layout.tiles[j] == t]
        assert mine == sorted(want)
        index = [raster.index(j) for j in mine]
        torch.testing.assert_close(out[[kept.index(j) for j in mine]], _merged(x[0, raster], index))


@pytest.mark.system("vscan", "exact")
def test_shares_of_local_tokens_at_their_ends():
    x, near, deep = tokens(0, 64), scores(1, 64), scores(2, 64)
    layout = Layout.grid(8, 8)
    best = lambda row, k: row[0].topk(k).indices.sort().values.tolist()  # noqa: E731
    alone = VScan(keep=12, local=0.0).reduce(_view(x, near, deep, layout))
    assert alone.representatives[0].tolist() == best(deep, 12)
    whole = VScan(keep=12, local=1.0, window=8).reduce(_view(x, near, deep, layout))
    assert whole.representatives[0].tolist() == best(near, 12)


def test_a_broken_token_goes_nowhere():
    x, near, deep = tokens(0, 64), scores(1, 64), scores(2, 64)
    x[0, 3], deep[0, 5], near[0, 6] = torch.nan, torch.nan, torch.nan
    view = _view(x, near, deep, Layout.grid(8, 8))
    found = VScan(keep=20, window=4).reduce(view)
    assert found.m == 20
    assert not {3, 5} & set(found.representatives[0].tolist())
    assert not found.kept[0, 3]
    out = found.apply(torch.where(x.isnan(), 0, x))
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("info", "blocks", "window", "layer"),
    [(LLAVA, [5, 22], 6, 16), (QWEN, [7, 31], 4, 14), (WITHOUT_CLS, [2, 7], 4, 4)],
    ids=["llava", "qwen2.5-vl", "eight blocks"],
)
def test_defaults_of_models(info, blocks, window, layer):
    method, (first, second) = VScan().bind(info)
    assert [s.layer for s in first.needs] == blocks
    assert (method.window, second.at.index) == (window, layer)
    assert {s.query for s in first.needs} == {"cls" if info.has_cls else "all"}


def test_at_a_budget_the_last_cut_leaves_it():
    method = VScan().at_budget("12.5%", 256)
    assert (method.keep.of(256), method.last.of(256)) == (96, 32)
    assert VScan().at_budget(200, 256).keep.of(256) == 256


@pytest.mark.parametrize("wrong", [{"window": 0}, {"local": 1.5}, {"remainder": "share"}, {"query": "last"}])
def test_settings_that_do_not_go(wrong):
    with pytest.raises(WinnowError, match="vscan"):
        VScan(**wrong)


def _finds_and_represents(sample, reduce):
    """More evidence and more of all things than blind selections of as many, and dropped tokens lie nearer to what is
    left than with the tokens that [CLS] sees most."""
    from tests.methods.directional import _nearest, at_random, evenly, gap, mask_of, over

    def lost(view, found):
        dropped = ~mask_of(found.representatives, view.n)
        error = (1 - _nearest(view.tokens, found.apply(view.tokens))) * dropped
        return (error.sum(1) / dropped.sum(1)).double().numpy()

    views = sample.views["projected"]
    for k in (64, 32):
        kept = torch.cat([mask_of(reduce(v, k).representatives, v.n) for v in views])
        for blind in (evenly, at_random):
            for mask in (sample.evidence, sample.objects):
                assert gap(sample.recall(kept, mask), sample.recall(sample.kept(blind, k), mask)).low > 0
        own = over(views, lambda v: lost(v, reduce(v, k)))  # noqa: B023
        other = over(views, lambda v: lost(v, FasterVLM(keep=k).reduce(v)))  # noqa: B023
        assert gap(own, other).high < 0


@pytest.mark.system("vscan", "directional")
@pytest.mark.xdist_group("samples")
def test_finds_more_than_blind_and_represents_what_goes(sample):
    method, _ = VScan(query="cls").bind(sample.handle.info)
    _finds_and_represents(sample, lambda v, k: method.replace(keep=k).reduce(v))


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", ["first_k", "evenly", "at_random", "no merging"])
def test_finding_fails_for_a_stub(sample, stub):
    from tests.methods import directional

    alone = lambda v, k: FasterVLM(keep=k).reduce(v)  # noqa: E731
    select = {"first_k": first_k, "no merging": alone}.get(stub) or getattr(directional, stub)
    with pytest.raises(AssertionError):
        _finds_and_represents(sample, select)
