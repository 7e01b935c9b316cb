"""The reference models: small LLaVA-type models that read winnow's world, and how to ask them.

They are measuring instruments. They understand the pictures and questions of `winnow.world` and nothing else; use
`origin` (does the picture come from winnow's world?) and `in_world` (are all words known?) before trusting an answer.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from winnow.core.errors import WinnowError
from winnow.reference.presets import PRESETS
from winnow.reference.vocabulary import ASSISTANT, IMAGE, SPECIAL, TOKEN_ID, USER, split_words
from winnow.world.export import Origin, origin

__all__ = ["Origin", "answer", "in_world", "load", "origin", "path", "prompt", "unknown_words"]

MAX_NEW_TOKENS = 4  # the longest answer is a two-digit number: two tokens and the end


def path(preset: str = "small") -> Path:
    """The folder of a shipped model, for `from_pretrained`."""
    folder = Path(__file__).parent / preset
    if preset not in PRESETS or not (folder / "config.json").exists():
        shipped = [name for name in sorted(PRESETS) if (folder.parent / name / "config.json").exists()]
        raise WinnowError(
            f"there is no shipped reference model {preset!r}; shipped: {', '.join(shipped) or 'none'}. "
            "Train one with `winnow train reference`."
        )
    return folder


def load(preset: str = "small") -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A shipped model in float32, ready to answer, and its processor. Plain transformers classes."""
    folder = path(preset)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


def prompt(question: str) -> str:
    """The text that the model was trained on, with the placeholder of the picture."""
    return f"{USER} {IMAGE}\n{question} {ASSISTANT}"


@torch.no_grad()
def answer(model: LlavaForConditionalGeneration, processor: LlavaProcessor, image: Image.Image, question: str) -> str:
    """Greedy decoding of one answer."""
    inputs = processor(images=image, text=prompt(question), return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)  # type: ignore[misc]
    return decode(processor, ids[0, inputs["input_ids"].shape[1] :])


def decode(processor: LlavaProcessor, ids: torch.Tensor) -> str:
    """The text of generated token ids, without special tokens."""
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def unknown_words(question: str) -> tuple[str, ...]:
    """The words of a question that the models have no token for, in order."""
    known = TOKEN_ID.keys() - set(SPECIAL)
    return tuple(
        word for word in split_words(question) if word not in known and not (len(word) == 2 and word.isdigit())
    )


def in_world(question: str) -> bool:
    """Whether a reference model knows all words of the question. It says nothing about the picture; see `origin`."""
    return not unknown_words(question)
