"""Memory of a process that decodes from a compressed cache, against the number of requests in its batch.

    python benchmarks/cache_memory.py [--throughput] [--out docs/results/cache-memory.txt]

Each row is a process of its own. *Prefill* and *decode* are the most memory that was resident in each, beyond what the
process held before it read the prompts (the model, and Python); *cache* is what the storages of the cache take. *In
N bytes* is how many requests fit while they are decoded, the cache and all else: the line through the peaks of the
smallest and the largest batch. Memory needs no quiet machine; with `--throughput`, tokens per second of all requests
together, one does. Linux only: the peak is read from /proc and reset there.
"""

import argparse
import ctypes
import gc
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from cache import build

import winnow
from winnow.cache.layer import held_bytes

PLANS = ("full", "snapkv:keep=20%", "streaming-llm:keep=20%", "adakv:base=snapkv,keep=20%", "kv-quantized:bits=4")
MEMORY = 10**9
MB = 10**6


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def settle() -> int:
    """Give what is free back to the system, begin to look for the peak anew, and say what is resident."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return status("VmRSS")


def measure(plan: str, batch: int, context: int, steps: int, layers: int) -> dict[str, Any]:
    """Peaks and throughput of one process."""
    torch.set_num_threads(1)
    model = build(layers)
    ids = torch.randint(1, 1000, (batch, context), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), winnow.compress(model, plan):
        model(input_ids=ids[:1, :64], use_cache=True)  # what is allocated once is there
        before = settle()
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        prefill = status("VmHWM") - before
        settle()
        start = time.perf_counter()
        for turn in range(steps):
            model(input_ids=torch.full((batch, 1), 1 + turn % 900), past_key_values=cache)
        spent = time.perf_counter() - start
        decode = status("VmHWM") - before
    return {"prefill": prefill, "decode": decode, "cache": held_bytes(cache), "speed": batch * steps / spent}


def fitting(peaks: dict[int, int], memory: int) -> int:
    """How many requests fit, by the line through the peaks of the smallest and of the largest batch."""
    (few, low), (many, high) = min(peaks.items()), max(peaks.items())
    each = (high - low) / (many - few)
    return int((memory - (low - few * each)) // each)


def in_own_process(*job: Any) -> dict[str, Any]:
    """`measure` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *job).result()


def lines(asked: argparse.Namespace) -> list[str]:
    """The table."""
    versions = f"torch {torch.__version__} (CPU), transformers {transformers.__version__}"
    found = [
        f"# python benchmarks/cache_memory.py{' --throughput' * asked.throughput}: {versions}, 1 thread",
        f"# {asked.layers} layers, 4 KV heads of 64, fp32; {asked.context} tokens read, {asked.steps} decoded; MB",
        f"{'plan':32}{'batch':>6}{'prefill':>9}{'decode':>9}{'cache':>9}" + f"{'tokens/s':>10}" * asked.throughput,
    ]
    print(*found, sep="\n")
    fits = []
    for plan in asked.plans:
        peaks = {}
        for batch in asked.batches:
            own = in_own_process(plan, batch, asked.context, asked.steps, asked.layers)
            peaks[batch] = own["decode"]
            sizes = "".join(f"{own[name] / MB:9.1f}" for name in ("prefill", "decode", "cache"))
            found.append(f"{plan:32}{batch:6}{sizes}" + f"{own['speed']:10.1f}" * asked.throughput)
            print(found[-1], flush=True)
        if len(peaks) > 1:
            fits.append(f"{plan:32}{fitting(peaks, MEMORY):6,} requests in 1 GB while decoding")
    print(*fits, sep="\n")
    return [*found, "", *fits]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", nargs="+", default=PLANS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--throughput", action="store_true", help="tokens per second as well: on a quiet machine")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if not sys.platform.startswith("linux"):
        parser.error("the peak of a process is read from /proc; run this on Linux")
    table = lines(asked)
    if asked.out:
        asked.out.write_text("\n".join(table) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
