"""Qwen2.5-VL's processing of videos for the tiny builds, without torchvision, which its own class needs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import zoo
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SIDE = 28  # pixels of a token
TEMPLATE = (
    "{% for m in messages %}<s>user {% for c in m['content'] %}{% if c['type'] == 'video' %}<video> "
    "{% elif c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} answer"
)


def tokenizer(question: str) -> PreTrainedTokenizerFast:
    """Words to numbers, with the zoo's control tokens at the zoo's ids."""
    words = ["<pad>", "</s>", "<s>", "<start>", "<end>", "<unk>", "user", "answer", *question.split()]
    ids = {word: i for i, word in enumerate(words)} | {"<image>": zoo.IMAGE, "<video>": zoo.VIDEO}
    ids |= {f"w{i}": i for i in range(zoo.VOCABULARY) if i not in ids.values()}
    made = Tokenizer(models.WordLevel(ids, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken(word, special=True) for word in ids if word.startswith("<")])
    roles = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **roles)


class VideoProcessor:
    """Frames resized to whole tokens, in patches as Qwen2.5-VL takes them.

    Attributes:
        told: the `video_metadata` of each call.
    """

    chat_template, image_token, video_token = TEMPLATE, "<image>", "<video>"

    def __init__(self, question: str, tokens: tuple[int, int] = (3, 4)) -> None:
        self.tokenizer = tokenizer(question)
        self.tokens = tokens
        self.video_processor = SimpleNamespace(patch_size=14, temporal_patch_size=2, merge_size=2)
        self.told: list[dict[str, Any]] = []

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        return self.tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=tokenize)

    def __call__(self, text, videos, video_metadata, do_sample_frames, input_data_format, return_tensors):
        assert not do_sample_frames
        assert input_data_format == "channels_last"
        assert return_tensors == "pt"
        (frames,), (told,) = videos, video_metadata
        self.told.append(told)
        high, wide = (SIDE * n for n in self.tokens)
        small = np.stack([np.asarray(Image.fromarray(frame).resize((wide, high))) for frame in frames])
        pixels = torch.from_numpy(small).permute(0, 3, 1, 2).float() / 127.5 - 1
        if len(pixels) % 2:
            pixels = torch.cat([pixels, pixels[-1:]])
        t, h, w = len(pixels) // 2, high // 14, wide // 14
        parts = pixels.view(t, 2, 3, h // 2, 2, 14, w // 2, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        rate = len(told["frames_indices"]) / told["total_num_frames"] * told["fps"]  # as transformers' sampled_fps
        count = t * h * w // 4
        words = self.tokenizer(
            text.replace("<video>", "<start> " + "<video> " * count + "<end>"),
            return_tensors="pt",
            return_token_type_ids=False,
        )
        return {
            **words,
            "pixel_values_videos": parts.reshape(t * h * w, -1),
            "video_grid_thw": torch.tensor([[t, h, w]]),
            "second_per_grid_ts": [2 / rate],
            "mm_token_type_ids": 2 * (words["input_ids"] == zoo.VIDEO).int(),
            "video_metadata": video_metadata,
        }
