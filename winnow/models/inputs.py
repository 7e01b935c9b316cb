"""One question about one picture, as a model takes it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from PIL import Image

from winnow.core.errors import WinnowError


def model_inputs(model: Any, processor: Any, image: Image.Image, question: str) -> dict[str, Any]:
    """The keyword arguments of `model.generate`, on the model's device and in its dtype.

    Args:
        image: an upright RGB picture, as `winnow.media.open_image` gives it.
        question: plain text; control tokens in it are refused, because the tokenizer would obey them.
    """
    if not question.strip():
        raise WinnowError("The question is empty; ask something.")
    for token in sorted(_control_tokens(processor)):
        if token in question:
            raise WinnowError(f"The question holds the control token {token!r}; leave it out.")
    inputs = None
    with contextlib.suppress(ValueError, TypeError, RuntimeError):
        inputs = processor(images=image, text=prompt(processor, question), return_tensors="pt")
    if inputs is None:
        raise WinnowError(
            f"{type(processor).__name__} cannot prepare a picture of {image.width} × {image.height} pixels with this "
            "question; try another size, or a complete checkpoint."
        )
    return {name: _moved(value, model) for name, value in inputs.items()}


def prompt(processor: Any, question: str) -> str:
    """The text around the picture: by the processor's chat template, where it has one."""
    if getattr(processor, "chat_template", None) is None:
        return f"USER: <image>\n{question} ASSISTANT:"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # A tokenizer that adds the start token would double the one that a template has written.
    tokenizer = processor.tokenizer
    start = tokenizer.bos_token
    if start and text.startswith(start) and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(start)
    return text


def _moved(value: Any, model: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


def _control_tokens(processor: Any) -> set[str]:
    added = processor.tokenizer.added_tokens_decoder.values()
    return {str(token) for token in added if token.special} | {getattr(processor, "image_token", "<image>")}
