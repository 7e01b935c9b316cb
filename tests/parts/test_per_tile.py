"""What is known tile by tile: counts, quantiles, and a total dealt over tiles."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from winnow.core.view import View
from winnow.parts.per_tile import apportion, apportion_naive, count_in_tile, quantile_in_tile, sum_in_tile
from winnow.testing import Picture


def _left(layout, n, b=2, seed=0):
    """A view of n tokens that an earlier method has left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(layout.n_content, generator=generator)[:n].sort().values for _ in range(b)])
    return View(torch.randn(b, n, 4, generator=generator), layout, ids, layout.n_content)


groups = st.lists(st.tuples(st.floats(0, 5), st.integers(0, 9)), min_size=1, max_size=6)


@given(groups, st.integers(0, 40))
def test_apportion_is_what_one_does_on_paper(given_groups, total):
    weights, sizes = [w for w, _ in given_groups], [n for _, n in given_groups]
    found = apportion(total, torch.tensor([weights], dtype=torch.float64), torch.tensor([sizes]))[0].tolist()
    assert sum(found) == min(total, sum(sizes))
    assert all(0 <= k <= n for k, n in zip(found, sizes, strict=True))
    want = apportion_naive(total, weights, sizes)
    assert sum(want) == sum(found)
    # Remainders that are equal but for rounding may go either way.
    assert all(abs(a - b) <= 1 for a, b in zip(found, want, strict=True))


def test_apportion_of_plain_numbers():
    def dealt(total, weights, sizes):
        found = apportion(total, torch.tensor([weights]), torch.tensor([sizes]))[0].tolist()
        assert found == apportion_naive(total, weights, sizes)
        return found

    assert dealt(10, [1.0, 1.0, 2.0], [9, 9, 9]) == [3, 2, 5]
    assert dealt(10, [1.0, 1.0, 8.0], [9, 9, 4]) == [3, 3, 4]
    assert dealt(12, [0.0, 1.0], [9, 9]) == [3, 9]
    assert dealt(99, [0.0, 1.0, 5.0], [9, 9, 2]) == [9, 9, 2]
    assert dealt(3, [0.0, 0.0], [9, 9]) == [2, 1]
    assert dealt(2, [1.0, 1.0, 1.0, 1.0], [9, 0, 9, 9]) == [1, 0, 1, 0]


def test_apportion_of_a_batch_is_that_of_its_items():
    generator = torch.Generator().manual_seed(0)
    weights, sizes = torch.rand(7, 5, generator=generator), torch.randint(0, 30, (7, 5), generator=generator)
    both = apportion(40, weights, sizes)
    assert all(torch.equal(both[i], apportion(40, weights[i : i + 1], sizes[i : i + 1])[0]) for i in range(7))


def test_counts_and_sums_of_what_is_left():
    layout = Picture.tiled(4, 2, 1).lm
    view = _left(layout, 23)
    values = torch.rand(2, 23, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for lane in range(2):
        tiles = layout.tiles[view.ids[lane].numpy()]
        for t in range(3):
            own = torch.from_numpy(tiles == t)
            assert count_in_tile(view)[lane, t] == own.sum()
            assert count_in_tile(view, values > 0.5)[lane, t] == (own & (values[lane] > 0.5)).sum()
            torch.testing.assert_close(sum_in_tile(values, view)[lane, t], values[lane][own].sum())


def test_quantiles_are_those_of_torch_tile_by_tile():
    layout = Picture.tiled(4, 2, 1).lm
    for seed in range(4):
        view = _left(layout, 23, seed=seed)
        values = torch.randn(2, 23, generator=torch.Generator().manual_seed(seed))
        for q in (0.0, 0.25, 0.5, 0.75, 1.0):
            found = quantile_in_tile(values, q, view)
            for lane in range(2):
                tiles = torch.from_numpy(layout.tiles[view.ids[lane].numpy()])
                for t in range(3):
                    torch.testing.assert_close(found[lane, t], values[lane][tiles == t].quantile(q))


def test_quantiles_of_infinite_values_are_infinite():
    view = View.of(torch.zeros(1, 5, 2))
    assert quantile_in_tile(torch.full((1, 5), -torch.inf), 0.25, view).tolist() == [[-torch.inf]]
