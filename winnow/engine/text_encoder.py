"""TextEncoder: the half of CLIP that a vision-language model has not kept, handed over by the caller."""

import functools
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo
from winnow.models.attempt import attempt

HOW = (
    "give the id or the folder of the CLIP whose vision tower the model has, such as "
    "openai/clip-vit-large-patch14-336, with its weights in safetensors, or (model, tokenizer)."
)


class TextEncoder:
    """CLIP's text tower, and what maps pictures and texts into their common space.

    Args:
        given: a loaded `CLIPModel` with its tokenizer, or the id or folder of one, which is read when it is first
            needed, on `device`.
    """

    def __init__(self, given: Any, device: torch.device) -> None:
        pair = isinstance(given, tuple | list) and len(given) == 2 and isinstance(given[0], nn.Module)
        if not pair and not isinstance(given, str | Path):
            raise WinnowError(f"text_encoder={type(given).__name__}: {HOW}")
        self.given, self.device = given, device

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """The model, less the blocks of its vision tower where it was read here, and its tokenizer."""
        if not isinstance(self.given, str | Path):
            clip, tokenizer = self.given
        else:
            from transformers import AutoTokenizer, CLIPModel

            name = str(self.given)
            what = f"The text encoder {name} could not be loaded"
            options: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
            clip, report = attempt(what, lambda: CLIPModel.from_pretrained(name, **options), HOW)
            lost = sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
            if lost:  # a vision tower alone, say: transformers would make up the rest
                raise WinnowError(f"The text encoder {name} lacks {lost[0]} and {len(lost) - 1} more; {HOW}")
            tokenizer = attempt(what, lambda: AutoTokenizer.from_pretrained(name), HOW)
            _tower(clip).encoder = None  # the model has its own
            clip = clip.to(self.device).eval()
        for part in ("visual_projection", "text_projection", "text_model", "vision_model"):
            if not hasattr(clip, part):
                raise WinnowError(f"text_encoder: {type(clip).__name__} has no {part}; {HOW}")
        return clip, tokenizer

    def check(self, info: ModelInfo) -> None:
        """Refuse a model whose patches are not those of this CLIP."""
        clip, _ = self._loaded
        width = clip.visual_projection.in_features
        if info.merge > 1 or not info.has_cls or info.vision_width not in (width, 1):
            raise UnsupportedError(
                f"text_encoder: its pictures have patches {width} wide behind a [CLS] token, and the vision tower of "
                f"{info.model} gives {info.vision_width} for {info.merge**2} patch(es); {HOW}"
            )

    @torch.no_grad()
    def patches(self, x: Float[Tensor, "t n c"], norm: bool) -> Float[Tensor, "t n e"]:
        """Patches of the tower in the common space, fp32."""
        clip, _ = self._loaded
        last = _tower(clip).post_layernorm
        weight = clip.visual_projection.weight
        if norm:
            x = last(x.to(last.weight)).to(x.device)
        return nn.functional.linear(x.to(weight.device, torch.float32), weight.float()).to(x.device)

    @torch.no_grad()
    def text(self, words: str, pool: str) -> Float[Tensor, "m e"]:
        """A text in the common space; see `ClipText` for `pool`."""
        clip, tokenizer = self._loaded
        most, device = clip.text_model.config.max_position_embeddings, clip.text_projection.weight.device
        if pool == "pieces":
            ids = tokenizer(words, return_tensors="pt")["input_ids"]
            gap = -ids.shape[1] % most
            ids, mask = (
                nn.functional.pad(x, (0, gap)).reshape(-1, most).to(device) for x in (ids, torch.ones_like(ids))
            )
            rows = clip.text_model(input_ids=ids, attention_mask=mask).pooler_output
        elif pool == "end":
            ids = tokenizer(words, max_length=most, truncation=True, padding="max_length", return_tensors="pt")
            rows = clip.text_model(input_ids=ids["input_ids"].to(device)).last_hidden_state[:, -1]
        else:
            ids = tokenizer(words, max_length=most, truncation=True, return_tensors="pt")["input_ids"]
            rows = clip.text_model(input_ids=ids.to(device)).pooler_output
        return clip.text_projection(rows).float()


def _tower(clip: Any) -> Any:
    return getattr(clip.vision_model, "vision_model", clip.vision_model)
