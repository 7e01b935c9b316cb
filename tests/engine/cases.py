"""The methods of the tests, as plans and by hand, and the comparison of a compressed model with the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import byhand_methods as hand
import pytest
import torch
import zoo
from byhand import Cut, Entry, Reference, cut, top
from probes import STEPS, forward, generate, new_tokens, score, step_logits
from torch import Tensor, nn

import winnow

ByHand = Callable[[Reference, dict[str, Tensor], Entry], hand.Hand]

METHODS = ("fastervlm", "vtc-cls", "hiprune", "divprune", "todre", "visionzip", "fastv", "pyramiddrop")

SUBSETS: dict[str, tuple[str, ByHand]] = {
    "fastervlm": ("fastervlm:keep=10", partial(hand.fastervlm, keep=10)),
    "vtc-cls": ("vtc-cls:keep=40%", partial(hand.vtc_cls, keep="40%")),
    "hiprune": (
        "hiprune:keep=12,alpha=0.9,object_layer=1",
        partial(hand.hiprune, keep=12, alpha=0.9, object_layer=1),
    ),
    "divprune": ("divprune:keep=40%", partial(hand.divprune, keep="40%")),
    "todre": ("todre:keep=9,tau=0.5", partial(hand.todre, keep=9, tau=0.5)),
    "visionzip": ("visionzip:keep=14,contextual=0.3", partial(hand.visionzip, keep=14, contextual=0.3)),
    "fastv": ("fastv:keep=50%,layer=2", partial(hand.fastv, keep="50%", layer=2)),
    "pyramiddrop": (
        "pyramiddrop:ratios=[50%,25%,12.5%],layers=[1,2,3]",
        partial(hand.pyramiddrop, ratios=("50%", "25%", "12.5%"), layers=(1, 2, 3)),
    ),
}


# What three users say next.
TURN = torch.randint(10, 200, (3, 5), generator=torch.Generator().manual_seed(3))


def runs_on(slug: str, build: str) -> bool:
    """Whether a method has what it needs: [CLS] for two of them."""
    return build in zoo.WITH_CLS or slug not in ("vtc-cls", "visionzip")


def pairs(methods: Sequence[str] = METHODS, builds: Sequence[str] = zoo.BUILDS) -> list[tuple[str, str]]:
    """(method, build), where the one runs on the other."""
    return [(slug, build) for slug in methods for build in builds if runs_on(slug, build)]


def proofs() -> list[Any]:
    """Every such pair, marked as evidence that the method runs on the build."""
    return [pytest.param(slug, build, marks=pytest.mark.system(slug, "model")) for slug, build in pairs()]


def identities(build: str) -> list[str]:
    """Plans that keep everything, one for each method that has such a setting and runs on the build."""
    from winnow.core.plan import Plan
    from winnow.core.registry import method_class

    classes = [method_class(slug) for slug in METHODS if runs_on(slug, build)]
    return [str(Plan((cls.configured(**cls.identity),))) for cls in classes if cls.identity is not None]


def check_against_hand(
    model: nn.Module,
    parts: Sequence[dict[str, Tensor]],
    plan: Any,
    by_hand: ByHand,
    *,
    tolerance: float = 1e-5,
    compact: bool = False,
) -> None:
    """Per-step logits, kept tokens and tokens of each layer of a compressed batch equal each sample worked by hand."""
    reference = Reference(model)
    inputs = zoo.collate(parts)
    with winnow.compress(model, plan) as handle:
        output = generate(model, inputs)
        ledger = handle.last
    logits, tokens = step_logits(output), new_tokens(output, inputs)
    for row, part in enumerate(parts):
        entry = reference.entry(part)
        worked = by_hand(reference, part, entry)
        trace = reference.run(worked.entry, tokens[row, :-1].tolist(), worked.cuts, compact)
        assert logits.shape[1] == len(trace.logits) == STEPS
        assert (logits[row] - trace.logits).abs().max() <= tolerance, f"row {row}"
        assert tuple(layer[row] for layer in ledger.layer_tokens) == trace.lengths
        items = [item for item in ledger.items if item.row == row]
        assert [item.n_visual for item in items] == [len(content) for content in entry.content]
        for item, kept in zip(items, trace.kept(worked.entry), strict=True):
            assert sorted(set(item.kept.tolist())) == kept.tolist()


def picking(entry: Entry, keep: int) -> Cut:
    """By hand, what `Pick(keep)` does at a layer."""
    return cut(entry, lambda number, rows, seen: rows[top(score(seen[-1].hidden[0, rows]), keep)])


def effect(model: nn.Module, inputs: dict[str, Tensor], plan: Any) -> float:
    """How much a plan changes the logits of the last token: a comparison is worth nothing where this is 0."""
    plain = forward(model, inputs).logits[:, -1]
    with winnow.compress(model, plan):
        return float((forward(model, inputs).logits[:, -1] - plain).abs().max())


def same(a: Any, b: Any) -> bool:
    """Generated ids and the logits of every step, bit for bit."""
    return torch.equal(a.sequences, b.sequences) and torch.equal(step_logits(a), step_logits(b))


def prolonged(inputs: dict[str, Tensor], sequences: Tensor, turn: Tensor = TURN) -> dict[str, Tensor]:
    """The ids and the mask of a conversation: prompt, answer, new turn. No pictures: they are in the cache."""
    ids = torch.cat([sequences, turn], 1)
    new = ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), new, dtype=torch.int64)], 1)
    return {"input_ids": ids, "attention_mask": mask}
