"""Prefill of Qwen3-VL and Gemma 3 shaped models under compression, against the plain model and its prefill of M tokens.

These classes are called with the whole sequence, and each layer is given what is left: what does that cost? One thread,
interleaved rounds, medians with bootstrap intervals; the gate is the lower end of the interval. Run with nothing else
on the machine: `make bench`.

- efficiency = (t_full − t_method) / (t_full − t_native-M): 100 % means that the method itself costs nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)

import winnow
from winnow.bench.clock import clocked
from winnow.bench.intervals import efficiency, median
from winnow.bench.prefills import attached, machine

IMAGE, TEXT, LAYERS, WIDTH, KEEP, GATE = 500, 32, 16, 384, 64, 0.97
PLANS = (f"hiprune:keep={KEEP}", f"divprune:keep={KEEP}")


@dataclass(frozen=True)
class Subject:
    """A model and a picture.

    Attributes:
        content: visual tokens of the picture.
        pixels: the arguments of its encoder.
        native: from the encoder's output and a number of tokens, the arguments of a plain prefill of that many.
        whole: the arguments of a prefill of the picture, but for what was encoded.
    """

    model: Any
    content: int
    pixels: dict[str, torch.Tensor]
    native: Callable[[Any, int], dict[str, Any]]
    whole: dict[str, torch.Tensor]


def ids(tokens: int) -> torch.Tensor:
    text = torch.arange(5, 5 + TEXT)[None]
    return torch.cat([text[:, :8], torch.full((1, tokens), IMAGE), text[:, 8:]], 1)


def qwen3_vl() -> Subject:
    """24 × 24 tokens of 2 × 2 patches; features of three lower blocks are added to the first three layers."""
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 512, "hidden_size": WIDTH, "intermediate_size": 1024, "num_hidden_layers": LAYERS,
            "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 64, "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "mrope_section": [12, 10, 10], "rope_theta": 5e6},
        },
        vision_config={
            "depth": 6, "hidden_size": 128, "intermediate_size": 512, "num_heads": 2, "out_hidden_size": WIDTH,
            "deepstack_visual_indexes": [1, 2, 3], "patch_size": 4,
        },
        image_token_id=IMAGE,
    )  # fmt: skip
    model = Qwen3VLForConditionalGeneration(config).eval()
    grid = torch.tensor([[1, 48, 48]])
    pixels = torch.randn(48 * 48, 3 * 2 * 4 * 4)

    def native(encoded: Any, tokens: int) -> dict[str, Any]:
        rows = {"pooler_output": (encoded.pooler_output[0][:tokens].clone(),)}
        rows["deepstack_features"] = [(layer[0][:tokens].clone(),) for layer in encoded.deepstack_features]
        output = transformers.models.qwen3_vl.modeling_qwen3_vl.BaseModelOutputWithDeepstackFeatures(**rows)
        own = ids(tokens)
        positions = torch.arange(own.shape[1]).expand(3, 1, -1)
        return {"input_ids": own, "mm_encoder_outputs": {"image": output}, "position_ids": positions}

    own = ids(576)
    positions = torch.arange(own.shape[1]).expand(3, 1, -1)
    return Subject(model, 576, {"pixel_values": pixels, "image_grid_thw": grid}, native, {"position_ids": positions})


def gemma3() -> Subject:
    """24 × 24 tokens, each pooled from 2 × 2 patches; five layers of six with a window, which the prompt outgrows."""
    kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(LAYERS)]
    config = Gemma3Config(
        text_config=Gemma3TextConfig(
            vocab_size=512, hidden_size=WIDTH, intermediate_size=1024, num_hidden_layers=LAYERS, num_attention_heads=6,
            num_key_value_heads=6, head_dim=64, query_pre_attn_scalar=64, sliding_window=512, layer_types=kinds,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=2, image_size=192,
            patch_size=4, vision_use_head=False,
        ),
        mm_tokens_per_image=576,
        image_token_index=IMAGE,
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config).eval()

    def types(tokens: int) -> torch.Tensor:
        return (ids(tokens) == IMAGE).long()

    def native(encoded: Any, tokens: int) -> dict[str, Any]:
        output = transformers.modeling_outputs.BaseModelOutputWithPooling(
            pooler_output=encoded.pooler_output[:, :tokens].clone()
        )
        own = {"input_ids": ids(tokens), "token_type_ids": types(tokens)}
        return own | {"mm_encoder_outputs": {"image": output}}

    return Subject(model, 576, {"pixel_values": torch.randn(1, 3, 192, 192)}, native, {"token_type_ids": types(576)})


SUBJECTS = {"qwen3_vl": qwen3_vl, "gemma3": gemma3}


def measure(subject: Subject, plan: str, rounds: int) -> dict[str, Any]:
    """Interleaved rounds of full, method and native prefills."""
    model = subject.model
    plain = model.base_model.get_image_features(**subject.pixels)
    natives = {n: subject.native(plain, n) for n in (subject.content, KEEP)}
    times: dict[Any, list[float]] = {"method": [], **{n: [] for n in natives}}
    with winnow.compress(model, plan):
        encoded = model.base_model.get_image_features(**subject.pixels)
    own = {"input_ids": ids(subject.content), "mm_encoder_outputs": {"image": encoded}, **subject.whole}
    for turn in range(rounds + 3):
        with attached(model, plan, encoded) as handle:
            _, spent = clocked(lambda: model(**own, use_cache=True, logits_to_keep=1), model.device)
            read = handle.last.layer_tokens
        found = {
            n: clocked(lambda given=given: model(**given, use_cache=True, logits_to_keep=1), model.device)[1]
            for n, given in natives.items()
        }
        if turn >= 3:  # warm-up
            times["method"].append(spent)
            for n, t in found.items():
                times[n].append(t)
    if any(layer != (KEEP + TEXT,) for layer in read):
        raise SystemExit(f"{plan} read {read}, expected {KEEP + TEXT} tokens in every layer")
    method, full, ideal = (np.array(times[name]) for name in ("method", subject.content, KEEP))
    values = {"full_ms": full, "method_ms": method, "native_ms": ideal, "speedup": full / method}
    found = {name: median(x) for name, x in values.items()} | {"efficiency": efficiency(full, method, ideal)}
    return {name: (m.value, m.low, m.high) for name, m in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", choices=SUBJECTS, nargs="*", default=list(SUBJECTS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(machine())
    print(f"{options.rounds} interleaved rounds; milliseconds; intervals are 95 %")
    print(f"{'class':10s} {'plan':18s} {'full':>7s} {'method':>7s} {'native':>7s} {'speed-up':>8s}  efficiency")
    results, passed = [], True
    with torch.no_grad():
        for name in options.only:
            subject = SUBJECTS[name]()
            for plan in PLANS:
                r = measure(subject, plan, options.rounds)
                results.append({"class": name, "plan": plan, **r})
                # The greedy method computes more by itself; its own gate is that of `prefill.py`.
                bound = GATE if plan.startswith("hiprune") else 0.90
                good = r["efficiency"][1] >= bound
                passed = passed and good
                e = r["efficiency"]
                print(
                    f"{name:10s} {plan:18s} {r['full_ms'][0]:7.1f} {r['method_ms'][0]:7.1f} {r['native_ms'][0]:7.1f} "
                    f"{r['speedup'][0]:7.2f}×  {e[0]:6.1%} [{e[1]:6.1%}, {e[2]:6.1%}]  {'pass' if good else 'FAIL'}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
