"""`winnow serve` on the reference model of clips, with a processor that is called as those of transformers are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

import winnow.models.load
from winnow.reference import video
from winnow.reference.vocabulary import ASSISTANT, BOS, IMAGE, USER

KINDS = {
    "video": (video.VIDEO, "pixel_values_videos", "video_grid_thw"),
    "image": (IMAGE, "pixel_values", "image_grid_thw"),
}
PARTS = "".join(f"{{% elif part['type'] == '{kind}' %}}{own[0]}" for kind, own in KINDS.items())
TEMPLATE = (
    "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'text' %} {{ part['text'] }}"
    f"{PARTS}{{% endif %}}{{% endfor %}}{{% endfor %}}"
)


class Films:
    """One video or picture, and a question behind it."""

    chat_template, image_token, video_token = TEMPLATE, IMAGE, video.VIDEO
    image_processor = video_processor = SimpleNamespace()

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool, tokenize: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=tokenize)

    def __call__(self, text: str, return_tensors: str, images: Any = None, **videos: Any) -> dict[str, torch.Tensor]:
        kind = "video" if videos else "image"
        if videos:
            assert not videos["do_sample_frames"]
            frames = videos["videos"][0]
        else:
            frames = np.stack([np.asarray(images.resize((56, 56), Image.Resampling.BOX))] * 2)
        placeholder, pixels, grid = KINDS[kind]
        flat = video.patches(torch.as_tensor(frames)[None])[0]
        side = frames.shape[1] // video.PATCH
        question = self.tokenizer(text.replace(placeholder, ""), add_special_tokens=False).input_ids
        token = video.TOKEN_ID[placeholder]
        before = [video.TOKEN_ID[own] for own in (BOS, USER, video.START)]
        shown = [token] * (flat.shape[0] * flat.shape[1] // video.MERGE**2)
        ids = torch.tensor([[*before, *shown, video.TOKEN_ID[video.END], *question, video.TOKEN_ID[ASSISTANT]]])
        seconds = {"second_per_grid_ts": torch.ones(1)} if videos else {}
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": torch.where(ids == token, 2 if videos else 1, 0),
            pixels: flat.flatten(0, 1),
            grid: torch.tensor([[len(flat), side, side]]),
            **seconds,
        }


def load(*_: Any, **__: Any) -> tuple[Any, Films]:
    model, processor = video.load()
    return model, Films(processor.tokenizer)


if __name__ == "__main__":
    from winnow.cli import main

    winnow.models.load.load = load
    main()
