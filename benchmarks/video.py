"""Prefill of one long video under methods of videos, against the plain model and the same model with as few tokens.

A model of the class of Qwen2.5-VL with random weights and a narrow language model reads a video of 96 × 16 × 16 tokens:
six scenes that stand still but for a part of the picture. It is encoded beforehand, so that no tower runs. One thread;
in each round the plain prefill runs once, then each method and what it is compared with, in an order drawn anew;
medians with bootstrap intervals. Run with nothing else on the machine: `make bench-video`.

- efficiency = (t_full − t_method) / (t_full − t_native): 100 % means that the method itself costs nothing. Native is
  the plain model with as many tokens as the method leaves; where layers read unequal numbers, the mean over the layers.
- selection: scores, choice and packing inside the prefill, and its share of the plain one. What is read of the tower
  for it (`signals`) is read while it encodes, once.

Gated are methods that score tokens: by declaration they build no table of pairs, by what they did they kept tokens as
they were, before the language model. The others are reported: `pairs` compare tokens with one another, `merge` make new
ones, `inside` go on in the language model.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from groups import compares
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

import winnow
from winnow.bench.clock import clocked
from winnow.bench.intervals import efficiency, median
from winnow.bench.prefills import attached, machine
from winnow.contract import Method
from winnow.core.ledger import Ledger
from winnow.core.registry import Entry, method_class, picture_methods

VIDEO, TEXT, SIDE, SCENE, PATCH = 501, 32, 16, 16, 4
WIDTH, LAYERS, SHARE, GATE = 128, 6, 0.10, 0.95
# Without a budget: settings that leave about as little.
SETTINGS: dict[str, dict[str, Any]] = {
    "dycoke": {"k": 1.0, "p": 0.0},
    "prunevid": {"beta": 0.25, "alpha": 0.4},
    "visual-context-window-extension": {"strides": (3.0,), "window": None},
}
# They were made for pictures of some thousand tokens, and compare each token with all others, or with all that is kept.
QUADRATIC = ("aim", "cdpruner", "divprune", "mmtok", "token-correlation-compression", "vispruner")


@dataclass(frozen=True)
class Case:
    """A method, and what is known of it before it is timed.

    Attributes:
        group: score, pairs, merge or inside.
        encoded: the video, encoded under the method.
        layers: visual tokens that each layer reads.
        signals: milliseconds of what is read of the tower.
    """

    method: Method
    group: str
    encoded: Any
    layers: tuple[int, ...]
    signals: float


def build(layers: int) -> Qwen2_5_VLForConditionalGeneration:
    """A narrow model of the real class."""
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 512, "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": layers,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32768,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6},
        },
        vision_config={
            "depth": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": WIDTH,
            "patch_size": PATCH, "window_size": 8 * PATCH, "fullatt_block_indexes": [1, 3],
        },
        image_token_id=VIDEO - 1,
        video_token_id=VIDEO,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def video(frames: int) -> dict[str, torch.Tensor]:
    """What the encoder is given: scenes that stand still but for a fifth of the picture, with a little noise."""
    patches, values = 4 * SIDE * SIDE, 3 * 2 * PATCH * PATCH
    scenes = torch.randn(-(-frames // SCENE), 1, patches, values).expand(-1, SCENE, -1, -1).flatten(0, 1)[:frames]
    pixels = scenes + 0.02 * torch.randn(frames, patches, values)
    moving = patches // 5
    for t in range(frames):
        start = 7 * t * 4 % (patches - moving)
        pixels[t, start : start + moving] = torch.randn(moving, values)
    grid = torch.tensor([[frames, 2 * SIDE, 2 * SIDE]])
    return {"pixel_values_videos": pixels.flatten(0, 1), "video_grid_thw": grid}


def prefill(model: Any, tokens: int, encoded: Any) -> Callable[[], object]:
    """A prefill of so many tokens of a video between two pieces of text."""
    text = torch.arange(5, 5 + TEXT)[None]
    ids = torch.cat([text[:, :8], torch.full((1, tokens), VIDEO), text[:, 8:]], 1)
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    given = {"input_ids": ids, "position_ids": positions, "mm_encoder_outputs": {"video": encoded}}
    return lambda: model(**given, use_cache=True, logits_to_keep=1)


def asked_for(only: Iterable[str]) -> Iterator[tuple[Entry, str]]:
    """The training-free methods of the connector or the decoder, and why one is left out, if it is."""
    for entry in picture_methods():
        if entry.family == "user" or entry.kind != "training-free" or not {"connector", "decoder"} & {*entry.stages}:
            continue
        if only and entry.slug not in only:
            continue
        reason = ""
        if not only and "connector" not in entry.stages:
            reason = "acts inside the language model alone, as `make bench` times it"
        if not only and entry.slug in QUADRATIC:
            reason = "compares each token with all others or with all that is kept, which takes minutes"
        yield entry, reason


def cases(model: Any, given: dict[str, torch.Tensor], plain: torch.Tensor, only: Iterable[str]) -> list[Case]:
    """Every method that runs behind the tower of this model, run once."""
    content, found = len(plain), []
    for entry, reason in asked_for(only):
        if reason:
            print(f"{entry.slug:32s} left out: {reason}")
            continue
        kind = method_class(entry.slug)
        try:
            method = kind(**SETTINGS.get(entry.slug, {}))
            if kind.takes_budgets():
                method = method.at_budget(round(SHARE * content), content)
            with winnow.compress(model, method) as handle:
                if handle.bind(method).acts_in_tower:
                    raise winnow.WinnowError("acts in the tower, which does not run here")
                handle.timing = True
                encoded = model.base_model.get_video_features(**given)
                signals = encoded.winnow.times.get("select", 0.0)
                # The same for all; one copy is enough.
                encoded.pooler_output, encoded.last_hidden_state = (plain,), None
                prefill(model, content, encoded)()
                ledger = handle.last
        except winnow.WinnowError as error:
            print(f"{entry.slug:32s} left out: {str(error).partition('; ')[0]}")
            continue
        layers = tuple(row[0] - TEXT for row in ledger.layer_tokens)
        found.append(Case(method, group_of(kind, ledger), encoded, layers, signals))
    return found


def group_of(kind: type[Method], ledger: Ledger) -> str:
    """What a method does, by its declaration and by its maps."""
    if len(set(ledger.layer_tokens)) > 1:
        return "inside"
    if compares(kind):
        return "pairs"
    maps = [reduction for _, _, reduction in ledger.items[0].reductions]
    return "score" if all(own.is_selection and own.ordered for own in maps) else "merge"


def measure(model: Any, found: list[Case], plain: torch.Tensor, rounds: int) -> list[dict[str, Any]]:
    """Interleaved rounds behind one that warms up."""
    content = len(plain)
    natives = {
        n: prefill(model, n, BaseModelOutputWithPooling(pooler_output=(plain[:n].clone(),)))
        for n in sorted({content, *(n for case in found for n in case.layers)})
    }
    times: dict[Any, list[float]] = {key: [] for key in (*natives, *(case.method.slug for case in found))}
    chosen: dict[str, list[float]] = {case.method.slug: [] for case in found}
    order, rng = [*natives, *found], random.Random(0)
    for _ in range(-1, rounds):
        rng.shuffle(order)
        for one in order:
            if isinstance(one, int):
                spent, key = clocked(natives[one], model.device)[1], one
            else:
                spent, key = timed(model, one, content, chosen), one.method.slug
            times[key].append(spent)
    return [figures(case, {k: np.array(v[1:]) for k, v in times.items()}, chosen, content) for case in found]


def timed(model: Any, case: Case, content: int, chosen: dict[str, list[float]]) -> float:
    """Milliseconds of a prefill under a method; those of its selection are noted."""
    run = prefill(model, content, case.encoded)
    with attached(model, case.method, case.encoded) as handle:
        handle.timing = True
        spent = clocked(run, model.device)[1]
        read, phases = handle.last.layer_tokens, handle.last.times
    if tuple(row[0] - TEXT for row in read) != case.layers:
        raise SystemExit(f"{case.method.slug} read {read}, and {case.layers} before")
    chosen[case.method.slug].append(phases["select"] - case.signals)
    return spent


def figures(case: Case, times: dict[Any, np.ndarray], chosen: dict[str, list[float]], content: int) -> dict[str, Any]:
    """Medians with their intervals."""
    full, own = times[content], times[case.method.slug]
    native = sum(times[n] for n in case.layers) / len(case.layers)
    selection = np.array(chosen[case.method.slug][1:])
    values = {"full_ms": full, "method_ms": own, "native_ms": native, "speedup": full / own}
    values |= {"selection_ms": selection, "selection_share": selection / full}
    found = {name: median(x) for name, x in values.items()} | {"efficiency": efficiency(full, own, native)}
    result: dict[str, Any] = {name: (m.value, m.low, m.high) for name, m in found.items()}
    kept = sum(case.layers) / len(case.layers)
    result |= {"plan": case.method.slug, "group": case.group, "kept": kept, "signals_ms": case.signals}
    return result | {"pass": case.group != "score" or result["efficiency"][1] >= GATE}


def written(r: dict[str, Any]) -> str:
    e, s = r["efficiency"], r["selection_share"]
    verdict = "" if r["group"] != "score" else "  pass" if r["pass"] else "  FAIL"
    return (
        f"{r['plan']:32s} {r['group']:7s}{r['kept']:8,.0f} {r['full_ms'][0]:9,.0f} {r['method_ms'][0]:8,.0f} "
        f"{r['native_ms'][0]:8,.0f} {r['speedup'][0]:7.2f}×  {e[0]:6.1%} [{e[1]:6.1%}, {e[2]:6.1%}]  "
        f"{r['selection_ms'][0]:8,.1f}  {s[0]:6.2%} [{s[1]:6.2%}, {s[2]:6.2%}] {r['signals_ms']:9,.1f}{verdict}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96 * SIDE * SIDE, help="of the video; whole frames of 256")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the language model")
    parser.add_argument("--only", nargs="*", default=[], metavar="SLUG", help="these, whatever they cost")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    frames, rest = divmod(options.tokens, SIDE * SIDE)
    if frames < 1 or rest:
        parser.error(f"--tokens {options.tokens}: frames have {SIDE * SIDE} tokens; give a multiple.")
    torch.set_num_threads(1)
    # The text is made of numbers: which of its tokens are the question does not matter to a time.
    warnings.simplefilter("ignore", winnow.WinnowWarning)
    with torch.no_grad():
        model = build(options.layers)
        given = video(frames)
        print(f"{machine()}; {options.layers} layers × {WIDTH}, {options.tokens:,} visual tokens and {TEXT} of text")
        print(f"{options.rounds} interleaved rounds; milliseconds; intervals are 95 %")
        plain = model.base_model.get_video_features(**given).pooler_output[0]
        found = cases(model, given, plain, options.only)
        results = measure(model, found, plain, options.rounds)
    print(
        f"{'method':32s} {'group':7s}{'kept':>8s} {'full':>9s} {'method':>8s} {'native':>8s} {'speed-up':>8s}  "
        f"{'efficiency':25s}{'selection':>9s}  {'of the full prefill':23s} {'signals':>9s}"
    )
    for result in results:
        print(written(result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(not all(result["pass"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
