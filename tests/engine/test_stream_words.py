"""Streams of pictures and questions in words, as the processor of the shipped model writes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import winnow
from winnow.core.errors import WinnowError
from winnow.engine.engine import is_compressed
from winnow.models.inputs import prompt
from winnow.world import scene

PLAN = "divprune:keep=32 + streaming-llm:keep=300"
QUESTION = "is there a ring?"


@pytest.fixture(scope="module")
def reference():
    return winnow.load()


@pytest.fixture(scope="module")
def pictures():
    return [scene(i, split="test").image for i in range(4)]


@pytest.fixture
def read(reference):
    """All tokens that the model is given, in order."""
    model, found = reference[0], []
    hook = model.register_forward_pre_hook(lambda m, a, k: found.append(k["input_ids"]), with_kwargs=True)
    yield found
    hook.remove()


def whole(reference, pictures):
    """One prompt with all pictures and a question."""
    text = prompt(reference[1], QUESTION, count=len(pictures))
    return reference[1](images=pictures, text=text, return_tensors="pt")


def test_what_is_read_is_the_message_that_the_template_writes(reference, pictures, read):
    model, processor = reference
    with winnow.stream(model, PLAN, processor) as session:
        session.feed(pictures[0])
        session.feed(pictures[1:])
        session.ask(QUESTION, max_new_tokens=1)
    assert torch.equal(torch.cat(read, 1), whole(reference, pictures)["input_ids"])


def test_an_answer_in_full_is_that_of_the_plain_model(reference, pictures):
    model, processor = reference
    inputs = whole(reference, pictures[:2])
    with torch.no_grad():
        want = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    with winnow.stream(model, "full", processor, bounded=False) as session:
        session.feed(pictures[:2])
        answer = session.ask(QUESTION, max_new_tokens=4)
    assert answer == processor.tokenizer.decode(want, skip_special_tokens=True).strip()
    assert answer in ("yes", "no")


def test_frames_are_pictures_or_bytes(reference, pictures, read):
    model, processor = reference
    pixels = np.asarray(pictures[0].convert("RGB"))
    found = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda m, a, k: found.append((a, k)), with_kwargs=True)
    with winnow.stream(model, PLAN, processor) as session:
        for frame in (pictures[0], pixels, torch.from_numpy(pixels.copy())):
            session.feed(frame)
        assert session.ledger.frames == 3
    hook.remove()
    shown = [args[0] if args else kwargs["pixel_values"] for args, kwargs in found]
    assert all(torch.equal(x, shown[0]) for x in shown)


def test_each_frame_is_stamped_with_its_time(reference, pictures, read):
    model, processor = reference
    with winnow.stream(model, PLAN, processor, stamp="{time:.0f} ") as session:
        with pytest.raises(WinnowError, match="writes the time of each frame"):
            session.feed(pictures[0])
        session.feed(pictures[:2], time=[1.0, 2.0])
        assert session.ledger.time == 2.0
        words = [processor.tokenizer(text, add_special_tokens=False).input_ids for text in ("1 ", "2 ")]
    for ids, own in zip(read, words, strict=True):
        first = (ids[0] == model.config.image_token_id).nonzero()[0]
        assert ids[0, int(first) - len(own) : int(first)].tolist() == own


BAD_FRAMES = {
    "a path": "frame.png",
    "nothing": [],
    "floats": np.zeros((4, 4, 3), np.float32),
    "grey bytes": np.zeros((4, 4), np.uint8),
    "channels first": torch.zeros(3, 8, 8, dtype=torch.uint8),
    "no pixels": np.zeros((0, 4, 3), np.uint8),
    "one that is none": [Image.new("RGB", (8, 8)), None],
}


@pytest.mark.parametrize("what", BAD_FRAMES)
def test_what_is_no_picture_is_refused(reference, pictures, what):
    model, processor = reference
    with winnow.stream(model, PLAN, processor) as session:
        session.feed(pictures[0])
        with pytest.raises(WinnowError, match=r"PIL picture|empty list"):
            session.feed(BAD_FRAMES[what])
        assert session.ledger.frames == 1


@pytest.mark.parametrize(("question", "says"), [("", "empty"), (7, "is text"), ("<image>", "control token")])
def test_what_is_no_question_is_refused(reference, pictures, question, says):
    model, processor = reference
    with winnow.stream(model, PLAN, processor) as session:
        session.feed(pictures[0])
        with pytest.raises(WinnowError, match=says):
            session.ask(question)
        assert session.ledger.questions == 0


@pytest.mark.parametrize("stamp", ["at ", "{when}", "{time", 5])
def test_a_stamp_holds_the_time(reference, stamp):
    with pytest.raises(WinnowError, match="stamp="):
        winnow.stream(reference[0], PLAN, reference[1], stamp=stamp)
    with pytest.raises(WinnowError, match="needs processor="):
        winnow.stream(reference[0], PLAN, stamp="{time}")
    assert not is_compressed(reference[0])
