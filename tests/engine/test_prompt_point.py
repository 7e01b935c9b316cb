"""The point `prompt`: a step says which pictures of a request enter, and the ledger says which did."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import zoo
from cases import TURN, prolonged
from picture_processors import QUESTION, QwenProcessor, Told, asked, inputs_of
from PIL import Image
from probes import MIDDLE, forward, generate
from subjects import Subject
from video_processor import VideoProcessor

import winnow
from winnow.contract import Budget, FramesView, Method, Observe, Point, PromptView, Reduction, State, Step, top_k
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.plan import Plan
from winnow.engine.turns import AGAIN
from winnow.media import MediaError
from winnow.models.inputs import model_inputs

BUILD = "qwen2_5_vl"


def picture(shade: int, width: int = 56, height: int = 84) -> Image.Image:
    """Noise around a grey, so that pictures differ."""
    noise = np.random.default_rng(shade).integers(0, 20, (height, width, 3))
    return Image.fromarray((shade + noise).astype(np.uint8))


PICTURES = tuple(picture(shade) for shade in (200, 40, 120, 80))


@dataclass(frozen=True)
class Dark(Method):
    """Keeps the darkest pictures."""

    keep: Budget = field(default_factory=lambda: Budget(2))
    at: ClassVar[str] = "prompt"
    slug: ClassVar[str] = "dark"

    def score(self, view: PromptView):
        return -view.pixels.float().flatten(2).mean(-1)


@dataclass(frozen=True)
class Ask(Told):
    at: ClassVar[str] = "prompt"
    slug: ClassVar[str] = "ask"


def test_a_step_chooses_pictures_and_the_ledger_says_which():
    model, processor = zoo.model(BUILD), QwenProcessor()
    given = asked(*PICTURES)
    before = copy.deepcopy(given)
    with winnow.compress(model, Plan((Dark(), *Plan.of("divprune:keep=3").methods))) as handle:
        chosen = handle.prompt(given)
        with handle.using(handle.plan, prompt=chosen):
            found = forward(model, inputs_of(processor, chosen.messages)).logits
        items = handle.last.items
    assert [item.picture.number for item in items] == [1, 3]
    assert [item.picture.given for item in items] == [4, 4]
    assert [(at, slug, r.n, r.m) for at, slug, r in items[0].picture.steps] == [("prompt", "dark", 4, 2)]
    assert str(items[1].picture) == "picture 4 of 4, as it was given"
    assert [len(item.kept) for item in items] == [3, 3]
    assert given == before
    assert chosen.messages == asked(PICTURES[1], PICTURES[3])
    with winnow.compress(zoo.model(BUILD), "divprune:keep=3") as handle:
        by_hand = forward(handle.model, inputs_of(processor, asked(PICTURES[1], PICTURES[3]))).logits
    assert torch.equal(found, by_hand)


def test_text_stays_where_it_is_and_other_messages_are_left_alone():
    messages = [
        {"role": "system", "content": "you see pages"},
        {"role": "user", "content": [{"type": "text", "text": "first"}, {"type": "image", "image": PICTURES[0]}]},
        {"role": "assistant", "content": [{"type": "text", "text": "seen"}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "page two"},
                {"type": "image", "image": PICTURES[1], "detail": "high"},
                {"type": "text", "text": "which ?"},
            ],
        },
    ]
    texts: list[str] = []
    reading = Ask(lambda view: texts.append(view.text) or Observe())
    with winnow.compress(zoo.model(BUILD), Plan((reading, Dark(1)))) as handle:
        chosen = handle.prompt(messages)
    assert texts == ["page two\nwhich ?"]
    assert chosen.messages[0] == messages[0]
    assert chosen.messages[1]["content"] == [{"type": "text", "text": "first"}]
    assert chosen.messages[2:] == messages[2:]


def test_a_step_that_only_looks_changes_nothing_and_sees_each_picture_in_its_corner():
    shown, seen = (picture(90, 640, 320), picture(10, 30, 40)), []
    with winnow.compress(zoo.model(BUILD), Ask(lambda view: seen.append(view) or Observe())) as handle:
        chosen = handle.prompt(asked(*shown))
    (view,) = seen
    assert [part["image"] for part in chosen.messages[0]["content"][:2]] == list(shown)
    assert chosen.entered[0].steps == ()
    assert view.sizes.tolist() == [[[320, 640], [40, 30]]]
    assert view.pixels.shape == (1, 2, 40, 64, 3)
    assert int(view.pixels[0, 0, 32:].max()) == 0
    assert torch.equal(view.pixels[0, 1, :, :30], torch.from_numpy(np.array(shown[1])))
    assert int(view.pixels[0, 1, :, 30:].max()) == 0


def test_features_and_what_is_remembered_follow_the_pictures():
    seen: list[Any] = []

    @dataclass(frozen=True)
    class Twice(Method):
        """Remembers a number of each picture, and sees it again."""

        at: ClassVar[str] = "prompt"
        slug: ClassVar[str] = "twice"
        identity = None

        def steps(self, info):
            return Step(Point("prompt"), self.first), Step(Point("prompt"), self.second)

        def first(self, view, state):
            kept = Reduction.select(torch.tensor([[0, 2, 3]]), view.n)
            return kept, State({"number": torch.arange(view.n)[None]}, {}, {}, {"one": torch.ones(1, view.n)})

        def second(self, view, state):
            seen.append((view.features[0, :, 0].tolist(), state.token["number"].tolist(), state.summed["one"].shape[1]))
            return top_k(view.features[..., 0], 1)

    with winnow.compress(zoo.model(BUILD), Twice()) as handle:
        chosen = handle.pictures(PICTURES, QUESTION, features=torch.tensor([[5.0], [9], [7], [6]]))
    assert seen == [([5.0, 7.0, 6.0], [[0, 2, 3]], 3)]
    assert [(entered.number, entered.given) for entered in chosen.entered] == [(2, 4)]
    assert chosen.pictures == (PICTURES[2],)


def test_arrays_paths_and_pictures_that_are_turned(tmp_path):
    PICTURES[0].save(tmp_path / "one.png")
    turned = picture(9, 50, 30)
    turned.getexif()[0x0112] = 6
    sources = [np.asarray(PICTURES[0]), str(tmp_path / "one.png"), tmp_path / "one.png", turned]
    messages = asked(*sources)
    messages[0]["content"].insert(0, {"type": "image", "path": tmp_path / "one.png"})
    with winnow.compress(zoo.model(BUILD), Ask(lambda view: Observe()), processor=QwenProcessor()) as handle:
        chosen = handle.prompt(messages)
    assert [part["image"] for part in chosen.messages[0]["content"][2:5]] == sources[1:]
    assert chosen.messages[0]["content"][0] == {"type": "image", "image": tmp_path / "one.png"}
    assert [np.array_equal(shown, PICTURES[0]) for shown in chosen.pictures[:4]] == [True] * 4
    assert chosen.pictures[4].size == (30, 50)
    assert [entered.grid for entered in chosen.entered] == [(3, 2)] * 4 + [None]


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"type": "image"}, "picture 1 is a part with nothing beside its type; give a picture as"),
        ({"type": "image", "url": "https://example.org/a.png"}, "a part with url; give a picture as"),
        ({"type": "image", "base64": "AAAA"}, "a part with base64; give"),
        ({"type": "image", "path": b"bytes"}, "a part with path; give"),
        ({"type": "image", "image": "https://example.org/a.png"}, "picture 1: got a URL"),
        ({"type": "image", "image": 7}, "picture 1: got int: give a path"),
        ({"type": "image", "image": "missing.png"}, "picture 1: the given path is not a readable file"),
        ({"type": "image_url", "image_url": {"url": "x"}}, "a part of the type 'image_url'"),
        ({"type": "audio", "audio": "a.wav"}, "a part of the type 'audio'"),
        ({"type": "video", "video": "clip.mp4"}, "winnow.open_video"),
        ({"type": "video"}, "holds nothing as a video"),
    ],
)
def test_parts_that_are_not_taken(part, says):
    with winnow.compress(zoo.model(BUILD), Dark()) as handle, pytest.raises(WinnowError, match=says):
        handle.prompt([{"role": "user", "content": [part]}])


@pytest.mark.parametrize("messages", ["what?", None, {"role": "user"}, [[{"role": "user", "content": "a"}]], [1]])
def test_what_is_no_conversation_is_refused(messages):
    with winnow.compress(zoo.model(BUILD), Dark()) as handle, pytest.raises(WinnowError, match="of one conversation"):
        handle.prompt(messages)


@pytest.mark.parametrize("content", [7, ["text"], [None]])
def test_content_that_is_none_is_refused(content):
    with winnow.compress(zoo.model(BUILD), Dark()) as handle, pytest.raises(WinnowError, match="content of a message"):
        handle.prompt([{"role": "user", "content": content}])


def test_a_damaged_picture_is_a_media_error():
    with winnow.compress(zoo.model(BUILD), Dark()) as handle, pytest.raises(MediaError, match="picture 2: ") as caught:
        handle.pictures([PICTURES[0], b"no picture"])
    assert caught.value.code == "invalid_image"


@pytest.mark.parametrize("pictures", ["one.png", PICTURES[0], {1: 2}])
def test_pictures_are_a_list(pictures):
    with winnow.compress(zoo.model(BUILD), Dark()) as handle, pytest.raises(WinnowError, match="give a list"):
        handle.pictures(pictures)


@pytest.mark.parametrize(
    ("features", "question", "says"),
    [
        (torch.zeros(3, 2), None, "one row for each of 4 pictures"),
        (torch.zeros(1, 4, 2), None, "one row for each of 4 pictures"),
        (torch.zeros(4, 2), torch.zeros(1, 2), "give one row"),
        (torch.zeros(4, 2), torch.zeros(3), "of one space"),
    ],
)
def test_features_that_do_not_fit(features, question, says):
    with winnow.compress(zoo.model(BUILD), Dark()) as handle, pytest.raises(WinnowError, match=says):
        handle.prompt(asked(*PICTURES), features=features, question_features=question)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (lambda view: Reduction.assign(torch.zeros(1, 4, dtype=torch.int64), m=1), "merges or reorders pictures"),
        (lambda view: Reduction.select(torch.tensor([[1, 0]]), 4, ordered=False), "merges or reorders pictures"),
        (lambda view: Reduction.select(torch.zeros(1, 0, dtype=torch.int64), 4), "and at least one"),
        (lambda view: Reduction.select(torch.tensor([[0]]), 5), "chose the pictures"),
        (lambda view: State(), "pictures are chosen by Reduce"),
        (lambda view: view[MIDDLE], "cannot see"),
    ],
)
def test_what_a_step_at_prompt_cannot_ask_for(what, says):
    with winnow.compress(zoo.model(BUILD), Ask(what)) as handle, pytest.raises(WinnowError, match=says):
        handle.prompt(asked(*PICTURES))


def test_pictures_that_nobody_chose_are_refused_and_words_are_not():
    model, processor = zoo.model(BUILD), QwenProcessor()
    with winnow.compress(model, Dark()) as handle:
        with pytest.raises(WinnowError, match=r"chooses pictures.*handle\.prompt\(messages\)"):
            forward(model, inputs_of(processor, asked(*PICTURES)))
        with pytest.raises(WinnowError, match="chooses pictures"):
            forward(model, zoo.inputs(BUILD, ("3 V 6",)))
        chosen = handle.prompt(asked(*PICTURES))
        with handle.using(handle.plan, prompt=chosen), pytest.raises(WinnowError, match="lets 2 pictures into row 0"):
            forward(model, inputs_of(processor, asked(*PICTURES)))
        words = handle.prompt(asked())
        assert words.pictures == ()
        with handle.using(handle.plan, prompt=words):
            forward(model, inputs_of(processor, words.messages))
        video = winnow.Video.of(np.zeros((2, 28, 28, 3), np.uint8), fps=1)
        alone = [{"role": "user", "content": [{"type": "video", "video": video}]}]
        with pytest.raises(UnsupportedError, match="hold videos alone"):
            handle.prompt(alone)
    with pytest.raises(UnsupportedError, match="handle has prompt"):
        winnow.prepare(zoo.model(BUILD), inputs_of(processor, asked(*PICTURES)), Dark())


def test_where_tiles_are_items_those_of_several_pictures_are_not_told_apart():
    subject = Subject("idefics3")
    model, made = subject.model(), subject.sample("2 A 4 B 5")
    with winnow.compress(model, Ask(lambda view: Observe())) as handle:
        one, two = handle.pictures(PICTURES[:1]), handle.pictures(PICTURES[:2])
        with handle.using(handle.plan, prompt=two):
            forward(model, made)
            assert [item.picture for item in handle.last.items] == [None] * 4
        with handle.using(handle.plan, prompt=one):
            forward(model, made)
            assert [item.picture for item in handle.last.items] == [one.entered[0]] * 4
        five = handle.pictures([*PICTURES, PICTURES[0]])
        for wrong, says in ((five, "lets 5 pictures"), (handle.pictures([]), "lets 0 pictures")):
            with handle.using(handle.plan, prompt=wrong), pytest.raises(WinnowError, match=says):
                forward(model, made)


@dataclass(frozen=True)
class Odd(Method):
    """Keeps every second frame."""

    at: ClassVar[str] = "frames"
    slug: ClassVar[str] = "odd"
    identity = None

    def reduce(self, view: FramesView) -> Reduction:
        return Reduction.select(torch.arange(0, view.n, 2)[None], view.n)


def test_videos_in_messages_go_through_the_steps_at_frames():
    model, processor = zoo.model(BUILD), VideoProcessor(QUESTION)
    frames = np.random.default_rng(0).integers(0, 256, (8, 42, 56, 3), dtype=np.uint8)
    messages = [{"role": "user", "content": [{"type": "video", "video": winnow.Video.of(frames, fps=2)}]}]
    with winnow.compress(model, Odd()) as handle:
        chosen = handle.prompt(messages)
        assert chosen.videos[0].sampled.numbers == (0, 2, 4, 6)
        assert np.array_equal(chosen.messages[0]["content"][0]["video"], frames[::2])
        with handle.using(handle.plan, prompt=chosen):
            generate(model, model_inputs(model, processor, chosen.videos[0], QUESTION))
        (item,) = handle.last.items
    assert item.frames.numbers == (0, 2, 4, 6)


@pytest.mark.parametrize("place", ["device", "cpu"])
def test_a_later_turn_needs_no_prompt_and_selecting_again_knows_the_pictures(place):
    model, processor = zoo.model(BUILD), QwenProcessor()
    plan = Plan((Dark(), *Plan.of("fastv:layer=2,keep=3").methods))
    with winnow.compress(model, plan, processor=processor, turns="again", keep_features=place) as handle:
        chosen = handle.prompt(asked(*PICTURES))
        made = inputs_of(processor, chosen.messages)
        with handle.using(handle.plan, prompt=chosen):
            first = generate(model, made)
        told = [item.picture for item in handle.last.items]
        later = prolonged(made, first.sequences, TURN[:1])
        generate(model, later, past_key_values=first.past_key_values)
        assert handle.last.selection == AGAIN
        assert [item.picture for item in handle.last.items] == told
    assert [entered.number for entered in told] == [1, 3]


@dataclass(frozen=True)
class Looking(Ask):
    """Wants attention before any model has run."""

    slug: ClassVar[str] = "looking"

    def steps(self, info):
        return (Step(Point("prompt"), lambda view, state: Observe(), (MIDDLE,)),)


def test_signals_are_refused_when_the_plan_is_attached():
    with pytest.raises(WinnowError, match="before any model runs"):
        winnow.compress(zoo.model(BUILD), Looking())
