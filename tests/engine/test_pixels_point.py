"""The point `pixels`: a step says which part of a picture enters and at what size, and the ledger says which did."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import zoo
from builds.mllama import BUILDS
from picture_processors import TOKEN, QwenProcessor, Told, asked, inputs_of, joined
from picture_processors import processor as of_build
from PIL import Image
from probes import MIDDLE, Pick, forward, generate, new_tokens

import winnow
from winnow.contract import Observe, Point, Recut, Reduction, Step
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.plan import Plan

BUILD = "qwen2_5_vl"
QUARTER = "downscale:keep=25%"


def picture(width: int = 300, height: int = 200, seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


@dataclass(frozen=True)
class Cut(Told):
    at: ClassVar[str] = "pixels"
    slug: ClassVar[str] = "cut"


def qwen() -> QwenProcessor:
    return QwenProcessor(most=100)


def told(handle: Any, processor: Any, chosen: Any) -> torch.Tensor:
    """The logits of a prompt that was prepared."""
    with handle.using(handle.plan, prompt=chosen):
        return forward(handle.model, inputs_of(processor, chosen.messages)).logits


def plain(build: str, processor: Any, *pictures: Image.Image) -> torch.Tensor:
    """The logits of the plain model."""
    return forward(zoo.model(build), inputs_of(processor, asked(*pictures))).logits


@dataclass(frozen=True)
class Looking(Cut):
    """Wants attention before any model has run."""

    slug: ClassVar[str] = "looking"

    def steps(self, info):
        return (Step(Point(self.at), self.act, (MIDDLE,)),)


@pytest.mark.parametrize("plan", ["full", "downscale:keep=100%", Cut(Observe()), Cut(Recut())])
def test_what_changes_nothing_hands_on_the_callers_own_pictures(plan):
    model, processor, shown = zoo.model(BUILD), qwen(), picture()
    given = asked(shown)
    with winnow.compress(model, plan, processor=processor) as handle:
        chosen = handle.prompt(given)
        assert chosen.messages == given
        assert chosen.messages is not given
        assert chosen.messages[0]["content"][0]["image"] is shown
        found = told(handle, processor, chosen)
        (item,) = handle.last.items
    assert item.picture.whole
    assert item.picture.steps == ()
    assert torch.equal(found, plain(BUILD, processor, shown))


def test_nothing_changes_on_models_of_other_kinds():
    model, processor, shown = zoo.model("llava_clip"), of_build("llava_clip"), picture()
    with winnow.compress(model, Cut(Observe()), processor=processor) as handle:
        chosen = handle.prompt(asked(shown))
        assert chosen.entered[0].grid is None
        found = told(handle, processor, chosen)
    assert torch.equal(found, plain("llava_clip", processor, shown))


@pytest.mark.parametrize("build", ["llava_clip", "llava_next", BUILD])
def test_a_cut_is_the_picture_that_is_cut_and_scaled_by_hand(build):
    model, shown = zoo.model(build), picture()
    processor = qwen() if build == BUILD else of_build(build)
    with winnow.compress(model, Cut(Recut((20, 30, 160, 198), (112, 84))), processor=processor) as handle:
        chosen = handle.prompt(asked(shown))
        found = told(handle, processor, chosen)
        (item,) = handle.last.items
    assert item.picture.box == (20, 30, 160, 198)
    assert (item.picture.size, item.picture.scaled) == ((200, 300), (112, 84))
    by_hand = shown.crop((20, 30, 160, 198)).resize((84, 112), Image.Resampling.BICUBIC)
    assert torch.equal(found, plain(build, processor, by_hand))


def test_later_cuts_are_of_what_is_left_and_the_ledger_says_so_of_the_picture_that_was_given():
    plan = Plan((Cut(Recut((100, 0, 300, 200), (100, 100))), Cut(Recut((50, 0, 100, 50)))))
    with winnow.compress(zoo.model(BUILD), plan, processor=qwen()) as handle:
        (entered,) = handle.prompt(asked(picture())).entered
    assert entered.box == (200, 0, 300, 100)
    assert entered.scaled == (50, 50)
    assert entered.seen((200, 50, 250, 100)) == (0, 25, 25, 50)
    assert [(at, slug) for at, slug, _ in entered.steps] == [("pixels", "cut")] * 2


def test_downscale_is_the_picture_that_is_scaled_by_hand_and_later_methods_have_what_is_left():
    model, processor, shown = zoo.model(BUILD), qwen(), picture()
    by_hand = shown.resize((5 * TOKEN, 3 * TOKEN), Image.Resampling.BICUBIC)
    with winnow.compress(model, f"{QUARTER} + divprune:keep=4", processor=processor) as handle:
        chosen = handle.prompt(asked(shown))
        found = told(handle, processor, chosen)
        (item,) = handle.last.items
    assert item.picture.full == (7, 11)
    assert item.picture.grid == (3, 5)
    assert item.layout.n_content == 15
    assert len(item.kept) == 4
    with winnow.compress(zoo.model(BUILD), "divprune:keep=4", processor=processor) as alone:
        assert torch.equal(found, forward(alone.model, inputs_of(processor, asked(by_hand))).logits)
    with winnow.compress(model, QUARTER, processor=processor) as handle:
        found = told(handle, processor, handle.prompt(asked(shown)))
    assert torch.equal(found, plain(BUILD, processor, by_hand))


def test_a_batch_and_beams_are_their_rows():
    model, processor = zoo.model(BUILD), qwen()
    shown = [(picture(),), (), (picture(120, 260, 1), picture(200, 200, 2))]
    with winnow.compress(model, "downscale:keep=9", processor=processor) as handle:
        prompts = [handle.prompt(asked(*own)) for own in shown]
        rows = [inputs_of(processor, chosen.messages) for chosen in prompts]
        alone = []
        for chosen, row in zip(prompts, rows, strict=True):
            with handle.using(handle.plan, prompt=chosen):
                alone += new_tokens(generate(model, row), row).tolist()
        batch = joined(rows)
        with handle.using(handle.plan, prompt=prompts):
            together = new_tokens(generate(model, batch), batch).tolist()
            assert [(i.row, i.picture.number, i.picture.given) for i in handle.last.items] == [
                (0, 0, 1),
                (2, 0, 2),
                (2, 1, 2),
            ]
            generate(model, batch, num_beams=2)
            assert [i.row for i in handle.last.items] == [0, 1, 4, 4, 5, 5]
            assert [i.picture.number for i in handle.last.items] == [0, 0, 0, 1, 0, 1]
    assert together == alone


def test_two_threads_have_prompts_of_their_own():
    model, processor = zoo.model(BUILD), qwen()
    found: dict[int, Any] = {}
    with winnow.compress(model, "downscale:keep=9", processor=processor) as handle:

        def ask(number: int) -> None:
            for _ in range(3):
                chosen = handle.prompt(asked(*[picture(seed=number)] * number))
                told(handle, processor, chosen)
                found.setdefault(number, []).append(len(handle.last.items))

        threads = [threading.Thread(target=ask, args=(number,)) for number in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {1: [1, 1, 1], 2: [2, 2, 2]}


def test_after_detach_the_model_is_the_plain_one():
    model, processor, shown = zoo.model(BUILD), qwen(), picture()
    with winnow.compress(model, QUARTER, processor=processor) as handle:
        told(handle, processor, handle.prompt(asked(shown)))
    after = forward(model, inputs_of(processor, asked(shown))).logits
    assert torch.equal(after, plain(BUILD, processor, shown))


def test_pictures_that_no_step_has_seen_are_refused():
    model, processor = zoo.model(BUILD), qwen()

    def given(*pictures: Image.Image) -> dict[str, Any]:
        return inputs_of(processor, asked(*pictures))

    with winnow.compress(model, QUARTER, processor=processor) as handle:
        with pytest.raises(WinnowError, match=r"cuts or scales pictures.*handle\.prompt\(messages\)"):
            forward(model, given(picture()))
        forward(model, given())  # there is nothing to cut
        with handle.using("full"):
            forward(model, given(picture()))
        chosen = handle.prompt(asked(picture()))
        with handle.using(handle.plan, prompt=chosen):
            with pytest.raises(WinnowError, match="7 × 11 tokens of a picture that entered with 140 × 84 pixels"):
                forward(model, given(picture()))
            with pytest.raises(WinnowError, match="lets 1 pictures into row 0, and the request has 2"):
                forward(model, given(picture(), picture()))
            with pytest.raises(WinnowError, match="the request has none"):
                forward(model, given())
        with handle.using(handle.plan, prompt=[chosen, chosen]), pytest.raises(WinnowError, match="1 rows"):
            forward(model, inputs_of(processor, chosen.messages))
        with handle.using(handle.plan, prompt=chosen), pytest.raises(WinnowError, match="names 0 videos"):
            forward(model, zoo.inputs(BUILD, ("3 V 6",)))
        with pytest.raises(WinnowError, match="cuts or scales pictures"):
            forward(model, zoo.inputs(BUILD, ("3 V 6",)))


def test_pictures_that_are_in_the_embeddings_already_are_refused():
    model, held = zoo.model(BUILD), torch.arange(20)[None] < 5
    embeds = model.get_input_embeddings()(torch.arange(10, 30)[None])
    with (
        winnow.compress(model, Cut(Observe())) as handle,
        handle.using(handle.plan, placeholders=held),
        pytest.raises(WinnowError, match="inputs_embeds that hold them already"),
    ):
        model(inputs_embeds=embeds)


@pytest.mark.parametrize("point", ["prompt", "pixels"])
def test_pictures_that_are_read_by_cross_attention_are_refused(point):
    model = BUILDS[0].model()
    with pytest.raises(UnsupportedError, match=f"acts at {point}, which MllamaForConditionalGeneration does not offer"):
        winnow.compress(model, Pick(at=point))
    with winnow.compress(model, Pick()) as handle:
        chosen = handle.prompt(asked(picture()))
        with pytest.raises(UnsupportedError, match="by cross-attention"), handle.using(handle.plan, prompt=chosen):
            pass


def test_prompts_of_other_plans_and_things_that_are_none_are_refused():
    model, processor = zoo.model(BUILD), qwen()
    with winnow.compress(model, QUARTER, processor=processor) as handle:
        chosen = handle.prompt(asked(picture()))
        for plan in ("downscale:keep=9", "full"):
            with pytest.raises(WinnowError, match="was prepared by"), handle.using(plan, prompt=chosen):
                pass
        for wrong in ([], chosen.messages, "chosen", [chosen, None]):
            with pytest.raises(WinnowError, match=r"prompt= is an? "), handle.using(handle.plan, prompt=wrong):
                pass
        for more in ({"videos": []}, {"placeholders": torch.ones(1, 3, dtype=torch.bool)}):
            with pytest.raises(WinnowError, match="leave out"), handle.using(handle.plan, prompt=chosen, **more):
                pass


def test_what_is_prepared_is_not_prepared_again():
    with winnow.compress(zoo.model(BUILD), QUARTER, processor=qwen()) as handle:
        chosen = handle.prompt(asked(picture()))
        for again in (chosen, chosen.messages):
            with pytest.raises(WinnowError, match="prepared already"):
                handle.prompt(again)
        with pytest.raises(WinnowError, match="cut or scaled already, by v"):
            handle.prompt(asked(chosen.pictures[0]))


@pytest.mark.parametrize(
    ("action", "says"),
    [
        (Recut((0, 0, 301, 200)), "left, top, right, bottom"),
        (Recut((-1, 0, 20, 20)), "left, top, right, bottom"),
        (Recut((20, 0, 20, 20)), "left, top, right, bottom"),
        (Recut((0, 0, 20.5, 20)), "left, top, right, bottom"),
        (Recut((0, 0, 20)), "left, top, right, bottom"),
        (Recut(size=(0, 20)), "height and width"),
        (Recut(size=(20,)), "height and width"),
        (Recut(size=(20_000, 20)), "beyond what is allowed"),
        (Recut(size=(8_000, 8_000)), "beyond what is allowed"),
        (Recut(size=(TOKEN, TOKEN)), "would scale the picture again"),
        (Recut(size=(11 * TOKEN, 10 * TOKEN)), "would scale the picture again"),
        (Reduction.select(torch.tensor([[0]]), 1), "cut and scaled by Recut"),
        (lambda view: view[MIDDLE], "cannot see"),
    ],
)
def test_what_a_step_at_pixels_cannot_ask_for(action, says):
    model, shown = zoo.model(BUILD), asked(picture())
    with winnow.compress(model, Cut(action), processor=qwen()) as handle, pytest.raises(WinnowError, match=says):
        handle.prompt(shown)


def test_a_budget_needs_to_know_the_processor():
    with winnow.compress(zoo.model(BUILD), QUARTER) as handle, pytest.raises(WinnowError, match="processor=processor"):
        handle.prompt(asked(picture()))


def test_models_and_uses_without_the_point_are_refused():
    with pytest.raises(UnsupportedError, match="one size, or to tiles of one size"):
        winnow.compress(zoo.model("llava_next"), QUARTER)
    with pytest.raises(UnsupportedError, match="handle has prompt"):
        winnow.prepare(zoo.model(BUILD), zoo.inputs(BUILD, ("3 A 6",)), QUARTER)
    with pytest.raises(WinnowError, match="before any model runs"):
        winnow.compress(zoo.model(BUILD), Looking())
    clip = {"type": "video", "video": winnow.Video.of(np.zeros((2, 28, 28, 3), np.uint8), fps=1)}
    messages = [{"role": "user", "content": [clip, {"type": "image", "image": picture()}]}]
    with winnow.compress(zoo.model(BUILD), QUARTER) as handle, pytest.raises(UnsupportedError, match="no videos"):
        handle.prompt(messages)


def test_a_later_turn_with_a_picture_names_what_is_new():
    model, processor = zoo.model(BUILD), qwen()
    with winnow.compress(model, "downscale:keep=9", processor=processor) as handle:
        chosen = [handle.prompt(asked(picture(seed=seed))) for seed in (0, 1)]
        made = [inputs_of(processor, own.messages) for own in chosen]
        with handle.using(handle.plan, prompt=chosen[0]):
            first = generate(model, made[0])
        before = first.sequences.shape[1]
        talk = {
            **made[1],
            "input_ids": torch.cat([first.sequences, made[1]["input_ids"]], 1),
            "mm_token_type_ids": torch.nn.functional.pad(made[1]["mm_token_type_ids"], (before, 0)),
        }
        talk["attention_mask"] = torch.ones_like(talk["input_ids"])
        kept = {"past_key_values": first.past_key_values}
        with handle.using(handle.plan, prompt=chosen[1]):
            generate(model, talk, **kept)
        assert [item.picture for item in handle.last.items] == list(chosen[1].entered)
