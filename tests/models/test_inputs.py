"""One question about one picture on every supported family: what the model is given, and `winnow run` on it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import zoo
from picture_processors import QUESTION, processor, tokenizer
from PIL import Image

from winnow import cli_run
from winnow.core.errors import WinnowError
from winnow.core.plan import Plan
from winnow.engine.compress import compress
from winnow.engine.doctor import diagnose
from winnow.engine.spans import template_suffix
from winnow.models.inputs import model_inputs, prompt


@pytest.mark.parametrize("size", [(120, 90), (70, 200)])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_every_family_is_asked_and_compared(build, size, tmp_path):
    model, picture = zoo.model(build), Image.effect_noise(size, 80).convert("RGB")
    asked = cli_run.Subject("noise", picture, QUESTION)
    wanted = [Plan.parse("divprune:keep=5"), Plan.parse("fastv:layer=2,keep=5"), Plan.parse("divprune:keep=100%")]
    result = cli_run.compare(
        model, processor(build), asked, wanted, max_new_tokens=3, runs=1, picture=tmp_path / "k.png"
    )
    full, (prune, fastv, same) = result["plain"], result["methods"]
    assert prune["tokens"]["visual"] == fastv["tokens"]["visual"] == 5
    assert full["tokens"]["layers"][0] - prune["tokens"]["layers"][0] == full["tokens"]["visual"] - 5
    assert fastv["tokens"]["layers"][1] == full["tokens"]["layers"][0] > fastv["tokens"]["layers"][2]
    assert same["same"] is True
    assert same["flops"] == full["flops"] > prune["flops"]
    for column in (full, *result["methods"]):
        times = column["ms"]
        assert all(times[phase] > 0 for phase in ("encoder", "projector", "prefill", "token"))
        assert (
            sum(times[p] for p in ("encoder", "projector", "select", "prefill")) + 2 * times["token"] < times["total"]
        )
    for method in result["methods"]:
        assert Image.open(method["overlay"]).height >= 440


def test_inputs_have_the_models_dtype_and_device():
    model = zoo.model("llava_clip").to(torch.bfloat16)
    inputs = model_inputs(model, processor("llava_clip"), Image.new("RGB", (90, 90)), QUESTION)
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["input_ids"].dtype == torch.int64


@pytest.mark.parametrize("start", [False, True], ids=["template", "both"])
def test_the_start_token_stands_once(start):
    asking = processor("llava_clip")
    asking.tokenizer = tokenizer(start)
    ids = asking.tokenizer(prompt(asking, QUESTION)).input_ids
    assert ids.count(asking.tokenizer.bos_token_id) == 1


def test_without_a_chat_template_the_prompt_is_llavas():
    asking = processor("llava_clip")
    asking.chat_template = None
    assert prompt(asking, QUESTION) == f"USER: <image>\n{QUESTION} ASSISTANT:"


@pytest.mark.parametrize("question", ["", " \n", "a <image> b", "<s>", "end</s>"])
def test_P1_control_tokens_in_a_question_are_refused(question):
    with pytest.raises(WinnowError):
        model_inputs(zoo.model("llava_clip"), processor("llava_clip"), Image.new("RGB", (9, 9)), question)


def test_what_the_processor_cannot_take_is_an_error_of_ours():
    with pytest.raises(WinnowError, match="3 × 900"):
        model_inputs(zoo.model("qwen2_5_vl"), processor("qwen2_5_vl"), Image.new("RGB", (3, 900)), QUESTION)


LOOP = "{% for m in messages %}"
TEXT_ONLY = LOOP + "{{ m['role'] + ': ' + m['content'] }}{% endfor %} answer"
FAULTY = {
    "raises": "{{ raise_exception('no') }}",
    "is not a template": "{% for m in messages %}",
    "a name that is not there": "{{ messages[0].content[0].kind.name }}",
    "divides by zero": "{{ 1 // 0 }}",
    "drops the question": LOOP + "user <image> answer{% endfor %}",
    "changes the question": LOOP + "<image> {{ m['content'] | string | upper }}{% endfor %}",
    "drops the picture": LOOP + "user {{ (m['content'] | last)['text'] if m['content'] is not string }}{% endfor %}",
    "two pictures": LOOP + "<image> <image> {{ m['content'] | string }}{% endfor %}",
    "empty": "{{ '' }}",
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_chat_template_that_fails_is_one_line_and_its_suffix_is_unknown(name):
    asking, model = processor("llava_clip"), zoo.model("llava_clip")
    asking.chat_template = FAULTY[name]
    assert template_suffix(asking) == ()
    compress(model, "todre:keep=5", processor=asking).detach()
    for step in (
        lambda: prompt(asking, QUESTION),
        lambda: model_inputs(model, asking, Image.new("RGB", (90, 90)), QUESTION),
        lambda: diagnose(model, asking),
    ):
        with pytest.raises(WinnowError, match="chat template") as caught:
            step()
        assert caught.value.__cause__ is caught.value.__context__ is None


def test_a_chat_template_for_text_gets_the_placeholder_in_its_text():
    asking = processor("llava_clip")
    asking.chat_template = TEXT_ONLY
    assert prompt(asking, QUESTION) == f"user: <image>\n{QUESTION} answer"
    assert template_suffix(asking) == ()
    inputs = model_inputs(zoo.model("llava_clip"), asking, Image.new("RGB", (90, 90)), QUESTION)
    assert int((inputs["input_ids"] == zoo.IMAGE).sum()) == (zoo.SIDE // zoo.PATCH) ** 2


def test_the_suffix_is_what_the_template_writes_behind_the_question():
    asking = processor("llava_clip")
    assert asking.tokenizer.decode(template_suffix(asking)) == "answer"
    asking.chat_template = None
    assert template_suffix(asking) == ()


def test_a_question_that_is_not_text_is_refused():
    with pytest.raises(WinnowError, match="UTF-8"):
        model_inputs(zoo.model("llava_clip"), processor("llava_clip"), Image.new("RGB", (90, 90)), "what \udc80 ?")


# Setting, its wrong value, and what the refusal says: the setting, and the numbers where they can be known.
WRONG = [
    ("llava_clip", "num_additional_image_tokens", 0, ("num_additional_image_tokens is 0", "needs 1", "tokens")),
    ("llava_clip", "num_additional_image_tokens", 7, ("num_additional_image_tokens is 7", "needs 1", "tokens")),
    ("llava_clip", "num_additional_image_tokens", "one", ("num_additional_image_tokens is 'one'", "needs 1")),
    ("llava_clip", "patch_size", None, ("patch_size is None", f"needs {zoo.PATCH}")),
    ("llava_clip", "patch_size", 0, ("patch_size is 0", f"needs {zoo.PATCH}")),
    ("llava_clip", "patch_size", 2 * zoo.PATCH, (f"patch_size is {2 * zoo.PATCH}", f"needs {zoo.PATCH}", "tokens")),
    ("llava_clip", "vision_feature_select_strategy", "full", ("is 'full'", "needs 'default'", "tokens")),
    ("llava_siglip", "vision_feature_select_strategy", "default", ("is 'default'", "needs 'full'", "tokens")),
    ("llava_clip", "image_processor.crop_size", {"height": 112, "width": 112}, ("crop_size", "[112, 112]")),
    ("llava_siglip", "image_processor.crop_size", {"height": 112, "width": 112}, ("crop_size", "[112, 112]")),
    ("llava_clip", "image_processor.do_center_crop", False, ("size or crop_size",)),
    ("llava_clip", "image_processor.image_mean", [0.5], ("cannot prepare",)),
    ("llava_next", "patch_size", None, ("patch_size is None", f"needs {zoo.PATCH}")),
    ("llava_next", "num_additional_image_tokens", 0, ("num_additional_image_tokens is 0", "needs 1", "tokens")),
    ("llava_next", "image_processor.image_grid_pinpoints", [[112, 56]], ("image_grid_pinpoints", "[[112, 56]]")),
    ("qwen2_5_vl", "image_processor.merge_size", 1, ("merge_size is 1", "needs 2")),
    ("qwen2_5_vl", "image_processor.patch_size", 28, ("patch_size is 28", "needs 14")),
    ("qwen2_5_vl", "image_processor.temporal_patch_size", 1, ("temporal_patch_size is 1", "needs 2")),
]


@pytest.mark.parametrize(("build", "setting", "value", "says"), WRONG)
def test_a_processor_that_does_not_fit_the_model_is_refused_by_the_name_of_its_setting(build, setting, value, says):
    asking = processor(build)
    *path, name = setting.split(".")
    setattr(asking.image_processor if path else asking, name, value)
    model = zoo.model(build)
    with pytest.raises(WinnowError) as caught:
        model_inputs(model, asking, Image.effect_noise((120, 90), 80).convert("RGB"), QUESTION)
    said = str(caught.value)
    assert all(part in said for part in says), said
    assert caught.value.__cause__ is caught.value.__context__ is None


@pytest.mark.parametrize("plan", ["visionzip:keep=5", "divprune:keep=5"])
def test_inputs_are_checked_against_the_plain_model_while_it_is_compressed(plan):
    model, asking = zoo.model("llava_clip"), processor("llava_clip")
    picture = Image.new("RGB", (90, 90))
    with compress(model, plan) as handle:
        inputs = model_inputs(model, asking, picture, QUESTION)
        assert handle.last is None
        model.generate(**inputs, max_new_tokens=1)
        assert len(handle.last.items[0].kept) == 5
    asking.num_additional_image_tokens = 0
    with pytest.raises(WinnowError, match="num_additional_image_tokens"):
        model_inputs(model, asking, picture, QUESTION)


def test_the_encoder_is_asked_once_for_each_shape_of_inputs(monkeypatch):
    model, asking = zoo.model("llava_next"), processor("llava_next")
    calls = []
    model.model.vision_tower.register_forward_pre_hook(lambda *_: calls.append(1))
    for size in ((120, 90), (120, 90), (70, 200), (70, 200)):
        model_inputs(model, asking, Image.new("RGB", size), QUESTION)
    assert len(calls) == 2


def test_a_configuration_that_is_mended_is_read_again():
    model, asking = zoo.model("llava_clip"), processor("llava_clip")
    picture = Image.new("RGB", (90, 90))
    for strategy, fits in (("full", False), ("default", True)):
        model.config.vision_feature_select_strategy = strategy
        model.model.config.vision_feature_select_strategy = strategy
        if fits:
            model_inputs(model, asking, picture, QUESTION)
        else:
            with pytest.raises(WinnowError, match=r"25 image tokens .* makes 26"):
                model_inputs(model, asking, picture, QUESTION)


def test_what_was_asked_of_a_model_does_not_keep_it_alive():
    model = zoo.model("llava_clip")
    model_inputs(model, processor("llava_clip"), Image.new("RGB", (90, 90)), QUESTION)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
