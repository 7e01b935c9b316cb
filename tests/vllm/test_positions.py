"""Positions of kept tokens are exact: behind portrait pictures, and in bfloat16. vLLM's own pruning fails at both."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from asking import Case, Library, answers

PLANS = ("divprune:keep=5", "fastervlm:keep=6")
TALL, WIDE = (3, 56, 224), (4, 224, 56)


@pytest.fixture
def model(vllm: Any) -> Any:
    """The positions of a served Qwen2.5-VL, without an engine."""
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

    from winnow.serve.vllm.positions import KeptPositions

    class Served(KeptPositions, Qwen2_5_VLForConditionalGeneration):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
            self.config = SimpleNamespace(
                vision_config=vision, vision_start_token_id=1, image_token_id=2, video_token_id=3,
                get_text_config=lambda: SimpleNamespace(hidden_size=8),
            )  # fmt: skip
            self.winnow, self._relative = object(), {}

    return Served()


def feature(grid: tuple[int, int, int], offset: int, kept: int) -> Any:
    """A picture in a prompt of vLLM, of which `kept` placeholders are left."""
    from vllm.multimodal.inputs import (
        MultiModalBatchedField,
        MultiModalFeatureSpec,
        MultiModalFieldElem,
        MultiModalKwargsItem,
        PlaceholderRange,
    )

    from winnow.serve.vllm.order import FIELD, Order

    order = Order("", (grid[1] * grid[2] // 4,), (kept,))
    data = {"image_grid_thw": torch.tensor(grid), FIELD: order.encoded()}
    elements = {name: MultiModalFieldElem(data=x, field=MultiModalBatchedField()) for name, x in data.items()}
    place = PlaceholderRange(offset=offset, length=kept)
    return MultiModalFeatureSpec(
        data=MultiModalKwargsItem(elements), modality="image", identifier="", mm_position=place
    )


@pytest.mark.parametrize(("height", "width"), [(24, 8), (8, 24)])
def test_text_behind_a_picture_goes_on_at_its_longer_side(model: Any, height: int, width: int) -> None:
    tokens = [9, 1, *[2] * 5, 7, 9]
    positions, delta = model.get_mrope_input_positions(tokens, [feature((1, height, width), 2, 5)])
    behind = 2 + max(height, width) // 2
    assert positions[:, :2].tolist() == [[0, 1]] * 3
    assert positions[:, 2:7].eq(2).all()
    assert positions[:, 7:].tolist() == [[behind, behind + 1]] * 3
    assert delta == behind + 2 - len(tokens)


def test_two_pictures_side_by_side(model: Any) -> None:
    tokens = [1, *[2] * 3, *[2] * 4, 9]
    pictures = [feature((1, 8, 4), 1, 3), feature((1, 4, 12), 4, 4)]
    positions, _ = model.get_mrope_input_positions(tokens, pictures)
    assert positions[0].tolist() == [0, 1, 1, 1, 5, 5, 5, 5, 11]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_positions_travel_exactly(model: Any, dtype: torch.dtype) -> None:
    grid = torch.tensor([[1, 2, 2 * 700]])  # 700 columns; bfloat16 is exact to 256
    kept = torch.tensor([0, 255, 257, 301, 699])
    rows = torch.randn(5, 8, dtype=dtype)
    sent = model._placed(rows, [kept], {"image_grid_thw": grid}, 0)
    start = torch.full((3, 7), 4)
    start[:, 0] = 3
    ids = [1, *[2] * 5, 9]
    for _ in range(2):  # a second time, as after a preemption
        (back,), start, _ = model.recompute_mrope_positions(ids, [sent], start, 0)
        assert torch.equal(back, rows)
        assert start[2, 1:6].tolist() == (kept + 4).tolist()
        assert start[:2, 1:6].eq(4).all()


@pytest.mark.parametrize("by_runner", [False, True], ids=["forward", "runner"])
def test_portrait_pictures_in_chunks_equal_the_library(engine: Any, by_runner: bool) -> None:
    """Both ways in which vLLM's runners take positions; the flag of the second one is not set on CPUs."""
    name = "qwen2_5_vl"
    cases = [
        Case("@ what is left of @ and @ ?", (TALL, WIDE, TALL), plan)
        for plan in (None, *PLANS)
    ]  # fmt: skip
    cases += [Case("@ what is in the picture ?", (TALL,), plan) for plan in (None, *PLANS)]
    library = Library(name)
    wanted = [library.answer(case) for case in cases]
    llm = engine(name, {"plans": list(PLANS)}, max_num_batched_tokens=16, enable_chunked_prefill=True)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    runner.is_multimodal_pruning_enabled = by_runner
    assert [answers(llm, [case.request(name)])[0] for case in cases] == wanted
    assert answers(llm, [case.request(name) for case in cases]) == wanted
