"""Several pictures: what is said is what the model itself says, and the cache is cut where it should be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import winnow
from winnow import reference
from winnow.bench.encodings import Encodings, _digest
from winnow.bench.recall_pictures import conversation, measure_pictures
from winnow.core.errors import WinnowError
from winnow.world.albums import album


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    torch.set_num_threads(1)
    return reference.load()


def test_a_conversation_has_a_turn_for_each_picture_and_one_for_the_question(loaded: Any) -> None:
    drawn = album(0, 3)
    ask = drawn.question.text
    for task, images in (("turns", [1, 1, 1, 0]), ("frames", [3, 0])):
        for aware in (True, False):
            pieces = conversation(loaded[1], drawn, task, aware)
            assert [len(own) for _, own in pieces] == images
            assert [text.count("<image>") for text, _ in pieces] == images
            assert [ask in text for text, _ in pieces[:-1]] == [aware] * (len(pieces) - 1)
            if aware:
                assert all(text.startswith(("<s>USER: ", "</s>USER: ", "USER: ")) for text, _ in pieces)
                assert all(f"USER: {ask} <image>" in text for text, _ in pieces[:-1])
            assert pieces[-1][0].endswith(f"USER: {ask} ASSISTANT:")


@pytest.mark.parametrize("task", ["turns", "frames"])
def test_without_a_plan_it_is_what_generate_says_to_the_whole_conversation(loaded: Any, task: Any) -> None:
    model, processor = loaded
    drawn = album(1, 2)
    (answer,) = measure_pictures(model, processor, "full", task, 1, 2, seed=1)
    pieces = conversation(processor, drawn, task, False)
    whole = "".join(text for text, _ in pieces)
    inputs = processor(text=whole, images=[image for _, own in pieces for image in own], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer.said == reference.decode(processor, ids[0, inputs["input_ids"].shape[1] :])
    assert (answer.place, answer.truth) == (drawn.place, drawn.question.answer)


def test_the_cache_is_cut_behind_each_turn_or_once(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget of 40 slots of each head: behind each piece that is what is left, however many pictures it holds."""
    model, processor = loaded
    held = []
    for task in ("turns", "frames"):
        seen: list[int] = []

        def after(module: Any, args: Any, output: Any, seen: list[int] = seen) -> None:
            seen.append(output.past_key_values.layers[0].store.length)

        hook = model.register_forward_hook(after)
        measure_pictures(model, processor, "snapkv:keep=40,window=8", task, 1, 2, max_new_tokens=1)
        hook.remove()
        held.append(seen)
    assert held[0][:3] == [40, 40, 40]
    assert held[1][:2] == [40, 40]
    assert winnow.handle_of(model) is None


def test_one_picture_is_answered_for_and_none_is_not(loaded: Any) -> None:
    model, processor = loaded
    asked = measure_pictures(model, processor, None, "turns", 24, 1)
    blind = measure_pictures(model, processor, None, "turns", 24, 1, blind=True)
    assert sum(answer.right for answer in asked) > sum(answer.right for answer in blind) + 6


def test_what_cannot_be_measured_is_refused(loaded: Any) -> None:
    model, processor = loaded
    with pytest.raises(WinnowError, match="turns, frames"):
        measure_pictures(model, processor, None, "novel")  # type: ignore[arg-type]
    with pytest.raises(WinnowError, match="at least 1 album"):
        measure_pictures(model, processor, None, "turns", 0)
    _, other = reference.load()
    other.chat_template = "{{ messages[0]['role'] }}"
    with pytest.raises(WinnowError, match="does not write a conversation"):
        measure_pictures(model, other, None, "turns", 1)


@pytest.mark.parametrize("task", ["turns", "frames"])
def test_pictures_that_were_encoded_before_give_the_same_answers(loaded: Any, task: Any) -> None:
    model, processor = loaded
    plans = ("full", "snapkv:keep=40,window=8", "adakv:base=snapkv,keep=40")
    alone = [measure_pictures(model, processor, plan, task, 2, 2) for plan in plans]
    kept, encoded = Encodings(), list[int]()
    hook = model.base_model.vision_tower.register_forward_hook(lambda *_: encoded.append(1))
    assert [measure_pictures(model, processor, plan, task, 2, 2, kept=kept) for plan in plans] == alone
    once = len(encoded)
    for plan in plans:
        measure_pictures(model, processor, plan, task, 2, 2, True, kept=kept)
    hook.remove()
    assert len(encoded) == once == (8 if task == "turns" else 4)  # by the plain model, and once for all plans


def test_equal_pixels_of_pictures_of_other_sizes_are_encoded_apart() -> None:
    pixels = torch.zeros(1, 3, 4, 4)
    wide, high = ({"pixel_values": pixels, "image_sizes": torch.tensor([size])} for size in ((4, 8), (8, 4)))
    assert _digest(wide) != _digest(high)
    assert _digest(wide) == _digest({name: x.clone() for name, x in wide.items()})
