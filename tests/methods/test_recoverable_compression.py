"""Recoverable Compression by its card: salient and recovered tokens, centres and one more, counted by outliers."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from tests.methods.directional import at_random, evenly, gap
from tests.methods.stubs import STUBS, first_k
from winnow.contract import ClipPatches, ClipText, ModelInfo, OneHeadAttention, View, WideKeys, WinnowError
from winnow.methods.recoverable_compression import RecoverableCompression
from winnow.parts.outliers import local_outlier_factor_naive
from winnow.testing import Picture

LLAVA = ModelInfo("LLaVA", depth=32, vision_depth=24, feature_layer=-2)
ROW, KEYS, QUESTION = RecoverableCompression().signals()


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scene(seed: int, n: int = 150, b: int = 1, d: int = 24):
    """Attention with a long tail, keys, tokens, and their similarity to the question with a few that stand out."""
    row = (2 * randn(seed, b, n)).softmax(-1)
    like = 0.1 * randn(seed + 1, b, n)
    like[:, 7::31] += 0.6
    return randn(seed + 2, b, n, d), row, randn(seed + 3, b, n, 40), like


def seen(x, row, keys, like, layout=None) -> View:
    return View.of(x, {ROW: row, KEYS: keys, QUESTION: like[..., None]}, layout=layout)


def best(scores, k: int, among=None) -> list[int]:
    return sorted(range(len(scores)) if among is None else among, key=lambda j: -float(scores[j]))[:k]


def share(total: int, scores: list[float], k: int) -> int:
    """int(total · the share of outliers), as floats have it."""
    return int(total * (sum(f > 1.5 for f in local_outlier_factor_naive(scores, k)) / len(scores)))


def counted(x, row, keys, like, width=None, legacy=False, merged=32):
    """One item: its main tokens, its centres, and all rows; the steps of the card, or of the released code."""
    row64, scaled = row.double().tolist(), like * (width or 768) ** -0.5
    n = len(row64)
    salient = best(row64, share(n, row64, 20))
    hidden = scaled.clone()
    hidden[salient] = scaled.min()
    asked_for = share(n - len(salient), hidden.double().tolist(), 20)
    recovered = best(hidden, asked_for, [j for j in range(n) if j not in salient])
    main = sorted(salient + recovered)
    rest = [j for j in range(n) if j not in main]
    base = keys.shape[1] if legacy else len(main)
    centres = best(row, min(len(rest), share(base, [row64[j] for j in rest], 10)), rest)
    unit = normalize(keys, dim=-1)
    key_of = {j: unit[i if legacy else j] for i, j in enumerate(rest)}
    rows = [x[j] for j in main]
    for c in centres:
        alike = {j: float(key_of[c] @ key_of[j] + 50 * scaled[j]) for j in rest if j != c}
        rows.append(x[c] + sum(row[j] * x[j] for j in sorted(alike, key=lambda j: -alike[j])[:merged]))
    others = [j for j in rest if j not in centres]
    if others and (centres or not legacy):
        rows.append(sum(row[j] * x[j] for j in others))
    return salient, recovered, centres, torch.stack(rows)


def _is_the_card(reduce):
    most = [0, 0, 0]
    for seed in range(3):
        x, row, keys, like = scene(seed, b=2)
        found = reduce(seen(x, row, keys, like))
        rows = found.apply(x)
        for i in range(2):
            salient, recovered, centres, want = counted(x[i], row[i], keys[i], like[i])
            most = [max(a, len(b)) for a, b in zip(most, (salient, recovered, centres), strict=True)]
            count = found.lane(i).m
            assert found.lane(i).representatives[: count - 1].tolist() == sorted(salient + recovered) + centres
            torch.testing.assert_close(rows[i, :count], want)
    assert min(most) > 0


@pytest.mark.system("recoverable-compression", "exact")
def test_equals_the_card_written_naively():
    _is_the_card(lambda view: RecoverableCompression().reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_the_card_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_the_card(lambda view: stub(view, 40))


def _follows_the_question(reduce):
    """Another question: the same salient tokens, others recovered, and none of them among the salient ones."""
    x, row, keys, like = scene(5)
    other = like.roll(11, 1)
    kinds = [counted(x[0], row[0], keys[0], own[0])[:2] for own in (like, other)]
    assert kinds[0][0] == kinds[1][0]
    assert set(kinds[0][1]).isdisjoint(kinds[0][0])
    kept = [set(reduce(seen(x, row, keys, own)).representatives[0].tolist()) for own in (like, other)]
    assert all(set(salient + recovered) <= own for (salient, recovered), own in zip(kinds, kept, strict=True))
    assert kept[0] != kept[1]


@pytest.mark.system("recoverable-compression", "exact")
def test_another_question_recovers_other_tokens():
    _follows_the_question(lambda view: RecoverableCompression().reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_another_question_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _follows_the_question(lambda view: stub(view, 60))


@pytest.mark.system("recoverable-compression", "exact")
@pytest.mark.parametrize("keep", [1, 2, 20, 149, 150])
def test_a_budget_is_met_exactly(keep):
    x, row, keys, like = scene(6, b=3)
    found = RecoverableCompression(keep=keep).reduce(seen(x, row, keys, like))
    assert found.counts is None
    assert found.m == keep
    for i in range(3):
        own = found.lane(i).representatives.tolist()
        assert len(set(own)) == keep
        assert bool((found.lane(i).to_matrix() != 0).any(-1).all())
    if keep == 150:
        assert torch.equal(found.apply(x), x)


def test_as_many_salient_and_recovered_tokens_as_the_outliers_say_of_a_budget():
    x, row, keys, like = scene(7)
    _, recovered, _, rows = counted(x[0], row[0], keys[0], like[0])
    found = RecoverableCompression(keep=len(rows)).reduce(seen(x, row, keys, like))
    torch.testing.assert_close(found.apply(x)[0], rows)
    fewer = RecoverableCompression(keep=len(rows), recover=False).reduce(seen(x, row, keys, like))
    assert not set(recovered) <= set(fewer.representatives[0].tolist())


def test_broken_tokens_are_in_no_row():
    x, row, keys, like = scene(8)
    x[0, 3], row[0, 9], keys[0, 11], like[0, 13] = (torch.nan,) * 4
    view = seen(x, row, keys, like)
    found = RecoverableCompression().reduce(view)
    assert not found.kept[0, [3, 9, 11, 13]].any()
    assert bool(found.apply(x).isfinite().all())
    assert int(view.notes["nan_scores"]) == 4


def test_quartiles_as_the_rule():
    x, row, keys, like = scene(9)
    low, high = torch.quantile(row[0].double(), torch.tensor([0.25, 0.75], dtype=torch.float64))
    above = (row[0] > high + 1.5 * (high - low)).nonzero()[:, 0].tolist()
    found = RecoverableCompression(rule="iqr", recover=False).reduce(seen(x, row, keys, like))
    assert set(above) <= set(found.representatives[0].tolist())


def test_a_row_of_attention_is_that_of_one_head_as_wide_as_the_tower():
    from winnow.contract import TowerAttention

    q, k = randn(1, 2, 4, 10, 8), randn(2, 2, 4, 10, 8)
    shown = TowerAttention(q, k, k, 8**-0.5, 1)
    wide_q, wide_k = (v.transpose(1, 2).flatten(2) for v in (q, k))
    want = (wide_q @ wide_k.mT / 32**0.5).softmax(-1)
    torch.testing.assert_close(OneHeadAttention().read(shown), want[:, 0, 1:])
    torch.testing.assert_close(OneHeadAttention(query="all").read(shown), want.mean(1)[:, 1:])
    assert torch.equal(WideKeys().read(shown), wide_k)


@pytest.mark.system("recoverable-compression", "exact")
def test_as_released():
    (step,) = RecoverableCompression.as_released().bind(LLAVA)[1]
    names = (OneHeadAttention(23), WideKeys(23), ClipPatches(23, norm=False), ClipText(pool="end"))
    assert (str(step.at), step.needs) == ("projected", names)
    for seed in range(3):
        x, row, keys, _ = scene(seed)
        patches, text = randn(seed + 5, 1, 150, 32), randn(seed + 6, 1, 1, 32)
        patches[:, 7::31] += 0.5 * text[:, 0]
        cosine = (normalize(patches, dim=-1) @ normalize(text, dim=-1).mT)[0, :, 0]
        values = dict(zip(names, (row, keys, patches, text), strict=True))
        found = step.run(View.of(x, step.signals(values.__getitem__)), None).reduction
        *_, want = counted(x[0], row[0], keys[0], cosine, width=32, legacy=True)
        torch.testing.assert_close(found.apply(x)[0], want)


def test_as_released_the_last_token_goes_where_there_is_no_centre():
    x, row, keys, like = scene(1)
    row = torch.linspace(1, 2, 150).softmax(0)[None]  # no outlier among them
    card, code = (RecoverableCompression(legacy=on).reduce(seen(x, row, keys, like)).apply(x) for on in (False, True))
    assert not counted(x[0], row[0], keys[0], like[0])[2]
    assert torch.equal(card[:, :-1], code)


def test_tiles_are_one_picture():
    layout = Picture.tiled(5, 2, 2).lm
    x, row, keys, like = scene(3, n=125)
    found = RecoverableCompression().reduce(seen(x, row, keys, like, layout))
    assert torch.equal(found.apply(x), RecoverableCompression().reduce(seen(x, row, keys, like)).apply(x))


@pytest.mark.parametrize(
    "settings", [{"neighbours": (20,)}, {"neighbours": (0, 10)}, {"merged": 0}, {"pull": -1.0}, {"rule": "z"}]
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(WinnowError):
        RecoverableCompression(**settings)


def _recovers(sample, kept):
    """With recovery more of the evidence than without, at equal total count, and more than a blind choice leaves."""
    for k in (32, 13):
        more, less = (sample.recall(kept(k, settings)) for settings in ("", ",recover=false"))
        assert gap(more, less).low > 0
        for blind in (evenly, at_random):
            assert gap(more, sample.recall(sample.kept(blind, k))).low > 0


@pytest.mark.system("recoverable-compression", "directional")
@pytest.mark.xdist_group("samples")
def test_recovery_finds_what_the_question_asks_for(few):
    _recovers(few, lambda k, settings: few.answers(f"recoverable-compression:keep={k}{settings}")[1])


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", [first_k, evenly, at_random])
def test_recovery_fails_for_a_stub(few, stub):
    with pytest.raises(AssertionError):
        _recovers(few, lambda k, settings: few.kept(stub, k))
