"""The vision tower under steps at blocks, against the plain tower and against a tower that is given as few tokens.

One thread, interleaved rounds, medians. Each case keeps a share of the tokens from a block on, or merges in every
block; the ideal is the time of the plain blocks on as many tokens as each block read. Run with nothing else on the
machine: `make bench`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import transformers
from torch.nn.functional import normalize
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import winnow
from winnow.bench.clock import clocked
from winnow.contract import Method, Point, Reduce, Reduction, State, Step, VisionKeys

SIDE, DEPTH, WIDTH = 24, 12, 384


@dataclass(frozen=True)
class KeepFrom(Method):
    """[CLS] and every n-th patch of a tile, from a block on."""

    block: int = 2
    every: int = 4
    slug: ClassVar[str] = "keep-from"

    def steps(self, info):
        return (Step(Point("blocks", self.block), self.run),)

    def run(self, view, state):
        index = torch.arange(0, view.n, self.every)
        return Reduction.select(index.expand(view.b, -1), view.n), state


@dataclass(frozen=True)
class MergeInEach(Method):
    """The r most similar pairs of even and odd tokens become one in each block; attention goes by size, or not."""

    r: int = 40
    by_size: bool = True
    slug: ClassVar[str] = "merge-in-each"

    def steps(self, info):
        keys = [VisionKeys(i) for i in range(info.vision_depth)]
        return tuple(
            Step(Point("blocks", i, "mlp"), lambda v, s, k=k: self.run(k, v, s), (k,)) for i, k in enumerate(keys)
        )

    def run(self, keys, view, state):
        even, odd = torch.arange(0, view.n, 2), torch.arange(1, view.n, 2)
        r = min(self.r, len(even) - 1)
        size = state.summed.get("size", torch.ones(view.b, view.n))
        key = normalize(view[keys], dim=-1)
        best, partner = (key[:, even[1:]] @ key[:, odd].transpose(1, 2)).max(-1)
        ranked = best.argsort(dim=-1, descending=True) + 1
        stays = torch.cat([torch.zeros(view.b, 1, dtype=torch.int64), ranked[:, r:].sort(-1).values], 1)
        kept = stays.shape[1]
        cluster = torch.empty(view.b, view.n, dtype=torch.int64)
        cluster[:, odd] = torch.arange(len(odd)) + kept
        into = torch.cat([torch.zeros(view.b, 1, dtype=torch.int64), partner + kept], 1)
        cluster[:, even] = into.scatter(1, stays, torch.arange(kept).expand_as(stays))
        total = torch.zeros(view.b, view.n - r).scatter_add(1, cluster, size)
        representative = torch.cat([even[stays], odd.expand(view.b, -1)], 1)
        reduction = Reduction.assign(
            cluster, size / total.gather(1, cluster), m=view.n - r, representative=representative, ordered=False
        )
        state = State(summed={"size": size})  # the engine adds up what feeds an output
        return Reduce(reduction, log_bias=total.log() if self.by_size else None), state


def build() -> LlavaForConditionalGeneration:
    """A LLaVA-shaped model with random weights: 24 × 24 patches, a tower of 12 × 384; the LM does not matter here."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=6,
        image_size=SIDE * 14,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=500, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).eval()


def read(model: LlavaForConditionalGeneration, plan: Method | None, pixels: torch.Tensor) -> list[tuple[int, int]]:
    """Tokens of each tile that the attention and the MLP of each block read."""
    seen: list[int] = []
    hooks = []
    for block in model.model.vision_tower.encoder.layers:
        for module in (block.layer_norm1, block.mlp):
            hooks.append(module.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1])))
    with winnow.compress(model, plan if plan is not None else "full"):
        model.model.get_image_features(pixels)
    for hook in hooks:
        hook.remove()
    return list(zip(seen[::2], seen[1::2], strict=True))


def halves(
    model: LlavaForConditionalGeneration, tiles: int, n: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The attention half and the MLP half of a plain block on n tokens."""
    block = model.model.vision_tower.encoder.layers[0]
    x = torch.randn(tiles, n, WIDTH)
    return (
        lambda: x + block.self_attn(block.layer_norm1(x), attention_mask=None)[0],
        lambda: x + block.mlp(block.layer_norm2(x)),
    )


def measure(
    model: LlavaForConditionalGeneration, method: Method, pixels: torch.Tensor, rounds: int
) -> tuple[float, float, float, Sequence[tuple[int, int]]]:
    """Milliseconds of the encoder in full, under the method, and of the ideal; and what its blocks read."""
    tokens = read(model, method, pixels)
    parts = {n: halves(model, len(pixels), n) for pair in [(SIDE**2 + 1, SIDE**2 + 1), *tokens] for n in pair}
    found: dict[object, list[float]] = {"full": [], "method": [], **{(n, h): [] for n in parts for h in (0, 1)}}
    encode = lambda: model.model.get_image_features(pixels)  # noqa: E731
    for turn in range(rounds + 3):
        spent: dict[object, float] = {"full": clocked(encode, model.device)[1]}
        handle = winnow.compress(model, method)
        spent["method"] = clocked(encode, model.device)[1]
        handle.detach()
        for n, both in parts.items():
            spent |= {(n, h): clocked(half, model.device)[1] for h, half in enumerate(both)}
        if turn >= 3:  # warm-up
            for name, t in spent.items():
                found[name].append(t)
    t = {name: float(np.median(values)) for name, values in found.items()}
    whole = SIDE**2 + 1
    around = t["full"] - DEPTH * (t[(whole, 0)] + t[(whole, 1)])  # embeddings, norms and the projector
    ideal = around + sum(t[(a, 0)] + t[(b, 1)] for a, b in tokens)
    return t["full"], t["method"], ideal, tokens


CASES = {
    "every 2nd from block 2": KeepFrom(2, 2),
    "every 4th from block 2": KeepFrom(2, 4),
    "every 4th from block 6": KeepFrom(6, 4),
    "40 pairs in each block": MergeInEach(40, by_size=False),
    "40 pairs, by size": MergeInEach(40, by_size=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tiles", type=int, default=1, help="pictures that are encoded together")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, pixels = build(), torch.randn(options.tiles, 3, SIDE * 14, SIDE * 14)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, 1 thread, {options.rounds} rounds; ms")
    print(
        f"{'':26s}{'full':>8s}{'method':>8s}{'ideal':>8s}{'speed-up':>10s}{'over ideal':>12s}  tokens of the last block"
    )
    with torch.no_grad():
        for name, method in CASES.items():
            full, spent, ideal, tokens = measure(model, method, pixels, options.rounds)
            line = f"{name:26s}{full:8.1f}{spent:8.1f}{ideal:8.1f}{full / spent:9.2f}×{spent / ideal:12.3f}"
            print(f"{line}  {tokens[-1][1]}", flush=True)


if __name__ == "__main__":
    main()
