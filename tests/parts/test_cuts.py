"""Where cuts are made and how many tokens they leave."""

from __future__ import annotations

import pytest

from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.parts.cuts import check_cuts, cuts_of, geometric, stretched

PUBLISHED = tuple(Budget(share, rounding="floor") for share in ("87.5%", "62.5%", "12.5%"))


@pytest.mark.parametrize("layers", [(1, 2), (1, 1, 2), (3, 2, 4), (0, 1, 2)])
def test_layers_that_are_refused(layers):
    with pytest.raises(WinnowError, match="allowed: 3 ascending layers from 1"):
        check_cuts("method", layers, PUBLISHED, 3)


def test_other_numbers_of_budgets_need_layers():
    with pytest.raises(WinnowError, match="2 budgets without layers; allowed: 3"):
        check_cuts("method", None, PUBLISHED[1:], 3)
    check_cuts("method", (4, 7), PUBLISHED[1:], 3)
    check_cuts("method", None, PUBLISHED, 3)


@pytest.mark.parametrize(("depth", "found"), [(32, [7, 9, 12]), (28, [6, 7, 10]), (8, [1, 2, 3]), (4, [1]), (2, [1])])
def test_cuts_at_shares_of_the_depth(depth, found):
    cuts = cuts_of(ModelInfo(depth=depth), None, (7 / 32, 9 / 32, 12 / 32), PUBLISHED)
    assert list(cuts) == found
    assert list(cuts.values())[-1] == PUBLISHED[-1]


def test_layers_that_are_given_hold():
    assert list(cuts_of(ModelInfo(depth=9), (2, 8), (), PUBLISHED[1:])) == [2, 8]
    with pytest.raises(WinnowError, match="9 LM layers"):
        cuts_of(ModelInfo(depth=9), (2, 9), (), PUBLISHED[1:])


@pytest.mark.parametrize("content", [25, 256, 576, 2880])
@pytest.mark.parametrize("budget", [1, 13, 64, 320, "12.5%", "3%"])
def test_the_last_cut_leaves_the_budget(budget, content):
    for cuts in (geometric(budget, content, 3, "floor"), stretched(budget, content, PUBLISHED)):
        counts = [cut.of(content) for cut in cuts]
        assert counts[-1] == Budget(budget, rounding="floor").of(content)
        assert counts == sorted(counts, reverse=True)


def test_published_schedules():
    assert [cut.of(576) for cut in geometric("12.5%", 576, 3, "floor")] == [288, 144, 72]
    assert [cut.of(576) for cut in stretched("12.5%", 576, PUBLISHED)] == [504, 360, 72]
    assert [cut.of(576) for cut in stretched(72, 576, PUBLISHED)] == [504, 360, 72]
    everything = tuple(Budget("100%") for _ in range(3))
    assert [cut.of(80) for cut in stretched("25%", 80, everything)] == [80, 80, 20]


def test_a_budget_that_may_leave_nothing():
    for cuts in (geometric(Budget(0, allow_empty=True), 100, 3, "floor"), stretched("0%?", 100, PUBLISHED)):
        counts = [cut.of(100) for cut in cuts]
        assert counts[-1] == 0
        assert min(counts[:-1]) >= 1
