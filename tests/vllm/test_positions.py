"""Positions of kept tokens are exact: behind portrait pictures, and in bfloat16. vLLM's own pruning fails at both."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from asking import Case, Library, answers

from winnow.core.errors import WinnowError

PLANS = ("divprune:keep=5", "fastervlm:keep=6")
TALL, WIDE = (3, 56, 224), (4, 224, 56)


START, END, IMAGE, VIDEO, TEXT = 1, 4, 2, 3, 9


def served(plain: Any) -> Any:
    """The positions of a served Qwen-VL, without an engine."""
    from winnow.serve.vllm.positions import KeptPositions

    class Served(KeptPositions, plain):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
            self.config = SimpleNamespace(
                vision_config=vision, vision_start_token_id=START, vision_end_token_id=END, image_token_id=IMAGE,
                video_token_id=VIDEO, get_text_config=lambda: SimpleNamespace(hidden_size=8),
            )  # fmt: skip
            self.winnow, self._relative = object(), {}
            self.words = torch.nn.Embedding(16, 8).requires_grad_(False)

        def get_language_model(self) -> Any:
            return SimpleNamespace(embed_input_ids=self.words)

    return Served()


@pytest.fixture
def model(vllm: Any) -> Any:
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

    return served(Qwen2_5_VLForConditionalGeneration)


def feature(data: dict[str, Any], offset: int, length: int, order: Any = None, is_embed: Any = None) -> Any:
    """A picture or a video in a prompt of vLLM.

    Args:
        order: None: as vLLM has it.
    """
    from vllm.multimodal.inputs import (
        MultiModalBatchedField,
        MultiModalFeatureSpec,
        MultiModalFieldElem,
        MultiModalKwargsItem,
        PlaceholderRange,
    )

    from winnow.serve.vllm.order import FIELD

    data = data if order is None else data | {FIELD: order.encoded()}
    elements = {name: MultiModalFieldElem(data=x, field=MultiModalBatchedField()) for name, x in data.items()}
    return MultiModalFeatureSpec(
        data=MultiModalKwargsItem(elements),
        modality="video" if "video_grid_thw" in data else "image",
        identifier="",
        mm_position=PlaceholderRange(offset=offset, length=length, is_embed=is_embed),
    )


def shown(grid: tuple[int, int, int], offset: int, kept: int) -> Any:
    """A picture of which `kept` placeholders are left."""
    from winnow.serve.vllm.order import Order

    order = Order("", (grid[1] * grid[2] // 4,), (kept,))
    return feature({"image_grid_thw": torch.tensor(grid)}, offset, kept, order)


def moved(model: Any, ids: list[int], sent: list[torch.Tensor], positions: torch.Tensor) -> torch.Tensor:
    """Positions that the runner has of a prompt, after a step of all of it, and again as after a preemption."""
    for _ in range(2):
        rows, positions, delta = model.recompute_mrope_positions(ids, sent, positions, 0)
        assert [len(own) for own in rows] == [len(own) for own in sent]
        assert delta == int(positions[0, -1]) + 1 - len(ids)
    return positions


@pytest.mark.parametrize(("height", "width"), [(24, 8), (8, 24)])
def test_text_behind_a_picture_goes_on_at_its_longer_side(model: Any, height: int, width: int) -> None:
    tokens = [9, 1, *[2] * 5, 7, 9]
    positions, delta = model.get_mrope_input_positions(tokens, [shown((1, height, width), 2, 5)])
    behind = 2 + max(height, width) // 2
    assert positions[:, :2].tolist() == [[0, 1]] * 3
    assert positions[:, 2:7].eq(2).all()
    assert positions[:, 7:].tolist() == [[behind, behind + 1]] * 3
    assert delta == behind + 2 - len(tokens)


def test_two_pictures_side_by_side(model: Any) -> None:
    tokens = [1, *[2] * 3, *[2] * 4, 9]
    pictures = [shown((1, 8, 4), 1, 3), shown((1, 4, 12), 4, 4)]
    positions, _ = model.get_mrope_input_positions(tokens, pictures)
    assert positions[0].tolist() == [0, 1, 1, 1, 5, 5, 5, 5, 11]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_positions_travel_exactly(model: Any, dtype: torch.dtype) -> None:
    from winnow.serve.vllm.order import Order
    from winnow.serve.vllm.subject import Shortened

    grid = torch.tensor([[1, 2, 2 * 700]])  # 700 columns; bfloat16 is exact to 256
    kept = torch.tensor([0, 255, 257, 301, 699])
    rows = torch.randn(5, 8, dtype=dtype)
    sent = model._placed(Shortened(5, rows, kept, kept), Order("", (700,), (5,)), {"image_grid_thw": grid}, 0)
    start = torch.full((3, 7), 4)
    start[:, 0], start[:, 6] = 3, 704
    ids = [START, *[IMAGE] * 5, TEXT]
    (back,), _, _ = model.recompute_mrope_positions(ids, [sent], start, 0)
    assert torch.equal(back, rows)
    found = moved(model, ids, [sent], start)
    assert found[2, 1:6].tolist() == (kept + 4).tolist()
    assert found[:2, 1:6].eq(4).all()


def test_positions_that_cannot_travel_are_refused(vllm: Any) -> None:
    from winnow.serve.vllm.positions import as_channels

    with pytest.raises(WinnowError, match="give vLLM fewer frames"):
        as_channels(torch.tensor([[0, 0, 2**15]]), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seconds", [0.4, 1.0, 200.0])
def test_kept_tokens_of_a_video_have_the_positions_of_the_whole(model: Any, seconds: float, dtype: torch.dtype) -> None:
    """Also where a video lasts longer than its frames are wide, and several lie side by side."""
    from winnow.serve.vllm.order import Order
    from winnow.serve.vllm.subject import Shortened

    grids = [(5, 4, 6), (3, 8, 4)]
    data = [{"video_grid_thw": torch.tensor(own), "second_per_grid_ts": torch.tensor(seconds)} for own in grids]
    kept = [torch.tensor([0, 1, 7, 15, 29]), torch.tensor([2, 9, 18])]  # some as far along time as along height
    whole = [30, 24]
    full = [TEXT, START, *[VIDEO] * 30, *[VIDEO] * 24, END, TEXT, TEXT]
    plain = [feature(data[0], 2, 30), feature(data[1], 32, 24)]
    wanted, _ = super(type(model), model).get_mrope_input_positions(full, plain)
    stay = [0, 1, *(2 + kept[0]).tolist(), *(32 + kept[1]).tolist(), 56, 57, 58]

    ids = [TEXT, START, *[VIDEO] * 8, END, TEXT, TEXT]
    orders = [Order("", (n,), (len(own),), "video") for n, own in zip(whole, kept, strict=True)]
    features = [feature(data[0], 2, 5, orders[0]), feature(data[1], 7, 3, orders[1])]
    positions, delta = model.get_mrope_input_positions(ids, features)
    sent = [
        model._placed(
            Shortened(len(own), torch.randn(len(own), 8, dtype=dtype), own, own),
            order,
            {name: x[None] for name, x in given.items()},
            0,
        )
        for own, order, given in zip(kept, orders, data, strict=True)
    ]
    assert delta == int(wanted.max()) + 1 - len(ids)
    assert moved(model, ids, sent, positions).tolist() == wanted[:, stay].tolist()


def test_text_between_frames_stands_before_the_tokens_that_are_kept_of_them(vllm: Any) -> None:
    from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

    from winnow.serve.vllm.order import Order
    from winnow.serve.vllm.subject import Shortened

    model = served(Qwen3VLForConditionalGeneration)
    times = [(5,), (6, 7), (8,)]  # ids of the text before each frame
    marks = [(*times[0], START), (END, *times[1], START), (END, *times[2], START), (END,)]
    video = [*marks[0], *[VIDEO] * 6, *marks[1], *[VIDEO] * 6, *marks[2], *[VIDEO] * 6, *marks[3]]
    full = [TEXT, START, *video, END, TEXT]
    data = {"video_grid_thw": torch.tensor((3, 4, 6))}
    embedded = torch.tensor(video) == VIDEO
    whole = feature(data, 2, len(video), is_embed=embedded)
    wanted, _ = super(type(model), model).get_mrope_input_positions(full, [whole])

    kept = torch.tensor([1, 4, 12, 17])  # nothing of the second frame
    order = Order("", (6, 6, 6), (4,), "video", tuple(marks))
    left = (~embedded).clone()
    left[embedded.nonzero()[:, 0][kept]] = True
    stay = left.nonzero()[:, 0]
    ids = [TEXT, START, *[VIDEO] * len(stay), END, TEXT]
    positions, _ = model.get_mrope_input_positions(ids, [feature(data, 2, len(stay), order)])
    rows = torch.randn(4, 8 + 16)  # with those of two deepstack layers
    given = {name: x[None] for name, x in data.items()}
    sent = model._placed(Shortened(4, rows, kept, kept), order, given, 0)
    at = [0, 1, *(2 + stay).tolist(), len(full) - 2, len(full) - 1]
    assert moved(model, ids, [sent], positions).tolist() == wanted[:, at].tolist()

    (back,), _, _ = model.recompute_mrope_positions(ids, [sent], positions, 0)
    text = ~embedded[stay]
    assert torch.equal(back[~text], rows)
    assert torch.equal(back[text][:, :8], model.words(torch.tensor(video)[stay][text]))
    assert back[text][:, 8:].eq(0).all()


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
