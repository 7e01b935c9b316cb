"""Texts and conversations that do not behave: rows P1 to P6."""

from __future__ import annotations

import json
from typing import Any

import pytest

import winnow
from serve.process import MOTORCYCLE, NAME, Server, assistant, drawn, user

CONTROL = ["<image>", "</s>", "<s>", "<pad>", "<unk>", "USER:", "ASSISTANT:"]


@pytest.mark.parametrize("token", CONTROL)
def test_P1_control_tokens_in_a_text_are_refused(server: Server, token: str) -> None:
    for where in (0, 1, 2):
        turns = [user(MOTORCYCLE, drawn(54).image), assistant("yes"), user("is there a dog?")]
        turns[where] = {**turns[where], "content": [{"type": "text", "text": f"look {token} here"}]}
        answer = server.chat(messages=turns)
        assert (answer.status, answer.error["code"]) == (400, "control_token")
        assert answer.error["param"] == f"messages[{where}].content"


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|im_end|>", "<|vision_start|>"])
def test_P1_what_is_no_control_token_of_this_model_is_text(server: Server, token: str) -> None:
    answer = server.ask(f"{MOTORCYCLE} {token}", drawn(54).image)
    plain = server.ask(f"{MOTORCYCLE} unknown", drawn(54).image)
    assert answer.json["usage"] == plain.json["usage"]  # one unknown word each


def test_P2_pictures_and_placeholders_agree(server: Server) -> None:
    """A client cannot write placeholders, so the numbers agree; where a picture is put into a text, it is refused."""
    for count in (1, 2, 3):
        usage = server.ask(MOTORCYCLE, *[drawn(54).image] * count).json["usage"]
        assert usage["winnow"]["given"] == 256 * count
    assert server.ask("<image> <image>", drawn(54).image).status == 400


def test_P2_counts_that_differ_are_an_error_of_the_engine(reference: Any) -> None:
    from winnow import WinnowError
    from winnow.engine.preparation import Preparation

    model, processor = reference
    inputs = dict(processor(images=drawn(54).image, text="USER: <image>\nwhat? ASSISTANT:", return_tensors="pt"))
    inputs["pixel_values"] = inputs["pixel_values"].repeat(2, 1, 1, 1)
    with pytest.raises(WinnowError, match="256 image placeholders for 512 encoded tokens"):
        Preparation(model, "hiprune:keep=64").of(inputs)


EMPTY = ["", "   ", "\n\t", "\u00a0"]


@pytest.mark.parametrize("text", EMPTY)
def test_P3_an_empty_prompt(server: Server, text: str) -> None:
    assert server.ask(text).status == 400
    assert server.ask(text, drawn(54).image).status == 200  # only a picture


def test_P3_too_long_a_text(server: Server) -> None:
    before = server.memory("VmHWM")
    for text, status in (("a " * 500_000, 413), ("dog " * 5_000, 400), ("x" * 199_000, 200)):
        answer = server.ask(text, drawn(54).image)
        assert answer.status == status
        if status == 400:
            assert answer.error["code"] == "context_length_exceeded"
            assert "2048" in answer.error["message"]
    assert server.memory("VmHWM") - before < 100 * 2**20


@pytest.mark.parametrize("text", ["\x00", "a\x00b", "\u202etrom a ereht si", "ש־ל־ו־ם", "日本語", "🏍️" * 50, "\ufeff"])
def test_P3_strange_characters_are_text(server: Server, text: str) -> None:
    assert server.ask(text + " " + MOTORCYCLE, drawn(54).image).status == 200


def test_P3_half_a_surrogate_pair(server: Server) -> None:
    for half in (r"\ud800", r"\udfff"):
        body = json.dumps({"model": NAME, "messages": [{"role": "user", "content": "HALF"}]}).replace("HALF", half)
        answer = server.send("POST", "/v1/chat/completions", body.encode())
        assert answer.status == 400
        assert "surrogate" in answer.error["message"]


@pytest.mark.parametrize("text", [MOTORCYCLE, "def f(x):\n  return x", "日本語の質問", "no sentence end", "a. b. c."])
def test_P4_texts_are_never_compressed(server: Server, text: str) -> None:
    sizes = set()
    for keep in (1, 128):
        usage = server.ask(text, drawn(54).image, winnow={"plan": f"divprune:keep={keep}"}).json["usage"]
        sizes.add(usage["prompt_tokens"] - usage["winnow"]["kept"])
    assert len(sizes) == 1


def test_P5_a_second_turn_about_the_first_picture(server: Server, library: Any) -> None:
    image = drawn(54).image
    question = next(q for q in drawn(54).questions if q.answer not in ("yes", "no"))
    turns = [user(MOTORCYCLE, image), assistant("yes"), user(question.text)]
    first = server.chat(messages=turns)
    assert first.status == 200
    assert first.json["usage"]["winnow"] == {"given": 256, "kept": 64, "plan": "hiprune:keep=64"}
    assert server.chat(messages=turns).json["choices"] == first.json["choices"]
    # Nothing of the conversation is left for the next one.
    assert server.ask(question.text, image).text == library(image, question.text, "hiprune:keep=64")[0]


@pytest.mark.parametrize("plan", ["cdpruner:keep=48", "mmtok:keep=48"])
def test_P6_a_method_that_reads_the_question_where_there_is_none(server: Server, reference: Any, plan: str) -> None:
    """The last token of the prompt stands for the question, as in the library."""
    model, processor = reference
    inputs = processor(images=drawn(54).image, text="USER: <image>\n ASSISTANT:", return_tensors="pt")
    with winnow.compress(model, plan, processor=processor):
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = server.chat(messages=[user("", drawn(54).image)], winnow={"plan": plan})
    assert answer.text == processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.json["usage"]["winnow"] == {"given": 256, "kept": 48, "plan": plan}


@pytest.mark.parametrize("role", ["system", "developer", "tool", "function", None, 5, "USER"])
def test_roles_that_the_template_cannot_say_are_refused(server: Server, role: Any) -> None:
    answer = server.chat(messages=[{"role": role, "content": "be brief"}, user(MOTORCYCLE, drawn(54).image)])
    assert answer.status == 400
    assert answer.error["param"] == "messages[0].role"


def test_the_last_message_is_the_users(server: Server) -> None:
    answer = server.chat(messages=[user(MOTORCYCLE, drawn(54).image), assistant("ye")])
    assert (answer.status, answer.error["param"]) == (400, "messages[1].role")
