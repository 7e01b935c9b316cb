"""Selection alone against one block of a vision tower on the same tokens: what does choosing cost by itself?

One thread, 8 items of LLaVA-NeXT shape (2,880 tokens: a thumbnail and 2 × 2 crops of 24 × 24 patches, 1,024 wide), of
which 320 are kept. A block is shaped like one of ViT-L: 1,024 wide, 16 heads, an MLP of 4,096. Signals are random and
are not part of the time: reading them is the engine's work, which `benchmarks/prefill.py` measures. Each step of a
method is timed alone; one that needs what an earlier step remembered is left out, and said so.

    python benchmarks/selection.py [--only SLUG …]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from winnow.core.errors import WinnowError
from winnow.core.registry import method_class, picture_methods
from winnow.core.step import State
from winnow.testing import WITH_CLS, Picture, Subject

ITEMS, KEEP, WIDTH, HEADS, MLP = 8, 320, 1024, 16, 4096
PICTURE = Picture.tiled(24, 2, 2)
GATES = {"score": 0.15, "pairs": 1.0, "coverage": 2.0}  # of a block
# Others: pairs where they build a table of them. SparseVLM clusters what it drops; CoViPAL's scorer lets all tokens
# attend to all.
GROUPS = {"todre": "pairs", "cdpruner": "pairs", "covipal": "pairs", "sparsevlm": "pairs", "mmtok": "coverage"}


class Block(nn.Module):
    """A block of ViT-L, without its norms' parameters trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, MLP), nn.GELU(), nn.Linear(MLP, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.first(x)).view(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, WIDTH))
        return x + self.mlp(self.second(x))


def seconds(run: Callable[[], object], rounds: int) -> float:
    """The median of a few runs, behind one that warms up."""
    spent = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return sorted(spent[1:])[rounds // 2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="SLUG")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        return compare(asked.only, asked.rounds)


def compare(only: list[str], rounds: int) -> int:
    block, x = Block().eval(), torch.randn(ITEMS, PICTURE.lm.n_content, WIDTH)
    unit = seconds(lambda: block(x), rounds)
    print(f"torch {torch.__version__}, 1 thread; one block on {ITEMS} × {x.shape[1]} tokens: {unit * 1e3:,.0f} ms")
    print(f"{'method':<34} {'step':<16} {'ms':>9} {'blocks':>8} {'allowed':>8}")
    worst = 0
    info = replace(WITH_CLS, width=WIDTH, vision_width=WIDTH)
    for entry in picture_methods():
        if entry.family == "user" or (only and entry.slug not in only):
            continue
        kind = method_class(entry.slug)
        group = GROUPS.get(entry.slug, "pairs" if kind.pairwise else "score")
        try:
            method = kind().at_budget(KEEP, PICTURE.lm.n_content)
            subject = Subject(kind, {name: getattr(method, name) for name in kind.settings()}, (info,))
            acts = list(subject.acts())
        except (WinnowError, AssertionError) as error:
            print(f"{entry.slug:<34} not timed: {str(error)[:80]}")
            continue
        for act in acts:
            view = subject.view(act, PICTURE, b=ITEMS)
            try:
                spent = seconds(lambda act=act, view=view: act.step.act(view, State()), rounds)
            except KeyError:
                print(f"{entry.slug:<34} {act.step.at!s:<16} needs what an earlier step remembers")
                continue
            share, allowed = spent / unit, GATES[group]
            worst += share > allowed
            verdict = "" if share <= allowed else "  FAIL"
            print(f"{entry.slug:<34} {act.step.at!s:<16} {spent * 1e3:9.1f} {share:8.3f} {allowed:8.2f}{verdict}")
    return 1 if worst else 0


if __name__ == "__main__":
    sys.exit(main())
