"""Prefill under compression against the plain model and against the model run natively with M tokens.

One thread, interleaved rounds, medians with bootstrap intervals; the gate is the unfavourable end of each interval. In
each round the plan is attached anew and called once before it is timed.
Run with nothing else on the machine: `make bench`.

- efficiency = (t_full − t_method) / (t_full − t_native-M): 100 % means that the method itself costs nothing;
- selection: taps, scores, choice and packing, as a share of the plain prefill (timed in extra, synchronised runs);
- decoder methods: against their own ideal, the same layers run natively with as many tokens as each layer reads.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from groups import compares
from lightcompress_shape import CONTENT, IMAGE, KEEP, SIDE, TEXT, prompt
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

import winnow
from winnow.bench.clock import clocked
from winnow.bench.intervals import median
from winnow.bench.prefills import attached, machine
from winnow.contract import Method
from winnow.core.registry import method_class, picture_methods

# What a method may cost before the LM, where it scores tokens or compares them with one another; and inside the LM.
GATES = {
    "score": {"efficiency": 0.97, "selection": 0.01},
    "pairs": {"efficiency": 0.95, "selection": 0.04},
    "decoder": {"over_ideal": 1.03},
}
SETTINGS = {"fastv": {"layer": 2, "keep": "25%"}}  # of decoder methods, whose own settings are timed otherwise


@dataclass(frozen=True)
class Case:
    """A method, the class that it is in, and how many of the picture's tokens each layer of the LM reads."""

    name: str
    method: Method
    group: str
    layer_tokens: tuple[int, ...]

    @property
    def gates(self) -> dict[str, float]:
        return GATES[self.group]


def cases(model: LlavaForConditionalGeneration, pixels: torch.Tensor, only: str) -> Iterator[Case]:
    """Every method that acts on pictures between the tower and the last layer, with what its layers read."""
    for entry in picture_methods():
        if entry.family == "user" or not entry.slug.startswith(only) or not {"connector", "decoder"} & {*entry.stages}:
            continue
        inside = "decoder" in entry.stages
        before = "connector" in entry.stages
        kind = method_class(entry.slug)
        learned = {"weights": "untrained"} if "weights" in kind.settings() else {}
        method = kind(**learned, **SETTINGS.get(entry.slug, {}))
        try:
            method = method if inside else method.at_budget(KEEP, CONTENT)
            with winnow.compress(model, method) as handle:
                model(input_ids=prompt(CONTENT), pixel_values=pixels, use_cache=True, logits_to_keep=1)
                read = tuple(layer[0] - TEXT for layer in handle.last.layer_tokens)
        except winnow.WinnowError as error:
            print(f"{entry.slug:28s} not timed: {str(error)[:100]}")
            continue
        group = "decoder" if not before else "pairs" if compares(kind) else "score"
        yield Case(f"{entry.slug}" + ("" if inside else f":keep={KEEP}"), method, group, read)


def build(layers: int) -> LlavaForConditionalGeneration:
    """A LLaVA-shaped model with random weights: 24 × 24 patches, an LM of `layers` × 384, a tower of 12 × 128."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=2,
        image_size=SIDE * 14,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=512, hidden_size=384, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=4096, pad_token_id=0,
    )  # fmt: skip
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    ).eval()


def native(model: LlavaForConditionalGeneration, features: torch.Tensor, tokens: int) -> Callable[[], object]:
    """A prefill of the untouched model with `tokens` visual embeddings."""
    ids = prompt(tokens)
    rows = [features[:tokens].clone()]
    pooled = BaseModelOutputWithPooling(pooler_output=rows)

    def run() -> object:
        return model(input_ids=ids, mm_encoder_outputs={"image": pooled}, use_cache=True, logits_to_keep=1)

    return run


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval."""
    found = median(values)
    return found.value, found.low, found.high


def measure(model: LlavaForConditionalGeneration, case: Case, pixels: torch.Tensor, rounds: int) -> dict[str, object]:
    """Interleaved rounds of full, method and native prefills; then timed runs for the share of selection."""
    ids = prompt(CONTENT)
    features = model.model.get_image_features(pixels).pooler_output[0]
    natives = {n: native(model, features, n) for n in sorted({CONTENT, *case.layer_tokens})}
    times: dict[str, list[float]] = {"method": [], **{str(n): [] for n in natives}}
    with winnow.compress(model, case.method):
        encoded = model.model.get_image_features(pixels)

    def method() -> object:
        return model(input_ids=ids, mm_encoder_outputs={"image": encoded}, use_cache=True, logits_to_keep=1)

    for turn in range(rounds + 3):
        with attached(model, case.method, encoded) as handle:
            method()  # the first call behind an attachment looks up what later ones know
            _, spent = clocked(method, model.device)
            read = handle.last.layer_tokens
        found = {n: clocked(run, model.device)[1] for n, run in natives.items()}
        if turn >= 3:  # warm-up
            times["method"].append(spent)
            for n, t in found.items():
                times[str(n)].append(t)
    if tuple(t[0] - TEXT for t in read) != case.layer_tokens:
        raise SystemExit(f"{case.name} read {read}, expected {case.layer_tokens}")
    t = {name: np.array(values) for name, values in times.items()}
    full, ideal = t[str(CONTENT)], sum(t[str(n)] for n in case.layer_tokens) / len(case.layer_tokens)
    result: dict[str, object] = {
        "plan": case.name,
        "group": case.group,
        "full_ms": interval(full),
        "method_ms": interval(t["method"]),
        "ideal_ms": interval(ideal),
        "speedup": interval(full / t["method"]),
        "efficiency": interval((full - t["method"]) / (full - ideal)),
        "over_ideal": interval(t["method"] / ideal),
        "selection": interval(selection(model, case, pixels, rounds) / np.median(full)),
    }
    result["pass"] = all(
        result[name][1] >= bound if name == "efficiency" else result[name][2] <= bound  # type: ignore[index]
        for name, bound in case.gates.items()
    )
    return result


def selection(model: LlavaForConditionalGeneration, case: Case, pixels: torch.Tensor, rounds: int) -> np.ndarray:
    """Milliseconds spent in taps, scores, choice and packing, over encoder and prefill."""
    spent = []
    with winnow.compress(model, case.method) as handle:
        handle.timing = True
        for turn in range(rounds + 3):
            model(input_ids=prompt(CONTENT), pixel_values=pixels, use_cache=True, logits_to_keep=1)
            if turn >= 3:
                spent.append(handle.last.times["select"])
    return np.array(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--layers", type=int, default=16, choices=range(4, 65, 4), metavar="L", help="of the LM")
    parser.add_argument("--only", default="", help="methods that start with this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--selection", type=Path, help="the share of each selection alone, for tools/default_method.py")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = build(options.layers)
    pixels = torch.randn(1, 3, SIDE * 14, SIDE * 14)
    results = []
    print(machine())
    print(f"{options.rounds} interleaved rounds; milliseconds; intervals are 95 %")
    heads = f"{'full':>7s} {'method':>7s} {'ideal':>7s} {'speed-up':>8s}  {'efficiency':24s}{'over ideal':22s}selection"
    print(f"{'plan':28s} {heads}")
    with torch.no_grad():
        for case in cases(model, pixels, options.only):
            r = measure(model, case, pixels, options.rounds)
            results.append(r)
            e, o, s = r["efficiency"], r["over_ideal"], r["selection"]
            print(
                f"{case.name:28s} {r['full_ms'][0]:7.1f} {r['method_ms'][0]:7.1f} {r['ideal_ms'][0]:7.1f} "
                f"{r['speedup'][0]:7.2f}×  "
                f"{e[0]:6.1%} [{e[1]:6.1%}, {e[2]:6.1%}]  {o[0]:.3f} [{o[1]:.3f}, {o[2]:.3f}]  "
                f"{s[0]:.2%} [{s[1]:.2%}, {s[2]:.2%}]  {'pass' if r['pass'] else 'FAIL'}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.selection:
        shares = {r["plan"]: [round(share, 5) for share in r["selection"]] for r in results}
        options.selection.write_text(json.dumps(shares, indent=1) + "\n")
    sys.exit(0 if all(r["pass"] for r in results) else 1)


if __name__ == "__main__":
    main()
