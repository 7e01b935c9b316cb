"""LightCompress's side of `lightcompress.py`: its modules on its transformers, and a prefill for each line of stdin.

    python lightcompress_side.py CHECKOUT

Its registry is read; its model wrapper and its evaluation are not imported: a method gets an object with the attributes
of the wrapper that it asks for. LightCompress sets `use_cache=False` unless it is told otherwise, and its FastV runs a
layer twice and would write that layer's cache twice; so this side prefills without a cache, the plain model too.
"""

from __future__ import annotations

import importlib
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
from lightcompress_shape import CONTENT, IMAGE, KEEP, LAYER, START, config, pixels, prompt
from transformers import LlavaForConditionalGeneration

CONTEXTUAL = 10  # of VisionZip's 64
REDUCED = 1 - KEEP / CONTENT
METHODS = "llmc.compression.token_reduction"
PACKAGES = ("llmc", "llmc.utils", "llmc.compression", "llmc.compression.sparsification", METHODS)


def opened(checkout: Path, name: str) -> types.ModuleType:
    """One of its modules, without what its packages import for quantization, evaluation and deployment."""
    for package in PACKAGES:
        if package not in sys.modules:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(checkout.joinpath(*package.split(".")))]
    return importlib.import_module(name)


def build() -> LlavaForConditionalGeneration:
    """Of a class of its own, because VisionZip replaces the forward of the class."""
    torch.manual_seed(0)
    kind = type("Llava", (LlavaForConditionalGeneration,), {})
    return kind(config()).eval()


def fitted(checkout: Path, method: str, special: dict[str, object], inside: bool) -> LlavaForConditionalGeneration:
    """A model with one of its methods hooked into it."""
    model = build()
    wrapper = type("LlavaHf", (), {})()
    wrapper.vlm_model, wrapper.model = model, model.language_model
    wrapper.vision_model, wrapper.vision_projector = model.vision_tower, model.multi_modal_projector
    wrapper.embed_tokens, wrapper.first_turn_question = model.get_input_embeddings(), True
    wrapper.pruning_config = {
        "is_video_model": False,
        "image_token_length": CONTENT,
        "select_layer": model.config.vision_feature_layer,
        "select_feature": model.config.vision_feature_select_strategy,
        "image_token_index": IMAGE,
        "vision_token_start_index": START,
    }
    blocks = model.language_model.model.layers if inside else model.vision_tower.vision_model.encoder.layers
    opened(checkout, f"{METHODS}.{method.lower()}")
    registry = opened(checkout, "llmc.utils.registry_factory").TOKEN_REDUCTION_REGISTRY
    registry[method]({"special": special}, wrapper, blocks)
    return model


def prefill(model: LlavaForConditionalGeneration) -> torch.Tensor:
    """The last logits, through the model's forward as `generate` calls it."""
    ids = prompt(CONTENT)
    places = torch.arange(ids.shape[1])
    return model(
        input_ids=ids, pixel_values=pixels(), attention_mask=torch.ones_like(ids), position_ids=places[None],
        cache_position=places, use_cache=False, num_logits_to_keep=1,
    ).logits  # fmt: skip


def prefill_of(model: LlavaForConditionalGeneration, chosen: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The last logits of a model whose language model reads those of the rows that are chosen."""
    features = model.get_image_features(
        pixels(), model.config.vision_feature_layer, model.config.vision_feature_select_strategy
    )
    ids = prompt(CONTENT)
    rows = model.get_input_embeddings()(ids)
    rows = chosen(rows.masked_scatter((ids == IMAGE)[..., None].expand_as(rows), features))
    places = torch.arange(rows.shape[1])
    return model.language_model(
        inputs_embeds=rows, attention_mask=torch.ones(rows.shape[:2], dtype=torch.long), position_ids=places[None],
        cache_position=places, use_cache=False, num_logits_to_keep=1,
    ).logits  # fmt: skip


def first(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows[:, : START + KEEP], rows[:, START + CONTENT :]], 1)


def main() -> None:
    checkout = Path(sys.argv[1])
    torch.set_num_threads(1)
    divprune = opened(checkout, f"{METHODS}.divprune")
    plain = build()
    parts = {"dominant": KEEP - CONTEXTUAL, "contextual": CONTEXTUAL}
    models = {
        "fastervlm": fitted(checkout, "FasterVLM", {"rate": REDUCED}, inside=False),
        "visionzip": fitted(checkout, "VisionZip", parts, inside=False),
        "fastv": fitted(checkout, "FastV", {"pruning_loc": LAYER, "rate": REDUCED}, inside=True),
    }
    settings = {"reduction_ratio": REDUCED, "vision_token_start_index": START, "vision_token_length": CONTENT}

    def diverse(rows: torch.Tensor) -> torch.Tensor:
        """Its DivPrune is hooked into LLaVA's own code alone; this is what is called there."""
        mask = torch.ones(rows.shape[:2], dtype=torch.long)
        return divprune.divprune_post_hook(None, None, mask, None, rows, None, pruning_paras=settings)[4]

    chosen = {"native": first, "divprune": diverse}
    with torch.no_grad():
        print("ready", flush=True)
        for line in sys.stdin:
            name = line.strip()
            start = time.perf_counter()
            if name in chosen:
                prefill_of(plain, chosen[name])
            else:
                prefill(models.get(name, plain))
            print(1000 * (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
