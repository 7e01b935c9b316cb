"""A stream of thousands of frames: memory of the process, time of each phase, and how soon a question is answered.

A small LLaVA with random weights reads pictures one by one; a question is asked at each mark, while frames go on. The
gates are what is claimed: from the first mark on, slots and bytes of the cache stay the same and the process grows by
less than a twentieth; and the last frames take as long to select from as the first ones, within a quarter, beside what
their encoder takes, so that the sum is linear in the frames. Run with nothing else on the machine: `make bench-stream`.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import winnow

IMAGE, SIDE, PATCH = 999, 112, 14  # 8 × 8 tokens
PLAN = "stc:keep=16 + streaming-llm:keep=512,shift=true | positions=compact"
PAGE = os.sysconf("SC_PAGE_SIZE")


def build(layers: int) -> LlavaForConditionalGeneration:
    """A small model of the real class."""
    text = LlamaConfig(
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
        max_position_embeddings=4096,
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


def resident() -> int:
    """Bytes of the process that are in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE


def frame(number: int, scene: torch.Tensor) -> dict[str, torch.Tensor]:
    """A still scene over which a square moves; another scene every 100 frames."""
    if number % 100 == 0:
        scene.normal_(generator=torch.Generator().manual_seed(number))
    pixels = scene.clone()
    at = number * 3 % (SIDE - PATCH)
    pixels[..., at : at + PATCH, at : at + PATCH] = 2.0
    ids = torch.full((1, (SIDE // PATCH) ** 2 + 1), IMAGE)
    ids[0, 0] = 7
    return {"input_ids": ids, "pixel_values": pixels}


def run(frames: int, every: int, layers: int) -> list[dict[str, Any]]:
    """What is measured at each mark; times are milliseconds, of the frames since the mark before."""
    marks: list[dict[str, Any]] = []
    question, scene = torch.arange(10, 18)[None], torch.empty(1, 3, SIDE, SIDE)
    with winnow.stream(build(layers), PLAN) as session:
        session.timing = True
        before: dict[str, float] = {}
        for number in range(frames):
            session.feed(frame(number, scene))
            if (number + 1) % every:
                continue
            spent = {name: total - before.get(name, 0.0) for name, total in session.ledger.times.items()}
            before = session.ledger.times
            session.ask(question, max_new_tokens=8)
            ledger = session.ledger
            marks.append(
                {
                    "frames": ledger.frames,
                    "phases": {name: round(total / every, 3) for name, total in spent.items()},
                    "first_token": round(ledger.first_token_ms, 2),
                    "answer": round(ledger.answer_ms, 2),
                    "slots": sum(ledger.held),
                    "kv_bytes": ledger.kv_bytes,
                    "process_bytes": resident(),
                    "kept": ledger.kept,
                    "given": ledger.given,
                }
            )
            print(written(marks[-1]), flush=True)
    return marks


def written(mark: dict[str, Any]) -> str:
    phases = "  ".join(f"{name} {spent:6.2f}" for name, spent in mark["phases"].items())
    return (
        f"{mark['frames']:7,} frames  {phases} ms a frame  first token {mark['first_token']:6.1f} ms, "
        f"answer {mark['answer']:6.1f} ms  {mark['slots']:,} slots, {mark['kv_bytes']:,} bytes  "
        f"process {mark['process_bytes'] / 2**20:,.1f} MiB"
    )


def faults(marks: list[dict[str, Any]]) -> list[str]:
    """Which claims do not hold."""
    first, found = marks[0], []
    if any((mark["slots"], mark["kv_bytes"]) != (first["slots"], first["kv_bytes"]) for mark in marks):
        found.append("the cache does not hold as many slots and bytes at each mark")
    grown = max(mark["process_bytes"] for mark in marks) / first["process_bytes"] - 1
    if grown > 0.05:
        found.append(f"the process has grown by {grown:.1%}")
    print(f"process {grown:+.2%} from the first mark")
    third = max(1, len(marks) // 3)
    for phase in ("select", "prefill"):
        share = np.array([mark["phases"][phase] / mark["phases"]["encoder"] for mark in marks])
        ratio = float(np.median(share[-third:]) / np.median(share[:third]))
        print(f"{phase} of the last third of frames takes {ratio:.2f} of the first third's, beside the encoder")
        if ratio > 1.25:
            found.append(f"{phase} of late frames takes {ratio:.2f} times as long as of early ones")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=1_000)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    marks = run(options.frames, options.every, options.layers)
    if options.json:
        options.json.write_text(json.dumps({"plan": PLAN, "marks": marks}, indent=1), encoding="utf-8")
    found = faults(marks)
    for fault in found:
        print(f"FAILED: {fault}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
