"""One question about one picture or one video, as a model takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.models.families import family_of, unwrap
from winnow.models.placeholders import check_placeholders, wrong_settings
from winnow.video import Video

NOUNS = {"image": "picture", "video": "video"}


def model_inputs(model: Any, processor: Any, shown: Image.Image | Video, question: str) -> dict[str, Any]:
    """The keyword arguments of `model.generate`, on the model's device and in its dtype.

    Args:
        shown: an upright RGB picture, as `winnow.media.open_image` gives it, or a video of `winnow.open_video`, whose
            frames the processor takes as they are, with their true times.
        question: plain text; control tokens in it are refused, because the tokenizer would obey them.

    Raises:
        WinnowError: the question cannot be asked, or the processor's settings or chat template do not fit the model.
        UnsupportedError: a model that takes no videos is shown one.
    """
    check_question(processor, question)
    modality = _modality(shown)
    _check_takes(model, processor, modality)
    text = prompt(processor, question, modality)
    inputs = moved(processed(processor, text, [shown], lambda: wrong_settings(model, processor)), model)
    check_placeholders(model, processor, inputs, modality)
    return inputs


def check_question(processor: Any, question: str) -> None:
    """Refuse what is no question, or what a tokenizer would obey."""
    if not question.strip():
        raise WinnowError("The question is empty; ask something.")
    if any("\ud800" <= char <= "\udfff" for char in question):
        raise WinnowError("The question holds bytes that are not text in this terminal's encoding; write it in UTF-8.")
    check_text(processor, question, "The question")


def check_text(processor: Any, text: str, what: str) -> None:
    """Refuse control tokens in a text of the user's, because the tokenizer would obey them.

    Args:
        what: the text, for the error.
    """
    for token in sorted(_control_tokens(processor)):
        if token in text:
            raise WinnowError(f"{what} holds the control token {token!r}; leave it out.")


def processed(
    processor: Any, text: str, shown: Sequence[Image.Image | Video], reason: Callable[[], str] = str
) -> dict[str, Any]:
    """What the processor makes of a prompt and what it shows, on the CPU.

    Args:
        shown: pictures, or one video.
        reason: says which setting of the processor may be wrong, where it fails.

    Raises:
        WinnowError: it cannot prepare them.
    """
    try:
        made = dict(processor(text=text, return_tensors="pt", **_media(shown)))
    except MemoryError:
        raise
    except Exception as error:
        kind = type(error).__name__
    else:
        made.pop("video_metadata", None)  # what the processor was told, and no argument of a model
        return made
    what = "these pictures and this text"
    if len(shown) == 1:
        what = f"a {NOUNS[_modality(shown[0])]} of {_size(shown[0])} with this question"
    how = reason() or "try another size, or a complete checkpoint"
    raise WinnowError(f"{type(processor).__name__} cannot prepare {what} ({kind}): {how}.")


def moved(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Inputs on the model's device and in its dtype."""
    return {name: _moved(value, model) for name, value in inputs.items()}


def _modality(shown: Image.Image | Video) -> str:
    return "video" if isinstance(shown, Video) else "image"


def _check_takes(model: Any, processor: Any, modality: str) -> None:
    if modality == "image":
        return
    inner: Any = unwrap(model)
    if "video" not in {own for _, own, _ in family_of(inner).encoders}:
        raise UnsupportedError(
            f"{type(inner).__name__} is not known to take videos; show it a picture, or use a class that takes them, "
            "such as Qwen2.5-VL."
        )
    if getattr(processor, "video_processor", None) is None:
        raise WinnowError(
            f"{type(processor).__name__} has no video_processor, so it prepares no videos: use a complete checkpoint."
        )


def _media(shown: Sequence[Image.Image | Video]) -> dict[str, Any]:
    """What a processor is given. Frames of a video are sampled already: it is not to sample them again."""
    if not shown:
        return {}
    (first, *others) = shown
    if isinstance(first, Video):
        return {
            "videos": [first.frames],
            "video_metadata": [first.metadata],
            "do_sample_frames": False,
            "input_data_format": "channels_last",
        }
    return {"images": [list(shown)] if others else first}


def _size(shown: Image.Image | Video) -> str:
    if not isinstance(shown, Video):
        return f"{shown.width} × {shown.height} pixels"
    frames, height, width = shown.frames.shape[:3]
    return f"{frames} frames of {width} × {height} pixels"


def prompt(processor: Any, question: str, modality: str = "image", count: int = 1) -> str:
    """The text around a picture, several pictures or a video: by the processor's chat template, where it has one.

    Some templates take a list of contents, others only text; the placeholders are then written before the question.

    Raises:
        WinnowError: the template fails, or leaves out the question or a picture.
    """
    token = placeholder(processor, modality)
    shown = "\n".join([token] * count + [question])
    if not getattr(processor, "chat_template", None):
        return f"USER: {shown} ASSISTANT:"
    text = templated(processor, question, modality, count)
    if text is None:
        text = _rendered(processor, question, shown, token, count)
    if text is None:
        raise WinnowError(
            f"The chat template of {type(processor).__name__} does not give a prompt with the question and exactly "
            f"{'one' if count == 1 else count} {token!r} in it; mend chat_template.jinja, or remove it to use LLaVA's "
            "prompt."
        )
    return without_start(processor.tokenizer, text)


def without_start(tokenizer: Any, text: str) -> str:
    """A prompt without the start token that a template has written, where the tokenizer would add it once more."""
    start = tokenizer.bos_token
    if start and text.startswith(start) and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        return text.removeprefix(start)
    return text


def templated(processor: Any, question: str, modality: str = "image", count: int = 1) -> str | None:
    """What the chat template makes of pictures or a video and a question, given as a list of contents.

    None if it fails, or if the question, or each of the `count` placeholders, does not come out of it.
    """
    content = [{"type": modality}] * count + [{"type": "text", "text": question}]
    return _rendered(processor, question, content, placeholder(processor, modality), count)


def _rendered(processor: Any, question: str, content: str | list[dict[str, str]], token: str, count: int) -> str | None:
    message = {"role": "user", "content": content}
    try:
        text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    except MemoryError:
        raise
    except Exception:  # a template is a program that comes with the checkpoint: it can fail in any way
        return None
    whole = isinstance(text, str) and question.strip() in text and text.count(token) == count
    return text if whole else None


def placeholder(processor: Any, modality: str = "image") -> str:
    """The placeholder of a picture, or of a video, in a prompt."""
    return str(getattr(processor, f"{modality}_token", None) or f"<{modality}>")


def _moved(value: Any, model: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


def _control_tokens(processor: Any) -> set[str]:
    added = processor.tokenizer.added_tokens_decoder.values()
    own = {placeholder(processor)} | {str(token) for token in [getattr(processor, "video_token", None)] if token}
    return {str(token) for token in added if token.special} | own
