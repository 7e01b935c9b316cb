"""What operators write, what requests choose, and which methods vLLM can serve; nothing here needs vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import model_and_processor
from PIL import Image

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.registry import method_class, picture_methods
from winnow.serve.vllm.counts import Counts, counts_of
from winnow.serve.vllm.inputs import batches, of_call, part_of
from winnow.serve.vllm.order import Order
from winnow.serve.vllm.placeholders import marks_of, runs_of
from winnow.serve.vllm.settings import Settings
from winnow.serve.vllm.subject import Subject

SERVED = {
    *("centerclip", "divprune", "evs", "fastervlm", "fastvid", "fopru", "globalcom2", "hiprune", "holov"),
    *("kffocus", "prumerge", "ts-llava"),
    *("token-correlation-compression", "vidcom2", "visionzip", "vispruner", "vtc-cls"),
}


def settings(**given: Any) -> Settings:
    found = Settings.of(SimpleNamespace(winnow=given))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def llava() -> Subject:
    return Subject(model_and_processor("llava")[0].config)


@pytest.fixture(scope="module")
def qwen() -> Subject:
    pytest.importorskip("torchvision", reason="the processor of Qwen-VL needs torchvision: make test-vllm")
    return Subject(model_and_processor("qwen2_5_vl")[0].config)


def test_without_settings_nothing_is_asked_for() -> None:
    assert Settings.of(SimpleNamespace()) is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"budget": 3}, "give an object with plan, plans, least, most"),
        ({"plan": 3}, "give the text of a plan"),
        ({"plans": "divprune"}, "give a list of the texts"),
        ({"least": 0}, "keeps nothing"),
    ],
)
def test_what_an_operator_cannot_write(given: Any, told: str) -> None:
    with pytest.raises(WinnowError, match=told):
        settings(**given)


def test_a_request_chooses_among_the_plans_of_the_operator() -> None:
    own = settings(plan="fastervlm:keep=64", plans=["divprune:keep=32"])
    assert str(own.chosen(None, "keep")) == "fastervlm"  # 64 is its default
    assert str(own.chosen({"keep": 40}, "keep")) == "fastervlm:keep=40"
    assert str(own.chosen("divprune", "compact")) == "divprune:keep=32 | positions=compact"
    assert str(own.chosen({"plan": "divprune:keep=32", "keep": "25%"}, "keep")) == "divprune:keep=25%"
    assert own.chosen(False, "keep") == Plan(())


def test_a_request_cannot_name_a_file_or_another_method() -> None:
    own = settings(plan="divprune:keep=64")
    for plan in ("/etc/passwd", "covipal:weights=/tmp/x", "divprune:keep=1", "hiprune", ["divprune"], {"a": 1}):
        with pytest.raises(WinnowError, match="is not offered"):
            own.chosen({"plan": plan}, "keep")
    with pytest.raises(WinnowError, match="characters"):
        own.chosen({"keep": "1" * 400}, "keep")


def test_bounds_hold_for_what_is_kept() -> None:
    own = settings(plan="divprune:keep=64", least=8, most="50%")
    own.check_kept(8, 64)
    own.check_kept(32, 64)
    for kept in (7, 33, 64):
        with pytest.raises(WinnowError, match="allows 8 to 50%"):
            own.check_kept(kept, 64)


def test_eligible_methods_are_found_by_what_they_do(llava: Subject) -> None:
    served, why = set(), {}
    for entry in filter(lambda entry: entry.family != "user", picture_methods()):
        try:
            llava.bind(Plan.parse(f"{entry.slug} | positions=compact").key)
            served.add(entry.slug)
        except UnsupportedError as error:
            why[entry.slug] = str(error)
    assert served == SERVED
    assert "acts at layers[2]" in why["fastv"]
    assert "reads the question" in why["cdpruner"]
    assert "acts at blocks" in why["tome"]
    assert "acts inside the language model" in why["dycoke"]  # which has a part at the cache, and one without
    llava.bind(Plan.parse("dycoke:p=0 | positions=compact").key)


def test_one_policy_of_positions_for_each_kind_of_model(llava: Subject, qwen: Subject) -> None:
    with pytest.raises(UnsupportedError, match=r"write \| positions=compact"):
        llava.bind(Plan.parse("divprune | positions=keep").key)
    with pytest.raises(UnsupportedError, match=r"write \| positions=keep"):
        qwen.bind(Plan.parse("divprune | positions=compact").key)


def test_counts_are_those_of_the_methods_themselves(qwen: Subject) -> None:
    grid = {"image_grid_thw": torch.tensor([[1, 8, 12]])}
    for text, kept in (("divprune:keep=5", 5), ("divprune:keep=25%", 6), ("hiprune:keep=100", 24)):
        assert counts_of(qwen, qwen.bind(Plan.parse(text).key), grid, (24,)) == Counts((kept,), kept, 24)


def test_newlines_that_stay_do_not_count() -> None:
    model, processor = model_and_processor("llava_next")
    subject, given = (
        Subject(model.config),
        processor.image_processor([Image.new("RGB", (120, 60))], return_tensors="pt"),
    )
    plan = subject.bind(Plan.parse("divprune:keep=6 | positions=compact").key)
    counts = counts_of(subject, plan, {"image_sizes": torch.as_tensor(given["image_sizes"])}, (52,))
    assert counts == Counts((10,), 6, 48)


def test_a_count_that_depends_on_the_picture_is_refused(llava: Subject) -> None:
    plan = llava.bind(Plan.parse("prumerge | positions=compact").key)
    with pytest.raises(UnsupportedError, match="must know the number before the picture is encoded"):
        counts_of(llava, plan, {}, (64,))


def test_all_eligible_methods_announce_what_they_keep(llava: Subject) -> None:
    for slug in sorted(SERVED):
        method: Method = method_class(slug).configured(keep=9)
        plan = llava.bind(Plan((method,), positions="compact").key)
        assert counts_of(llava, plan, {}, (64,)).kept == (9,), slug


def test_pictures_of_one_plan_are_encoded_together_up_to_a_bound() -> None:
    orders = [Order(plan, (size,), (1,)) for plan, size in (("a", 40), ("b", 10), ("a", 60), ("a", 1), ("a", 200))]
    assert list(batches(orders, 100)) == [[0, 2], [3], [4], [1]]


def test_parts_of_a_call() -> None:
    grid = torch.tensor([[1, 2, 2], [1, 2, 4], [1, 4, 4]])
    call = {"pixel_values": torch.arange(28), "image_grid_thw": grid}
    part = part_of(call, [0, 2], 3)
    assert part["pixel_values"].tolist() == [*range(4), *range(12, 28)]
    assert part["image_grid_thw"].tolist() == grid[[0, 2]].tolist()
    tiles = {"pixel_values": [torch.zeros(1), torch.ones(2), torch.zeros(3)], "image_sizes": torch.zeros(3, 2)}
    assert [len(x) for x in part_of(tiles, [1], 3)["pixel_values"]] == [2]


def test_videos_are_encoded_one_by_one() -> None:
    orders = [Order(plan, (9,), (1,), "video") for plan in ("a", "b", "a")]
    assert list(batches(orders, 100)) == [[0], [2], [1]]
    grid = torch.tensor([[2, 2, 2], [1, 2, 4]])
    call = {"pixel_values_videos": torch.arange(16), "video_grid_thw": grid, "second_per_grid_ts": torch.ones(2)}
    part = part_of(call, [1], 2)
    assert part["pixel_values_videos"].tolist() == [*range(8, 16)]
    assert part["video_grid_thw"].tolist() == [[1, 2, 4]]
    assert part["second_per_grid_ts"].shape == (1,)
    frames = part_of({"pixel_values_videos": [torch.zeros(n, 3, 4, 4) for n in (2, 3)]}, [1], 2)
    assert of_call(frames)["pixel_values_videos"].shape == (1, 3, 3, 4, 4)


@pytest.mark.parametrize(
    "order",
    [
        Order("v2|divprune", (4, 4), (1, 2)),
        Order("v2|divprune", (4, 4), (3,), "video"),
        Order("v2|divprune", (4, 4), (3,), "video", ((7, 8), (), (9,))),
    ],
)
def test_an_order_travels(order: Order) -> None:
    assert Order.decoded(order.encoded()) == order


def test_what_stands_for_a_video_in_a_prompt() -> None:
    tokens = [5, 1, 3, 3, 4, 6, 1, 3, 3, 4]
    content = SimpleNamespace(full=tokens, is_embed=lambda full: torch.tensor(full) == 3)
    assert runs_of(content) == (2, 2)
    assert marks_of(content) == ((5, 1), (4, 6, 1), (4,))
    assert marks_of(SimpleNamespace(full=[3] * 4, is_embed=None)) == ()


@pytest.mark.parametrize("slug", ["divprune", "evs", "vidcom2", "fastvid", "hiprune"])
def test_counts_of_a_video_are_those_of_the_methods_themselves(qwen: Subject, slug: str) -> None:
    grid = {"video_grid_thw": torch.tensor([[3, 8, 12]])}
    plan = qwen.bind(Plan.parse(f"{slug}:keep=25%").key)
    for runs in ((72,), (24, 24, 24)):  # unbroken, and with text between frames
        assert counts_of(qwen, plan, grid, runs, "video") == Counts((18,), 18, 72)


def test_a_plan_that_chooses_frames_cannot_count_those_of_a_video(qwen: Subject) -> None:
    grid = {"video_grid_thw": torch.tensor([[3, 8, 12]])}
    with pytest.raises(UnsupportedError, match="vLLM has chosen them before"):
        counts_of(qwen, qwen.bind(Plan.parse("kffocus:keep=8").key), grid, (72,), "video")


def test_classes_whose_videos_can_be_served(llava: Subject, qwen: Subject) -> None:
    assert qwen.takes("video")
    assert not llava.takes("video")
    assert Subject(model_and_processor("llava_onevision")[0].config).takes("video")
    assert Subject(model_and_processor("internvl")[0].config).takes("video")  # whose frames vLLM gives as one video
    assert not Subject(model_and_processor("smolvlm")[0].config).takes("video")  # of which vLLM has no video


def test_a_picture_of_another_size_has_other_counts(qwen: Subject) -> None:
    processor = model_and_processor("qwen2_5_vl")[1]
    plan = qwen.bind(Plan.parse("divprune:keep=50%").key)
    found = []
    for size in ((112, 112), (112, 224)):
        inputs = processor.image_processor(images=[Image.new("RGB", size)], return_tensors="pt")
        tokens = int(inputs["image_grid_thw"].prod()) // 4
        found.append((tokens, counts_of(qwen, plan, {"image_grid_thw": inputs["image_grid_thw"]}, (tokens,)).content))
    assert found == [(16, 8), (32, 16)]
