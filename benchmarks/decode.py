"""A decoded token under compression against the same model run natively with as many tokens in its cache.

What is measured is the cost of winnow's hooks: both sides read caches of one size. One thread, interleaved pairs,
medians with bootstrap intervals; the gate is the unfavourable end. Run with nothing else on the machine: `make bench`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prefill import CONTENT, KEEP, SIDE, TEXT, build, interval, native, prompt

import winnow
from winnow.bench.clock import clocked

GATE = 0.03  # of a decode step of the plain model
PLANS = (f"divprune:keep={KEEP}", f"fastv:layer=2,keep={KEEP}", "pyramiddrop")


def overhead(model: Any, plan: str, steps: int) -> tuple[float, float, float]:
    """Extra time of a decode step, as a share of the plain step at the same cache, with its 95 % interval."""
    pixels = torch.randn(1, 3, SIDE * 14, SIDE * 14)
    features = model.model.get_image_features(pixels).pooler_output[0]
    handle = winnow.compress(model, plan)
    ids = prompt(CONTENT)
    ours = model(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1).past_key_values
    held = [layer.keys.shape[2] - TEXT for layer in ours.layers]
    handle.detach()
    theirs = native(model, features, max(held))().past_key_values  # type: ignore[attr-defined]
    for layer, tokens in zip(theirs.layers, held, strict=True):  # as many slots in each layer as ours has
        layer.keys, layer.values = layer.keys[:, :, -tokens - TEXT :], layer.values[:, :, -tokens - TEXT :]
    token, shares = torch.tensor([[7]]), []

    def step(cache: Any, position: int) -> object:
        return model(input_ids=token, past_key_values=cache, position_ids=torch.tensor([[position]]), use_cache=True)

    for turn in range(steps + 10):
        _, plain = clocked(lambda: step(theirs, ids.shape[1] + turn), model.device)  # noqa: B023
        handle = winnow.compress(model, plan)
        _, spent = clocked(lambda: step(ours, ids.shape[1] + turn), model.device)  # noqa: B023
        handle.detach()
        if turn >= 10:  # warm-up
            shares.append(spent / plain - 1)
    return interval(np.array(shares))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, found, late = build(options.layers), {}, False
    with torch.inference_mode():
        for plan in PLANS:
            value, low, high = found[plan] = overhead(model, plan, options.steps)
            late |= high > GATE
            print(f"{plan:28} a decoded token takes {value:+.2%} [{low:+.2%}, {high:+.2%}] (gate {GATE:.0%})")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return int(late)


if __name__ == "__main__":
    sys.exit(main())
