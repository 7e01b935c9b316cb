"""Steps of other libraries while a checkpoint is loaded: a failure is one line of winnow's own."""

from collections.abc import Callable
from typing import Any

from winnow.core.errors import WinnowError

HOW = (
    "give a Hub id such as llava-hf/llava-1.5-7b-hf that is in the local cache or can be downloaded (HF_HUB_OFFLINE is "
    "not set), or a folder with config.json, *.safetensors and the processor's files."
)


def attempt(what: str, step: Callable[[], Any], how: str = "") -> Any:
    """Run a step; if it fails, raise what failed and what to do, without the library's text."""
    try:
        return step()
    except Exception as error:
        reason = type(error).__name__
    raise WinnowError(f"{what} ({reason}): {how or HOW}")
