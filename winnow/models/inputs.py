"""One question about one picture, as a model takes it."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from winnow.core.errors import WinnowError
from winnow.models.placeholders import check_placeholders, wrong_settings


def model_inputs(model: Any, processor: Any, image: Image.Image, question: str) -> dict[str, Any]:
    """The keyword arguments of `model.generate`, on the model's device and in its dtype.

    Args:
        image: an upright RGB picture, as `winnow.media.open_image` gives it.
        question: plain text; control tokens in it are refused, because the tokenizer would obey them.

    Raises:
        WinnowError: the question cannot be asked, or the processor's settings or chat template do not fit the model.
    """
    check_question(processor, question)
    text, made = prompt(processor, question), None
    try:
        made = dict(processor(images=image, text=text, return_tensors="pt"))
    except MemoryError:
        raise
    except Exception as error:
        reason = type(error).__name__
    if made is None:
        how = wrong_settings(model, processor) or "try another size, or a complete checkpoint"
        raise WinnowError(
            f"{type(processor).__name__} cannot prepare a picture of {image.width} × {image.height} pixels with this "
            f"question ({reason}): {how}."
        )
    inputs = {name: _moved(value, model) for name, value in made.items()}
    check_placeholders(model, processor, inputs)
    return inputs


def check_question(processor: Any, question: str) -> None:
    """Refuse words that a tokenizer would obey, or cannot read."""
    if not question.strip():
        raise WinnowError("The question is empty; ask something.")
    if any("\ud800" <= char <= "\udfff" for char in question):
        raise WinnowError("The question holds bytes that are not text in this terminal's encoding; write it in UTF-8.")
    for token in sorted(_control_tokens(processor)):
        if token in question:
            raise WinnowError(f"The question holds the control token {token!r}; leave it out.")


def pictures_prompt(processor: Any, question: str, count: int) -> str:
    """The text around several pictures and a question about them: see `prompt`.

    Raises:
        WinnowError: as `prompt`; or the template writes one picture alone.
    """
    if count == 1:
        return prompt(processor, question)
    image = image_token(processor)
    if not getattr(processor, "chat_template", None):
        return prompt(processor, question).replace(image, "\n".join([image] * count))
    parts = [{"type": "image"}] * count + [{"type": "text", "text": question}]
    text = _rendered(processor, question, parts, count)
    if text is None:
        text = _rendered(processor, question, "\n".join([image] * count + [question]), count)
    if text is None:
        raise WinnowError(
            f"The chat template of {type(processor).__name__} does not give a prompt with {count} pictures and a "
            "question; mend chat_template.jinja, or remove it to use LLaVA's prompt."
        )
    return text


def prompt(processor: Any, question: str) -> str:
    """The text around the picture: by the processor's chat template, where it has one.

    Some templates take a list of contents, others only text; the placeholder is then written before the question.

    Raises:
        WinnowError: the template fails, or leaves out the question or the picture.
    """
    image = image_token(processor)
    if not getattr(processor, "chat_template", None):
        return f"USER: {image}\n{question} ASSISTANT:"
    text = templated(processor, question)
    if text is None:
        text = _rendered(processor, question, f"{image}\n{question}")
    if text is None:
        raise WinnowError(
            f"The chat template of {type(processor).__name__} does not give a prompt with the question and exactly "
            f"one {image!r} in it; mend chat_template.jinja, or remove it to use LLaVA's prompt."
        )
    # A tokenizer that adds the start token would double the one that a template has written.
    tokenizer = processor.tokenizer
    start = tokenizer.bos_token
    if start and text.startswith(start) and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(start)
    return text


def templated(processor: Any, question: str) -> str | None:
    """What the chat template makes of a picture and a question, given as a list of contents.

    None if it fails, or if the question or the placeholder of the picture does not come out of it exactly once.
    """
    return _rendered(processor, question, [{"type": "image"}, {"type": "text", "text": question}])


def _rendered(processor: Any, question: str, content: str | list[dict[str, str]], count: int = 1) -> str | None:
    message = {"role": "user", "content": content}
    try:
        text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    except MemoryError:
        raise
    except Exception:  # a template is a program that comes with the checkpoint: it can fail in any way
        return None
    whole = isinstance(text, str) and question.strip() in text and text.count(image_token(processor)) == count
    return text if whole else None


def image_token(processor: Any) -> str:
    """The placeholder of a picture in a prompt."""
    return str(getattr(processor, "image_token", None) or "<image>")


def _moved(value: Any, model: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


def _control_tokens(processor: Any) -> set[str]:
    added = processor.tokenizer.added_tokens_decoder.values()
    return {str(token) for token in added if token.special} | {image_token(processor)}
