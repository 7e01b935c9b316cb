"""Decoding from a compressed cache against the plain cache of the same prompt: time of a token, and bytes held.

One thread, interleaved pairs, medians with bootstrap intervals. Run with nothing else on the machine:
`make bench-cache`. The gates are those of what is claimed: a dense eviction is never slower than the plain cache, and
faster from 8 samples of 2,048 tokens on; heads of unequal length cost at most a tenth at one sample.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prefill import interval
from transformers import LlamaConfig, LlamaForCausalLM

import winnow
from winnow.bench.clock import clocked
from winnow.cache.layer import held_bytes

DENSE = ("snapkv:keep=20%", "streaming-llm:keep=20%")
MEMORY = 10**9  # bytes: how many requests fit into so many, counting their caches alone
RAGGED = ("adakv:base=snapkv,keep=20%",)
CODECS = ("kv-quantized:bits=4", "gear")
REPORTED = (1, 8)  # samples for which codecs, of which no speed is claimed, are timed as well


def build(layers: int) -> Any:
    """A decoder with grouped heads, random weights."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1000,
        max_position_embeddings=16384,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def measure(model: Any, plan: str, batch: int, context: int, steps: int) -> dict[str, Any]:
    """Time of a token as a share of the plain one's, with its 95 % interval, and bytes as a share of the plain ones."""
    ids = torch.randint(1, 1000, (batch, context), generator=torch.Generator().manual_seed(0))
    plain = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    handle = winnow.compress(model, plan)
    ours = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    shares = []
    for turn in range(steps + 5):
        token = torch.full((batch, 1), 1 + turn % 900)
        with handle.using("full"):
            _, theirs = clocked(lambda: model(input_ids=token, past_key_values=plain), model.device)  # noqa: B023
        _, spent = clocked(lambda: model(input_ids=token, past_key_values=ours), model.device)  # noqa: B023
        if turn >= 5:  # warm-up
            shares.append(spent / theirs)
    handle.detach()
    value, low, high = interval(np.array(shares))
    held = held_bytes(ours)
    share = held / held_bytes(plain)
    return {"time": value, "low": low, "high": high, "bytes": share, "fit": int(MEMORY // (held / batch))}


def late(plan: str, found: dict[str, Any], batch: int, context: int) -> bool:
    """Whether a figure breaks what is claimed."""
    if plan in DENSE:
        return found["low"] > 1.0 or (batch >= 8 and context >= 2048 and found["high"] >= 1.0)
    return plan in RAGGED and found["low"] > (1.1 if batch == 1 else 1.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--only", nargs="+", help="plans; by default one of each kind of storage")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, results, broken = build(options.layers), {}, False
    print(f"{'plan':32}{'context':>8}{'batch':>6}  time of a token          bytes  fit in 1 GB")
    with torch.inference_mode():
        for context in options.contexts:
            for batch in options.batches:
                codecs = CODECS if batch in REPORTED else ()
                for plan in options.only or (*DENSE, *RAGGED, *codecs):
                    found = measure(model, plan, batch, context, options.steps)
                    results[f"{plan}|{context}|{batch}"] = found
                    fails = late(plan, found, batch, context)
                    broken |= fails
                    interval_ = f"{found['time']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
                    space = f"{found['bytes']:6.1%}{found['fit']:12,}"
                    print(f"{plan:32}{context:8}{batch:6}  {interval_:24}{space}{'  FAIL' * fails}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
