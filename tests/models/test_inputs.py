"""One question about one picture on every supported family: what the model is given, and `winnow run` on it."""

from __future__ import annotations

import pytest
import torch
import zoo
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlavaNextProcessor, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from winnow import cli_run
from winnow.core.errors import WinnowError
from winnow.core.plan import Plan
from winnow.models.inputs import model_inputs, prompt

QUESTION = "what is this ?"
TEMPLATE = (
    "{% for m in messages %}<s>user {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} answer"
)


def tokenizer(start: bool = False) -> PreTrainedTokenizerFast:
    """Words to numbers, with the zoo's control tokens at the zoo's ids."""
    words = ["<pad>", "</s>", "<s>", "<start>", "<end>", "<unk>", "user", "answer", *QUESTION.split()]
    ids = {word: i for i, word in enumerate(words)} | {"<image>": zoo.IMAGE}
    ids |= {f"w{i}": i for i in range(zoo.VOCABULARY) if i not in ids.values()}
    made = Tokenizer(models.WordLevel(ids, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken(word, special=True) for word in ids if word.startswith("<")])
    if start:
        from tokenizers.processors import TemplateProcessing

        made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    roles = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens={"image_token": "<image>"}, **roles)


class QwenProcessor:
    """Qwen2.5-VL's picture processing and a tokenizer; its own processor class needs torchvision, for videos."""

    chat_template, image_token = TEMPLATE, "<image>"

    def __init__(self) -> None:
        self.image_processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 140 * 140})
        self.tokenizer = tokenizer()

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        return self.tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=tokenize)

    def __call__(self, images, text, return_tensors):
        pictures = self.image_processor(images, return_tensors=return_tensors)
        tokens = int(pictures["image_grid_thw"].prod()) // self.image_processor.merge_size**2
        text = text.replace("<image>", "<start> " + "<image> " * tokens + "<end>")
        words = self.tokenizer(text, return_tensors=return_tensors, return_token_type_ids=False)
        return {**pictures, **words, "mm_token_type_ids": (words["input_ids"] == zoo.IMAGE).int()}


def processor(build: str):
    if build == "qwen2_5_vl":
        return QwenProcessor()
    crop = {"size": {"shortest_edge": zoo.SIDE}, "crop_size": {"height": zoo.SIDE, "width": zoo.SIDE}}
    more = {"tokenizer": tokenizer(), "patch_size": zoo.PATCH, "chat_template": TEMPLATE, "image_token": "<image>"}
    if build == "llava_next":
        grids = zoo.model(build).config.image_grid_pinpoints
        images = LlavaNextImageProcessorPil(image_grid_pinpoints=grids, **crop)
        return LlavaNextProcessor(
            images, vision_feature_select_strategy="default", num_additional_image_tokens=1, **more
        )
    strategy = "default" if build == "llava_clip" else "full"
    return LlavaProcessor(
        CLIPImageProcessorPil(**crop),
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(build == "llava_clip"),
        **more,
    )


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
