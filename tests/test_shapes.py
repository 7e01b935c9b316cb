"""Shapes in annotations are promises: while the tests run, a tensor of another shape is an error (see conftest.py)."""

from __future__ import annotations

import itertools
import os

import pytest
import shapes
import torch
from jaxtyping import Bool, Float, Int, Num, Shaped, TypeCheckError
from jaxtyping._storage import get_shape_memo, pop_shape_memo, push_shape_memo
from shapes import promises_a_shape
from torch import Tensor

from winnow.core.layout import Layout
from winnow.core.select import ranked, top_k
from winnow.core.view import View
from winnow.engine.packed import packed_segments
from winnow.parts.cosine import product
from winnow.parts.merge import strided_clusters
from winnow.signals.attention import attention_rows

pytestmark = pytest.mark.skipif(
    os.environ.get("WINNOW_CHECK_SHAPES") == "0", reason="WINNOW_CHECK_SHAPES=0 switches the checks off"
)


def view():
    layout = Layout.grid(1, 5)
    return View(torch.rand(2, 5, 8), layout, torch.zeros(2, 4, dtype=torch.int64), 5)  # ids of another length


@pytest.mark.parametrize(
    "call",
    [
        lambda: top_k(torch.rand(3), 1),  # no axis of items
        lambda: ranked(torch.zeros(1, 3, dtype=torch.int64)),  # not a floating dtype
        view,
        lambda: product([torch.rand(3, 8)], [torch.rand(4)]),
        lambda: attention_rows(torch.rand(1, 2, 1, 8), torch.rand(2, 5, 8), 1.0),
        lambda: strided_clusters(torch.zeros(5, dtype=torch.int64), [torch.rand(6, 8)], 1),
    ],
    ids=["axis", "dtype", "dataclass", "parts", "signals", "parts-merge"],
)
def test_a_tensor_of_another_shape_is_an_error(call):
    with pytest.raises(TypeCheckError):
        call()


Rows = Float[torch.Tensor, "b n"]


def test_a_promise_by_another_name_is_one():
    def named(x: Rows) -> None: ...
    def result() -> tuple[Rows, int]: ...
    def none(x: torch.Tensor, n: int) -> list[int]: ...

    assert [promises_a_shape(function) for function in (named, result, none)] == [True, True, False]


KINDS = [
    kind[Tensor, axes]
    for kind in (Float, Int, Bool, Num, Shaped)
    for axes in ("b n", "b b", "2 n", " n", "", "_ n", "b *rest n", "... n", "b 3 #n", "n+1 n")
] + [Float[torch.nn.Parameter, "b n"]]
TENSORS = [
    torch.zeros(sizes, dtype=dtype)
    for sizes in ((), (3,), (2, 3), (3, 3), (4, 3), (2, 3, 1))
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool)
] + [torch.nn.Parameter(torch.zeros(2, 3)), "no tensor"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_found_faster_is_what_jaxtyping_finds(kind):
    """With the same sizes of axes known before, and the same known behind it."""
    for thing, n in itertools.product(TENSORS, (None, 2, 3)):
        found = []
        for way in (shapes.in_full, shapes.has_shape):
            push_shape_memo({})[0].update({} if n is None else {"n": n})
            try:
                said = way(kind, thing)
            except Exception as error:
                said = type(error)
            found.append((said, get_shape_memo()[:2]))
            pop_shape_memo()
        assert found[0] == found[1], (thing, n)


def test_the_right_shapes_pass():
    assert top_k(torch.rand(2, 3), 1).m == 1
    assert packed_segments(torch.arange(4)[None], None) is None


def test_a_result_of_another_shape_is_an_error():
    """Positions are rows of a batch; of a single row without its axis, segments would come without it."""
    with pytest.raises(TypeCheckError, match="return"):
        packed_segments(torch.tensor([0, 1, 0, 1]), type("Config", (), {"_attn_implementation": "sdpa"}))
