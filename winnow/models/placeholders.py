"""Whether a processor's prompt has a placeholder for each token that the model makes of the picture.

The processor computes that number from settings of its own, which are saved apart from the model's configuration and
can differ from it. What the model makes is asked of the model: its encoder runs once for each shape of inputs.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from winnow.core.errors import WinnowError
from winnow.models.families import family_of, unwrap

FILE = "processor_config.json or preprocessor_config.json"

# Settings of a processor, and where the model's configuration says the same.
SETTINGS = (
    ("patch_size", "vision_config.patch_size"),
    ("vision_feature_select_strategy", "vision_feature_select_strategy"),
    ("image_token_id", "image_token_id"),
    ("video_token_id", "video_token_id"),
    ("image_processor.patch_size", "vision_config.patch_size"),
    ("image_processor.temporal_patch_size", "vision_config.temporal_patch_size"),
    ("image_processor.merge_size", "vision_config.spatial_merge_size"),
    ("image_processor.image_grid_pinpoints", "image_grid_pinpoints"),
    ("video_processor.patch_size", "vision_config.patch_size"),
    ("video_processor.temporal_patch_size", "vision_config.temporal_patch_size"),
    ("video_processor.merge_size", "vision_config.spatial_merge_size"),
)

_missing = object()
_lock = threading.Lock()
_counts: weakref.WeakKeyDictionary[Any, dict[Any, int | None]] = weakref.WeakKeyDictionary()


def check_placeholders(model: Any, processor: Any, inputs: Mapping[str, Any], modality: str = "image") -> None:
    """Refuse inputs of one picture, or of one video, that the model cannot take.

    Args:
        inputs: what the processor made of it and a question, on the model's device.

    Raises:
        WinnowError: the numbers differ, or the encoder cannot read the pixels; with the setting that is wrong.
        UnsupportedError: the model's family is not supported.
    """
    inner: Any = unwrap(model)
    what = "picture" if modality == "image" else modality
    for name, own, token in family_of(inner).encoders:
        if own != modality:
            continue
        ids = inputs.get("input_ids", torch.empty(0))
        placeholders = int((ids == getattr(inner.config, token)).sum())
        made = _features(inner, name, inputs)
        if made == placeholders:
            return
        how = wrong_settings(model, processor, inputs) or f"compare {FILE} with config.json"
        if made is None:
            raise WinnowError(
                f"{type(inner).__name__} cannot encode the {what} as {type(processor).__name__} prepares it: {how}."
            )
        raise WinnowError(
            f"{type(processor).__name__} writes {placeholders} {modality} tokens into the prompt, "
            f"and {type(inner).__name__} makes {made} of the {what}: {how}."
        )


def wrong_settings(model: Any, processor: Any, inputs: Mapping[str, Any] | None = None) -> str:
    """The settings of a processor that differ from those of the model, with both values; empty if none is known to."""
    found = [
        f"its {name} is {_shown(got)}, this model needs {_shown(needed)}"
        for name, got, needed in _pairs(unwrap(model), processor, inputs or {})
        if got != needed
    ]
    return f"{'; '.join(found)} (see {FILE})" if found else ""


def _pairs(model: Any, processor: Any, inputs: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(setting, the processor's value, the value that fits the model), where both have it."""
    for setting, path in SETTINGS:
        got, needed = _at(processor, setting), _at(model.config, path)
        if got is not _missing and needed is not _missing and needed is not None:
            yield setting, _plain(got), _plain(needed)
    extra = getattr(processor, "num_additional_image_tokens", _missing)
    if extra is not _missing:  # the tower's [CLS]
        yield "num_additional_image_tokens", extra, int(family_of(model).info(model).has_cls)
    pixels, side = inputs.get("pixel_values"), _at(model.config, "vision_config.image_size")
    if isinstance(pixels, torch.Tensor) and pixels.ndim >= 4 and isinstance(side, int):
        yield "size or crop_size (height, width)", list(pixels.shape[-2:]), [side, side]


def _at(root: Any, path: str) -> Any:
    for name in path.split("."):
        root = getattr(root, name, _missing)
    return root


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _features(model: Any, name: str, inputs: Mapping[str, Any]) -> int | None:
    """Tokens that the model makes of the picture; None if its encoder fails. Asked once for each shape of inputs."""
    # On the class: where the model is compressed, the engine stands in for the method of the object.
    encoder = getattr(type(model.base_model), name)
    given = {key: inputs[key] for key in inspect.signature(encoder).parameters if key in inputs}
    said = repr([_at(model.config, path) for _, path in SETTINGS])
    key = (name, said, *((key, _shape(value)) for key, value in given.items()))
    with _lock:
        known = _counts.setdefault(model, {})
    if key not in known:
        known[key] = _count(family_of(model), encoder, model.base_model, given)
    return known[key]


def _count(family: Any, encoder: Any, base: Any, given: Mapping[str, Any]) -> int | None:
    try:
        with torch.no_grad():
            rows = family.rows(encoder(base, **given, return_dict=True))
        return sum(row.reshape(-1, row.shape[-1]).shape[0] for row in rows)
    except (WinnowError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # a tower of transformers fails in its own ways on pixels of another shape
        return None


def _shape(value: Any) -> Any:
    """What the number of tokens depends on: the shape of pixels, the values of sizes and grids."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return (tuple(value.shape), None if value.is_floating_point() else tuple(value.flatten().tolist()))
