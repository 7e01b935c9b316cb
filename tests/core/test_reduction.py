"""Reduction: every storage against its matrix written naively, composition, expansion, lanes, ragged lanes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from winnow.core.errors import WinnowError
from winnow.core.reduction import Reduction


def _naive(r: Reduction, lane: int) -> torch.Tensor:
    """The matrix of one lane, edge by edge, in float64."""
    if r.matrix is not None:
        return r.matrix[lane].double()
    out = torch.zeros(r.m, r.n, dtype=torch.float64)
    for e, source in enumerate(r.index[lane].tolist()):
        if r.target is None:
            if r.counts is None or e < r.counts[lane]:
                out[e, source] += 1
        elif (target := r.target[lane, e].item()) >= 0:
            out[target, source] += 1 if r.weight is None else r.weight[lane, e].item()
    return out


def _generator(draw):
    return torch.Generator().manual_seed(draw(st.integers(0, 2**31)))


@st.composite
def selections(draw, n=None, b=None, ragged=True):
    b, n = b or draw(st.integers(1, 3)), n or draw(st.integers(1, 9))
    if ragged and draw(st.booleans()):
        mask = torch.rand(b, n, generator=_generator(draw)) < 0.5
        return Reduction.select(mask)
    m = draw(st.integers(1, n))
    index = torch.rand(b, n, generator=_generator(draw)).argsort(1)[:, :m]
    ordered = draw(st.booleans())
    return Reduction.select(index.sort(1).values if ordered else index, n, ordered=ordered)


@st.composite
def merges(draw, n=None, b=None):
    b, n = b or draw(st.integers(1, 3)), n or draw(st.integers(1, 9))
    m, g = draw(st.integers(1, n)), _generator(draw)
    cluster = torch.randint(-1, m, (b, n), generator=g)
    weight = torch.rand(b, n, generator=g) if draw(st.booleans()) else None
    kind = draw(st.sampled_from(["assign", "edges", "mix"]))
    if kind == "assign":
        return Reduction.assign(cluster, weight, m=m)
    if kind == "edges":
        index = torch.randint(0, n, (b, 2 * n), generator=g)
        target = torch.randint(-1, m, (b, 2 * n), generator=g)
        return Reduction.edges(index, target, torch.randn(b, 2 * n, generator=g), n=n, m=m)
    return Reduction.mix(torch.randn(b, m, n, generator=g))


reductions = st.one_of(selections(), merges())


@given(reductions)
def test_matrix_is_the_map_edge_by_edge(r):
    for lane in range(r.lanes[0]):
        torch.testing.assert_close(
            r.to_matrix(torch.float64)[lane], _naive(r, lane), check_dtype=False, rtol=0, atol=1e-6
        )


@given(reductions, st.integers(0, 99))
def test_apply_is_the_matrix_times_the_tokens(r, seed):
    x = torch.randn(r.lanes[0], r.n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    out = r.apply(x)
    assert out.dtype == x.dtype
    for lane in range(r.lanes[0]):
        rows = r.m if r.counts is None else r.counts[lane]
        torch.testing.assert_close(out[lane, :rows], (_naive(r, lane) @ x[lane])[:rows], rtol=1e-5, atol=1e-6)


@given(selections(ragged=False), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_a_selection_copies_bits(r, dtype):
    x = torch.randn(r.lanes[0], r.n, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    for lane in range(r.lanes[0]):
        assert torch.equal(r.apply(x)[lane], x[lane][r.index[lane]])


@st.composite
def pairs(draw):
    first = draw(st.one_of(selections(ragged=False), merges()))
    b = first.lanes[0]
    return first, draw(st.one_of(selections(n=first.m, b=b, ragged=False), merges(n=first.m, b=b)))


@given(pairs(), st.integers(0, 99))
def test_composition_is_one_map_after_the_other(pair, seed):
    first, second = pair
    both = second @ first
    assert (both.n, both.m) == (first.n, second.m)
    x = torch.randn(first.lanes[0], first.n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(both.apply(x), second.apply(first.apply(x)), rtol=1e-5, atol=1e-5)
    assert torch.equal(both.representatives, first.representatives.gather(1, second.representatives))
    assert both.ordered == (first.ordered and second.ordered)


def test_composition_of_selections_is_a_selection_ordered_if_both_are():
    up, down = (
        Reduction.select(torch.tensor([[0, 2, 3]]), 4),
        Reduction.select(torch.tensor([[3, 2, 0]]), 4, ordered=False),
    )
    last = Reduction.select(torch.tensor([[0, 2]]), 3)
    assert (last @ up).index.tolist() == [[0, 3]]
    assert (last @ down).index.tolist() == [[3, 0]]
    assert (last @ up).is_selection
    assert ((last @ up).ordered, (last @ down).ordered) == (True, False)


@given(selections())
def test_composition_after_a_ragged_selection(first):
    assume(first.m > 0)
    second = Reduction.mix(torch.eye(first.m).flip(0).expand(first.lanes[0], -1, -1))
    torch.testing.assert_close((second @ first).to_matrix(), first.to_matrix().flip(1))


def test_maps_that_do_not_fit_are_refused():
    first, second = Reduction.select(torch.tensor([[0, 1]]), 4), Reduction.select(torch.tensor([[0]]), 3)
    with pytest.raises(WinnowError, match=r"gives 2 tokens, the second takes 3"):
        second @ first
    with pytest.raises(WinnowError, match=r"4 source tokens got 5 tokens of shape \(1, 5, 2\)"):
        first.apply(torch.zeros(1, 5, 2))


def test_select_wants_int64_or_bool_and_n():
    with pytest.raises(WinnowError, match=r"int64 indices or a bool mask, got torch\.int32"):
        Reduction.select(torch.zeros(1, 2, dtype=torch.int32), 4)
    with pytest.raises(WinnowError, match="without n"):
        Reduction.select(torch.tensor([[0]]))


def test_a_mask_is_its_indices():
    r = Reduction.select(torch.tensor([[True, False, True], [False, True, True]]))
    assert r.index.tolist() == [[0, 2], [1, 2]]
    assert r.counts is None
    assert Reduction.select(torch.tensor([False, True])).index.tolist() == [1]


def test_ragged_lanes():
    r = Reduction.select(torch.tensor([[True, False, True, True], [False, True, False, False]]))
    assert (r.m, r.counts) == (3, (3, 1))
    assert r.valid.tolist() == [[True] * 3, [True, False, False]]
    assert r.lane(1).index.tolist() == [1]
    assert r.lane(1).m == 1
    assert r.mass.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert r.is_stochastic
    assert r.kept.tolist() == [[True, False, True, True], [False, True, False, False]]


def test_nothing_kept_is_a_map_too():
    for mask in (torch.zeros(2, 3, dtype=torch.bool), torch.tensor([[False] * 3, [True] * 3])):
        r = Reduction.select(mask)
        assert r.lane(0).m == 0
        assert r.kept.tolist() == mask.tolist()
        x = torch.arange(6.0).reshape(2, 3, 1)
        assert r.lane(0).apply(x[0]).shape == (0, 1)
        assert torch.equal(r.expand(r.apply(x)), torch.where(mask[..., None], x, 0.0))
        assert r.is_stochastic


@given(reductions)
def test_a_lane_is_the_map_of_that_item(r):
    for lane in range(r.lanes[0]):
        own = r.lane(lane)
        assert tuple(own.lanes) == ()
        rows = r.m if r.counts is None else r.counts[lane]
        assert own.m == rows
        torch.testing.assert_close(own.to_matrix(), r.to_matrix()[lane, :rows])
        assert torch.equal(own.representatives, r.representatives[lane, :rows])
        x = torch.randn(r.n, 2, generator=torch.Generator().manual_seed(lane))
        stacked = torch.zeros(r.lanes[0], r.n, 2)
        stacked[lane] = x
        torch.testing.assert_close(own.apply(x), r.apply(stacked)[lane, :rows])


@given(reductions)
def test_what_follows_from_the_matrix(r):
    matrix = r.to_matrix()
    assert torch.equal(r.kept, (matrix != 0).any(1))
    torch.testing.assert_close(r.mass, matrix.sum(2))
    for j in range(r.m):
        for lane, found in enumerate(r.sources(j)):
            assert found.tolist() == matrix[lane, j].nonzero()[:, 0].tolist()


def test_anchors_are_the_heaviest_source_the_first_among_equals_or_the_one_given():
    matrix = torch.tensor([[[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]]])
    assert Reduction.mix(matrix).representatives.tolist() == [[0, 2]]
    assert Reduction.mix(matrix, representative=torch.tensor([[1, 2]])).representatives.tolist() == [[1, 2]]
    assert Reduction.assign(torch.tensor([[1, 0, 1]]), m=2).representatives.tolist() == [[1, 0]]


def test_stochastic_is_a_weighted_mean():
    cluster = torch.tensor([[0, 0, 1]])
    assert Reduction.assign(cluster, torch.tensor([[0.5, 0.5, 1.0]]), m=2).is_stochastic
    assert not Reduction.assign(cluster, m=2).is_stochastic  # a sum
    assert not Reduction.mix(torch.tensor([[[2.0, -1.0]]])).is_stochastic
    assert Reduction.select(torch.tensor([[2, 0]]), 3).is_stochastic


def test_expand_gives_each_source_what_it_feeds():
    r = Reduction.assign(torch.tensor([[1, 0, 1, -1]]), m=2)
    y = torch.tensor([[[5.0], [7.0]]])
    assert r.expand(y)[0, :, 0].tolist() == [7, 5, 7, 0]
    heavy = Reduction.mix(torch.tensor([[[0.2, 0.9], [0.8, 0.1]]]))
    assert heavy.expand(y)[0, :, 0].tolist() == [7, 5]


@given(selections())
def test_expand_after_a_selection_puts_tokens_back(r):
    x = torch.randn(r.lanes[0], r.n, 2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(r.expand(r.apply(x)), torch.where(r.kept[..., None], x, 0.0))


def test_lanes_may_be_items_and_heads():
    index = torch.tensor([[[0, 1], [1, 2]], [[0, 2], [0, 1]]])
    r = Reduction.select(index, 3)
    assert tuple(r.lanes) == (2, 2)
    x = torch.arange(12.0).reshape(2, 2, 3, 1)
    assert r.apply(x)[1, 0, :, 0].tolist() == [6, 8]
    assert r.to_matrix().shape == (2, 2, 2, 3)
    assert r.lane(1).index.tolist() == [[0, 2], [0, 1]]


def test_gradients_flow_through_tokens():
    x = torch.randn(1, 5, 2, requires_grad=True)
    for r in (Reduction.select(torch.tensor([[1, 3]]), 5), Reduction.assign(torch.tensor([[0, 0, 1, 1, -1]]), m=2)):
        (grad,) = torch.autograd.grad(r.apply(x).sum(), x)
        assert torch.equal(grad[0, :, 0] != 0, r.kept[0])


BROKEN = [float("nan"), float("inf"), -float("inf")]
DROPS = {
    "target": Reduction.assign(torch.tensor([[0, -1, 1, 1]]), m=2),
    "target-and-weight": Reduction.assign(torch.tensor([[0, -1, 1, 1]]), torch.ones(1, 4), m=2),
    "weight": Reduction.assign(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[1.0, 0.0, 1.0, 1.0]]), m=2),
    "matrix": Reduction.mix(torch.tensor([[[1.0, 0, 0, 0], [0, 0, 1, 1]]])),
}


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", DROPS)
def test_a_dropped_token_reaches_no_output_whatever_it_is(how, dtype, value):
    x = torch.tensor([[[1.0, 2.0], [3.0, value], [5.0, 6.0], [7.0, 8.0]]], dtype=dtype, requires_grad=True)
    out = DROPS[how].apply(x)
    assert out.tolist() == [[[1, 2], [12, 14]]]
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad[0, :, 0].tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("value", BROKEN)
def test_a_broken_token_breaks_the_outputs_that_it_has_a_part_in_and_no_others(value):
    x = torch.tensor([[[1.0], [value], [5.0]]])
    edges = Reduction.edges(
        torch.tensor([[0, 1, 1, 2]]), torch.tensor([[0, 0, 1, 1]]), torch.tensor([[1.0, 0.0, 0.5, 0.5]]), n=3, m=2
    )
    for r in (edges, Reduction.mix(edges.to_matrix())):
        assert r.apply(x).isfinite()[0, :, 0].tolist() == [True, False]


@pytest.mark.parametrize("dense", [False, True])
def test_a_weight_of_nothing_is_learned_unless_its_token_is_broken(dense):
    weight = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    x = torch.tensor([[[1.0], [2.0], [torch.nan]]])
    r = Reduction.mix(weight[:, None]) if dense else Reduction.assign(torch.zeros(1, 3, dtype=torch.int64), weight, m=1)
    (grad,) = torch.autograd.grad(r.apply(x).sum(), weight)
    assert grad[0, :2].tolist() == [1, 2]
    assert grad.isfinite().all()
