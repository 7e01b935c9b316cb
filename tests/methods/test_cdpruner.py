"""CDPruner by its card: the greedy set of a determinantal point process whose kernel is scaled by relevance."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from tests.methods.directional import at_random, evenly, gap
from tests.methods.stubs import STUBS, first_k, ids, tokens
from winnow.contract import ClipPatches, ClipText, ModelInfo, QuestionCosine, View, WinnowError
from winnow.methods.cdpruner import CDPruner
from winnow.methods.divprune import DivPrune
from winnow.testing import Picture

LLAVA = ModelInfo("LLaVA", depth=32, vision_depth=24, feature_layer=-2)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(x: torch.Tensor, score: torch.Tensor, layout=None) -> View:
    """Tokens `[b, N, D]` and their similarity to the question, `[b, N]`."""
    return View.of(x, score[..., None], layout=layout)


def by_volume(kernel: torch.Tensor, k: int) -> list[int]:
    """The token that makes the determinant largest, k times."""
    picks: list[int] = []
    while len(picks) < k:
        rest = [j for j in range(len(kernel)) if j not in picks]
        volume = [float(torch.linalg.slogdet(kernel[[*picks, j]][:, [*picks, j]])[1]) for j in rest]
        picks.append(rest[volume.index(max(volume))])
    return picks


def naive(x: torch.Tensor, score: torch.Tensor, k: int, theta: float | None = None) -> list[int]:
    r = ((score - score.min() + 1e-6) / (score.max() - score.min())).double()
    r = r if theta is None else (r * theta / 2 / (1 - theta)).exp()
    unit = normalize(x.double(), dim=-1)
    return sorted(by_volume(r[:, None] * (unit @ unit.T).fill_diagonal_(1) * r, k))


def _is_the_paper(reduce):
    for seed in range(3):
        x, score = randn(seed, 2, 24, 32), randn(seed + 50, 2, 24)
        for k, theta in ((1, None), (5, None), (12, 0.5), (12, 0.0), (17, None)):
            found = reduce(seen(x, score), k, theta)
            assert [ids(found, i) for i in range(2)] == [naive(x[i], score[i], k, theta) for i in range(2)]


@pytest.mark.system("cdpruner", "exact")
def test_equals_greedy_by_determinants():
    _is_the_paper(lambda view, k, theta: CDPruner(keep=k, theta=theta).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_the_paper_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_the_paper(lambda view, k, theta: stub(view, k))


@pytest.mark.system("cdpruner", "exact")
def test_of_tokens_that_have_nothing_in_common_the_most_relevant_are_kept():
    score = randn(1, 3, 30)
    found = CDPruner(keep=8).reduce(seen(torch.eye(30).expand(3, -1, -1), score)).index
    assert found.tolist() == score.topk(8).indices.sort().values.tolist()
    found = CDPruner(keep=8, sign="minus").reduce(seen(torch.eye(30).expand(3, -1, -1), score)).index
    assert found.tolist() == (-score).topk(8).indices.sort().values.tolist()


def _takes_no_duplicate(reduce):
    twins = torch.randperm(20, generator=torch.Generator().manual_seed(0)) % 10
    x = tokens(3, 10, 64)[:, twins] * torch.linspace(1, 2, 20)[:, None]
    kept = ids(reduce(seen(x, randn(4, 1, 20).abs() + 1), 10))
    assert {int(twins[j]) for j in kept} == set(range(10))


@pytest.mark.system("cdpruner", "exact")
def test_duplicates_are_not_kept_while_distinct_tokens_are_left():
    _takes_no_duplicate(lambda view, k: CDPruner(keep=k).reduce(view))


def test_no_duplicates_fails_for_the_most_relevant_and_for_stubs():
    relevant = lambda view, k: CDPruner(keep=k).reduce(  # noqa: E731
        seen(torch.eye(20)[None], view[QuestionCosine()][..., 0])
    )
    for stub in (*STUBS, relevant):
        with pytest.raises(AssertionError):
            _takes_no_duplicate(stub)


@pytest.mark.system("cdpruner", "exact")
def test_a_constant_relevance_is_none_and_all_is_the_identity():
    x = tokens(5, 40, 48)
    flat = CDPruner(keep=9).reduce(seen(x, torch.full((1, 40), 0.3)))
    assert ids(flat) == ids(CDPruner(keep=9, theta=0.0).reduce(seen(x, randn(6, 1, 40))))
    assert ids(CDPruner(keep=40).reduce(seen(x, randn(6, 1, 40)))) == list(range(40))


def test_more_tokens_than_the_kernel_has_rank_are_all_there_once():
    x = randn(0, 1, 40, 4) @ randn(1, 4, 16)
    kept = ids(CDPruner(keep=30).reduce(seen(x, randn(2, 1, 40))))
    assert len(kept) == len(set(kept)) == 30


def test_a_token_without_relevance_is_kept_last():
    score = randn(7, 1, 12)
    score[0, 3] = torch.nan
    view = seen(tokens(7, 12, 16), score)
    assert 3 not in ids(CDPruner(keep=11).reduce(view))
    assert int(view.notes["nan_scores"]) == 1


def _looks_at_the_question(reduce):
    x = tokens(8, 60, 64)
    assert ids(reduce(seen(x, randn(1, 1, 60)), 12)) != ids(reduce(seen(x, randn(2, 1, 60)), 12))


@pytest.mark.system("cdpruner", "exact")
def test_two_questions_on_one_picture_keep_different_tokens():
    _looks_at_the_question(lambda view, k: CDPruner(keep=k).reduce(view))


@pytest.mark.parametrize("stub", [*STUBS, lambda view, k: DivPrune(keep=k).reduce(view)])
def test_two_questions_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _looks_at_the_question(stub)


@pytest.mark.system("cdpruner", "exact")
def test_a_kernel_for_each_tile_and_one_scale_of_relevance_for_all():
    layout = Picture.tiled(5, 2, 1).lm
    x, score = tokens(9, 75, 40), randn(10, 1, 75)
    r = (score[0] - score.min() + 1e-6) / (score.max() - score.min())
    want = []
    for tile, quota in enumerate((8, 7, 7)):
        own = [j for j in range(75) if layout.tiles[j] == tile]
        unit = normalize(x[0, own].double(), dim=-1)
        want += [own[j] for j in by_volume(r[own, None] * (unit @ unit.T) * r[own].double(), quota)]
    assert ids(CDPruner(keep=22).reduce(seen(x, score, layout))) == sorted(want)


def test_tiles_of_which_an_earlier_method_has_left_unequal_parts():
    layout = Picture.tiled(4, 2, 1).lm
    left = torch.tensor([[0, 1, 2, *range(16, 32)], [*range(19)]])
    view = View(
        tokens(11, 19, 16, 2), layout, left, 48, {QuestionCosine(words="question", pool="mean"): randn(1, 2, 19, 1)}
    )
    found = CDPruner(keep=10).reduce(view)
    tiles = [torch.tensor(layout.tiles)[left[i, ids(found, i)]].bincount().tolist() for i in range(2)]
    assert tiles[0] == [3, 7] or sum(tiles[0]) == 10
    assert [sum(own) for own in tiles] == [10, 10]
    assert tiles[0][0] == 3  # all that the first tile has left


def authors(x, image_embeds, text_embeds, k):
    """The steps of the released code for one picture `[crops, N, …]`, in fp32: a list of kept tokens for each crop."""
    unit = x / x.norm(dim=-1, keepdim=True)
    images, texts = normalize(image_embeds, dim=-1), normalize(text_embeds, dim=-1)
    turned = [[-sum(float(v @ t) for t in texts) / len(texts) for v in crop] for crop in images]
    low, high = min(map(min, turned)), max(map(max, turned))
    kept = []
    for crop, scores in zip(unit, turned, strict=True):
        r = [(q - low + 1e-6) / (high - low) for q in scores]
        gain = [a * a * float(u @ u) for a, u in zip(r, crop, strict=True)]
        factors, chosen = [], []
        for _ in range(k):
            j = max(range(len(r)), key=lambda i: gain[i])
            row = [r[j] * r[i] * float(crop[j] @ crop[i]) for i in range(len(r))]
            row = [(a - sum(f[j] * f[i] for f in factors)) / gain[j] ** 0.5 for i, a in enumerate(row)]
            factors.append(row)
            gain = [g - e * e for g, e in zip(gain, row, strict=True)]
            gain[j] = float("-inf")
            chosen.append(j)
        kept.append(sorted(chosen))
    return kept


def released(k: int):
    method = CDPruner.as_released(keep=k)
    return method.bind(LLAVA)[1][0]


def clip_view(step, x, patches, texts, layout=None) -> View:
    return View.of(
        x, step.signals({ClipPatches(22): patches, ClipText(pool="pieces"): texts}.__getitem__), layout=layout
    )


@pytest.mark.system("cdpruner", "exact")
@pytest.mark.parametrize("pieces", [1, 3])
def test_as_released_on_one_picture(pieces):
    step = released(16)
    assert str(step.at) == "projected"
    for seed in range(3):
        x, patches, texts = randn(seed, 1, 64, 96), randn(seed + 9, 1, 64, 24), randn(seed + 19, 1, pieces, 24)
        found = step.run(clip_view(step, x, patches, texts), None).reduction
        assert [ids(found)] == authors(x, patches, texts[0], 16)


@pytest.mark.system("cdpruner", "exact")
def test_as_released_every_crop_keeps_as_many_of_its_own():
    picture, step = Picture.tiled(4, 1, 2), released(3 * 5)
    order = torch.tensor(picture.lm.cell[picture.lm.content])  # the crops one behind the other, at their places
    x, patches, texts = randn(1, 3, 16, 48), randn(2, 3, 16, 24), randn(3, 1, 1, 24)
    view = clip_view(step, x.flatten(0, 1)[order][None], patches.flatten(0, 1)[order][None], texts, picture.lm)
    want = {16 * crop + j for crop, own in enumerate(authors(x, patches, texts[0], 5)) for j in own}
    assert {int(order[j]) for j in ids(step.run(view, None).reduction)} == want


@pytest.mark.parametrize("settings", [{"theta": 1.0}, {"theta": -0.1}, {"text": "siglip"}, {"sign": "+"}, {"keep": 0}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(WinnowError):
        CDPruner(**settings)


def _follows_the_sign(sample, kept):
    """Most evidence with relevance, less with none, least with its sign turned."""
    more, none, turned = (sample.recall(kept(settings)) for settings in ("", ",theta=0.0", ",sign=minus"))
    assert gap(more, none).low > 0
    assert gap(none, turned).low > 0


@pytest.mark.system("cdpruner", "directional")
@pytest.mark.xdist_group("samples")
def test_relevance_finds_evidence_and_its_sign_turned_loses_it(few):
    _follows_the_sign(few, lambda settings: few.answers(f"cdpruner:keep=32{settings}")[1])


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", [first_k, evenly, at_random])
def test_the_sign_fails_for_a_stub(few, stub):
    with pytest.raises(AssertionError):
        _follows_the_sign(few, lambda settings: few.kept(stub, 32))
