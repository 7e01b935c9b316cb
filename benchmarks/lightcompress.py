"""Prefill with the methods that winnow and LightCompress both have, side by side on one shape of model.

    make bench-lightcompress LIGHTCOMPRESS=<checkout of github.com/ModelTC/LightCompress>

Its hooks need a transformers of 2024 and winnow one of today, so each side is a process with its own, and is compared
with its own plain model: efficiency = (t_full − t_method) / (t_full − t_ideal), and t_method − t_ideal in milliseconds.
The ideal is the plain model given as few tokens in each layer. Times are from the pixels to the first token. Rounds are
interleaved over both sides; one thread each, never both at once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from lightcompress_shape import CONTENT, KEEP, LAYER, TEXT, config, pixels, prompt
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

import winnow
from winnow.bench.clock import busy, clocked
from winnow.bench.intervals import median
from winnow.bench.prefills import machine

HERE = Path(__file__).resolve().parent
WARM = 3
PLANS = {
    "fastervlm": f"fastervlm:keep={KEEP}",
    "visionzip": f"visionzip:keep={KEEP}",
    "divprune": f"divprune:keep={KEEP}",
    "fastv": f"fastv:layer={LAYER},keep={KEEP}",
}
LAYERS_READ = {"fastv": LAYER}  # layers that read all tokens


class Theirs:
    """LightCompress in a process of its own, with its own transformers."""

    def __init__(self, checkout: Path, site: Path) -> None:
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, str(HERE / "lightcompress_side.py"), str(checkout.resolve())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env=os.environ | {"PYTHONPATH": str(site.resolve()), "TRANSFORMERS_VERBOSITY": "error"},
        )  # fmt: skip
        self._read("ready")

    def _read(self, wanted: str = "") -> str:
        line = self._process.stdout.readline().strip()  # type: ignore[union-attr]
        if not line or (wanted and line != wanted):
            raise SystemExit(f"LightCompress's side said {line!r} and ended; see above for its error.")
        return line

    def __call__(self, name: str) -> float:
        self._process.stdin.write(f"{name}\n")  # type: ignore[union-attr]
        return float(self._read())


class Ours:
    """winnow in this process."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = LlavaForConditionalGeneration(config()).eval()
        for plan in PLANS.values():
            with winnow.compress(self.model, plan) as handle:
                self._prefill()
                read = [layer[0] - TEXT for layer in handle.last.layer_tokens]
            full = LAYERS_READ.get(plan.partition(":")[0], 0)
            if read != [CONTENT] * full + [KEEP] * (len(read) - full):
                raise SystemExit(f"{plan} read {read}")

    def _prefill(self) -> object:
        return self.model(input_ids=prompt(CONTENT), pixel_values=pixels(), use_cache=True, logits_to_keep=1)

    def _native(self) -> object:
        rows = self.model.model.get_image_features(pixels()).pooler_output[0][:KEEP]
        pooled = BaseModelOutputWithPooling(pooler_output=[rows])
        return self.model(
            input_ids=prompt(KEEP), mm_encoder_outputs={"image": pooled}, use_cache=True, logits_to_keep=1
        )

    def __call__(self, name: str) -> float:
        if name not in PLANS:
            return self._clocked(self._native if name == "native" else self._prefill)
        with winnow.compress(self.model, PLANS[name]):
            return self._clocked(self._prefill)

    def _clocked(self, run: Callable[[], object]) -> float:
        return clocked(run, self.model.device)[1]


def ideal(times: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Milliseconds in each round."""
    share = LAYERS_READ.get(name, 0) / config().text_config.num_hidden_layers
    return share * times["full"] + (1 - share) * times["native"]


def efficiency(times: dict[str, np.ndarray], name: str) -> np.ndarray:
    """In each round."""
    return 100 * (times["full"] - times[name]) / (times["full"] - ideal(times, name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of LightCompress")
    parser.add_argument("site", type=Path, help="the folder with its transformers")
    parser.add_argument("--rounds", type=int, default=120)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    print(f"{CONTENT} visual tokens, {KEEP} kept; {options.rounds} interleaved rounds; %, intervals are 95 %")
    if reason := busy():
        print(f"busy: {reason}")
    with torch.no_grad():
        sides = {"winnow": Ours(), "LightCompress": Theirs(options.checkout, options.site)}
        spent = {side: {name: [] for name in ("full", "native", *PLANS)} for side in sides}
        for turn in range(WARM + options.rounds):
            for name in ("full", "native", *PLANS):
                for side, run in sides.items():
                    took = run(name)
                    if turn >= WARM:
                        spent[side][name].append(took)
    times = {side: {name: np.array(values) for name, values in own.items()} for side, own in spent.items()}
    for side, own in times.items():
        print(f"{side:14s}full {np.median(own['full']):7.1f} ms, native {np.median(own['native']):7.1f} ms")
    print(f"{'':12s}{'winnow':24s}{'LightCompress':24s}{'by':40s}{'ms over the ideal':24s}LightCompress")
    behind = []
    for name in PLANS:
        own, other = (efficiency(times[side], name) for side in sides)
        over, others = (times[side][name] - ideal(times[side], name) for side in sides)
        by = median(own - other)
        verdict = "ahead" if by.low > 0 else "behind" if by.high < 0 else "not told apart"
        behind += [name] * (verdict == "behind")
        print(f"{name:12s}{told(own)}{told(other)}{told(own - other)}{verdict:16s}{told(over)}{told(others)}")
    raise SystemExit(bool(behind))


def told(values: np.ndarray) -> str:
    found = median(values)
    return f"{found.value:.1f} [{found.low:.1f}, {found.high:.1f}]".ljust(24)


if __name__ == "__main__":
    main()
