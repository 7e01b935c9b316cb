"""Processors of pictures for the tiny builds of the zoo, and messages for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import zoo
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlavaNextProcessor, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from winnow.contract import Method, Point, Step

QUESTION = "what is this ?"
TOKEN = 28  # pixels of a side of a token of Qwen2.5-VL
TEMPLATE = (
    "{% for m in messages %}<s>user {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} answer"
)


@dataclass(frozen=True)
class Told(Method):
    """Asks for what it is told, or for what a function of the view says."""

    what: Any = field(default=None, metadata={"setting": False})
    identity = None

    def steps(self, info):
        return (Step(Point(self.at), self.act),)

    def act(self, view, state):
        return self.what(view) if callable(self.what) else self.what


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
    """Qwen2.5-VL's picture processing and a tokenizer; its own processor class needs torchvision, for videos.

    Args:
        least, most: tokens of a picture.
        side: pixels of a side of a token, which is two patches.
        marks: what stands before and behind the tokens of a picture.
    """

    chat_template, image_token = TEMPLATE, "<image>"

    def __init__(
        self, least: int = 4, most: int = 25, side: int = TOKEN, marks: tuple[str, str] = ("<start>", "<end>")
    ) -> None:
        size = {"shortest_edge": least * side**2, "longest_edge": most * side**2}
        self.image_processor = Qwen2VLImageProcessorPil(size=size, patch_size=side // 2)
        self.tokenizer, self.marks = tokenizer(), marks

    def apply_chat_template(self, messages: Any, tokenize: bool, **how: Any) -> Any:
        text = self.tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False)
        if not tokenize:
            return text
        parts = [part for message in messages for part in message["content"]]
        return self([part["image"] for part in parts if part["type"] == "image"], text, "pt")

    def __call__(self, images: Any, text: str, return_tensors: str) -> dict[str, Any]:
        pictures = {} if images == [] else self.image_processor(images, return_tensors=return_tensors)
        for grid in pictures.get("image_grid_thw", ()):
            tokens = int(grid.prod()) // self.image_processor.merge_size**2
            text = text.replace("<image>", f"{self.marks[0]} {'<shown> ' * tokens}{self.marks[1]}", 1)
        text = text.replace("<shown>", "<image>")
        words = self.tokenizer(text, return_tensors=return_tensors, return_token_type_ids=False)
        return {**pictures, **words, "mm_token_type_ids": (words["input_ids"] == zoo.IMAGE).int()}


def processor(build: str) -> Any:
    """Of a build of the zoo."""
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


def asked(*pictures: Any, question: str = QUESTION) -> list[dict[str, Any]]:
    """One message with pictures, or what else is given in their place, and a question."""
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def inputs_of(processor: Any, messages: Any) -> dict[str, Any]:
    """What a model takes, as `generate` of transformers is asked everywhere."""
    return dict(processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt"))


def joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of Qwen2.5-VL as one batch, padded on the left."""
    longest = max(row["input_ids"].shape[1] for row in rows)

    def padded(row: dict[str, Any], name: str, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(row[name], (longest - row[name].shape[1], 0), value=value)

    made = {name: torch.cat([padded(row, name, 0) for row in rows]) for name in ("attention_mask", "mm_token_type_ids")}
    made["input_ids"] = torch.cat([padded(row, "input_ids", zoo.PAD) for row in rows])
    shown = [row for row in rows if "pixel_values" in row]
    return made | {name: torch.cat([row[name] for row in shown]) for name in ("pixel_values", "image_grid_thw")}
