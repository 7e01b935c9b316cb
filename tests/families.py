"""What tests of all model classes share: the builds, and a compressed build against its plain self."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import builds
import pytest
import torch
from byhand import share, top
from masked import Cut, Gathered, Masked, MaskedReference, Rows
from probes import score
from torch import Tensor

from winnow.models.families import family_of

# One of each kind: windows and outer masks, one prefix block, DeepStack, a linear state, per-layer inputs and shared
# keys, a window in every layer, tiles, dicts of masks made inside, and a mixture of experts with its own token types.
FAST = (
    "gemma3",
    "paligemma",
    "qwen3_vl",
    "qwen3_5",
    "gemma4",
    "mistral3",
    "internvl",
    "cohere2_vision",
    "ernie4_5_vl_moe",
)
EVERY = (
    *FAST,
    *("aria", "aya_vision", "cohere_compass", "cosmos3_edge", "cosmos3_omni", "deepseek_ocr2", "deepseek_vl"),
    *("deepseek_vl_hybrid", "emu3", "exaone4_5", "fast_vlm", "fuyu", "gemma3n", "gemma4_moe", "gemma4_unified"),
    *("glm4v", "glm4v_moe", "glm_ocr", "got_ocr2", "hyperclovax_vision_v2", "idefics2", "idefics3", "janus"),
    *(
        "kimi_k25",
        "lfm2_vl",
        "lighton_ocr",
        "llama4",
        "llava_next_video",
        "llava_onevision",
        "minicpmv4_6",
        "minicpmv4_7",
    ),
    *("mistral3_full", "muse_glimmer", "ovis2", "paddleocr_vl", "perception_lm", "qianfan_ocr", "qwen2_5_omni_thinker"),
    *("qwen2_vl", "qwen3_5_moe", "qwen3_omni_moe_thinker", "qwen3_vl_moe", "smolvlm", "step3p7", "video_llama_3"),
    *("video_llava", "vipllava"),
)

RAGGED = ("3 A 6", "3 B 9", "11", "2 B 4 C 5")


def kinds() -> list[Any]:
    """The builds as parameters: one of each kind in the fast suite, all in the full one."""
    here = [name for name in EVERY if name in builds.every()]  # a class can be broken in a version of transformers
    return [pytest.param(name, marks=() if name in FAST else pytest.mark.full) for name in here]


def content(model: Any, sample: dict[str, Tensor], items: Sequence[Any]) -> list[Tensor]:
    """The positions of the content tokens of each item of one sample, from its ledger's layouts."""
    ids, found = sample["input_ids"][0], []
    tokens = {modality: getattr(model.config, name) for _, modality, name in family_of(model).encoders}
    where = torch.cat([(ids == token).nonzero()[:, 0] for token in sorted(set(tokens.values()))]).sort().values
    start = 0
    for item in items:
        own = where[start : start + item.layout.n]
        found.append(own[torch.from_numpy(item.layout.content)])
        start += item.layout.n
    return found


def picks(keep: int | str, counts: Sequence[int]) -> Rows:
    """By hand, what `Pick(keep)` chooses."""

    def choose(rows: Tensor, left: list[Tensor]) -> list[Tensor]:
        return [own[top(score(rows[own]), share(keep, n))] for own, n in zip(left, counts, strict=True)]

    return choose


def halves() -> Cut:
    """By hand, what `Halve` does before layer 0: the mean of two neighbours stands where the first of them stood."""

    def merge(rows: Tensor, left: list[Tensor]) -> dict[int, Tensor]:
        pairs = [(own[i], own[i + 1]) for own in left for i in range(0, len(own) - 1, 2)]
        return {int(a): (rows[a] + rows[b]) / 2 for a, b in pairs}

    return Cut(0, lambda rows, left: [own[::2] for own in left], merge)


def by_hand(model: Any, sample: dict[str, Tensor], items: Sequence[Tensor], forced: Sequence[int], cut: Cut) -> Masked:
    """One sample of the plain model that cannot read what is dropped; models with linear layers run without it."""
    linear = "linear_attention" in kinds_of(model) or "conv" in kinds_of(model)
    reference = Gathered(model) if linear else MaskedReference(model)
    return reference.run(sample, items, forced, [cut])


def kinds_of(model: Any) -> set[str]:
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ())


def build(name: str) -> Any:
    return builds.every()[name]
