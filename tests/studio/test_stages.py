"""What the page is told of the tokens, on maps worked by hand."""

from __future__ import annotations

import numpy as np
import torch

from winnow.core.layout import Layout
from winnow.core.ledger import ItemLedger
from winnow.core.reduction import Reduction
from winnow.studio.stages import at_layers, stages


def item(*reductions: tuple[str, str, Reduction]) -> ItemLedger:
    return ItemLedger(0, "image", Layout.grid(2, 3), 6, list(reductions))


def test_a_selection_behind_a_merge():
    merge = Reduction.assign(torch.tensor([0, 0, 1, 1, -1, 2]), m=3, representative=torch.tensor([0, 3, 5]))
    later = Reduction.select(torch.tensor([1, 2]), 3)
    matters = np.array([False, False, True, True, False, False])
    first, merged, last = stages(item(("projected", "a", merge), ("layers[1]", "b", later)), matters)
    assert first["owner"] == first["kept"] == [0, 1, 2, 3, 4, 5]
    assert (first["left"], first["recall"]) == (6, 1.0)
    assert (merged["point"], merged["method"], merged["left"]) == ("projected", "a", 3)
    assert merged["kept"] == [0, 3, 5]
    assert merged["owner"] == [0, 0, 3, 3, -1, 5]
    assert merged["recall"] == 0.5
    assert last["kept"] == [3, 5]
    assert last["owner"] == [-1, -1, 3, 3, -1, 5]


def test_layers_read_what_the_steps_before_them_left():
    select = Reduction.select(torch.arange(3), 3)
    found = item(("projected", "a", Reduction.select(torch.arange(3), 6)), ("layers[2]", "b", select))
    assert at_layers(found, 4) == [1, 1, 2, 2]
    assert at_layers(item(), 2) == [0, 0]


def test_a_mixture_belongs_to_the_row_that_it_weighs_most_in():
    matrix = torch.tensor([[0.7, 0.1, 0.2, 0.0, 0.0, 0.0], [0.1, 0.3, 0.0, 0.6, 0.0, 0.0]])
    found = stages(item(("projected", "a", Reduction.mix(matrix))), None)[1]
    assert found["kept"] == [0, 3]
    assert found["owner"] == [0, 3, 0, 3, -1, -1]
    assert found["recall"] is None


def test_an_output_without_a_source_is_nothing_of_the_picture():
    cluster = torch.tensor([1, -1, -1, -1, -1, -1])
    found = stages(item(("features", "a", Reduction.assign(cluster, m=2))), None)[1]
    assert (found["left"], found["kept"], found["owner"]) == (2, [0], [0, -1, -1, -1, -1, -1])
