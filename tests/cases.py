"""The probes of the tests, by hand as well, and the comparison of a compressed model with the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import zoo
from byhand import Cut, Entry, Hand, Reference, Seen, cut, keeping, share, top
from probes import (
    STEPS,
    Folded,
    Forgotten,
    Halve,
    Pick,
    Probed,
    Received,
    Tapped,
    forward,
    generate,
    new_tokens,
    score,
    step_logits,
)
from torch import Tensor, nn

import winnow

ByHand = Callable[[Reference, dict[str, Tensor], Entry], Hand]

TOWERS = ("llava_clip", "llava_siglip", "llava_next")  # families that offer `features`


class Case(NamedTuple):
    """A probe, and what it does by hand."""

    plan: Any
    by_hand: ByHand


def picking(entry: Entry, keep: int | str) -> Cut:
    """By hand, what `Pick(keep)` does at a layer."""

    def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
        return rows[top(score(seen[-1].hidden[0, rows]), share(keep, len(entry.content[number])))]

    return cut(entry, choose)


def pick(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str, layer: int = 0) -> Hand:
    return Hand(entry, {layer: picking(entry, keep)})


def received(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int | str) -> Hand:
    seen = reference.vision(sample).received[1] if entry.cells else []
    scores = [seen[picture].mean(0)[cells] for picture, cells in enumerate(entry.cells)]
    return Hand(entry, {0: keeping(entry, [top(own, share(keep, len(own))) for own in scores])})


def folded(reference: Reference, sample: dict[str, Tensor], entry: Entry) -> Hand:
    vision = reference.vision(sample)
    embeds, held = entry.embeds, entry.held
    for picture, item in enumerate(entry.items):
        features = vision.features[picture]
        tiles, length, _ = features.shape
        prefix, rows = length - reference.cells, features.flatten(0, 1)
        firsts = list(range(0, tiles * length, 2))[::-1]
        means = [rows[first : first + 2].mean(0) for first in firsts]
        made = reference.model.model.multi_modal_projector(torch.stack(means)[None])
        cells = entry.cells[picture].tolist()
        ids = []
        for first in firsts:
            tile, place = divmod(first, length)
            cell = tile * reference.cells + place - prefix if place >= prefix else None
            ids.append(cells.index(cell) if cell in cells else 0)
        before, after = held < item[0], held > item[-1]
        embeds = torch.cat([embeds[:, before], made, embeds[:, after]], 1)
        held = torch.cat([held[before], entry.content[picture][torch.tensor(ids)], held[after]])
    return Hand(replace(entry, embeds=embeds, held=held))


def merging(entry: Entry) -> Cut:
    """By hand, what `Halve` does: the mean of two neighbours stands where the first of them stood."""

    def apply(seen: Sequence[Seen]) -> Seen:
        now = seen[-1]
        hidden, stay = now.hidden.clone(), torch.ones(len(now.held), dtype=torch.bool)
        for content in entry.content:
            rows = torch.isin(now.held, content).nonzero()[:, 0].tolist()
            for first, second in zip(rows[::2], rows[1::2], strict=False):
                hidden[0, first] = (now.hidden[0, first] + now.hidden[0, second]) / 2
                stay[second] = False
        return Seen(hidden[:, stay], now.held[stay])

    return apply


def attended(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    cuts: Sequence[tuple[int, int, str]],
    compact: bool = False,
) -> Hand:
    """By hand, what `Tapped` and `Probed` do: (before which layer, by the last row of which layer, budget)."""

    def at(layer: int, keep: str) -> Any:
        def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
            own = seen[layer] if layer < len(seen) else seen[-1]
            weights = reference.lm_attention(layer, own, entry, compact)[:, -1].mean(0)
            return rows[top(weights[rows], share(keep, len(entry.content[number])))]

        return choose

    return Hand(entry, {before: cut(entry, at(layer, keep)) for before, layer, keep in cuts})


def forgotten(reference: Reference, sample: dict[str, Tensor], entry: Entry, *, keep: int, tau: float) -> Hand:
    def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
        weights = reference.lm_attention(2, seen[2], entry).mean(0)
        pictures = torch.isin(seen[2].held, torch.cat(entry.content))
        question = seen[2].held > entry.items[-1][-1]
        towards = float(weights[question][:, pictures].sum(1).mean())
        back = float(weights[pictures][:, question].sum(1).mean())
        return rows[:0] if towards < tau and back < tau else rows

    return Hand(entry, {0: picking(entry, keep), 3: cut(entry, choose)})


CASES = {
    "picked": Case(Pick(keep="40%"), partial(pick, keep="40%")),
    "received": Case(Received(keep=10), partial(received, keep=10)),
    "folded": Case(Folded(), folded),
    "merged": Case(Halve(at="layers[2]"), lambda r, s, e: Hand(e, {2: merging(e)})),
    "tapped": Case(Tapped(), partial(attended, cuts=((2, 1, "50%"),))),
    "probed": Case(Probed(), partial(attended, cuts=((1, 1, "50%"), (2, 2, "25%"), (3, 3, "12.5%")))),
    "forgotten": Case(Forgotten(), partial(forgotten, keep=9, tau=0.5)),
}

# Before the LM by a signal, merged and out of order, in three cuts: for what does not depend on how a choice is made.
SOME = ("received", "folded", "probed")

# What three users say next.
TURN = torch.randint(10, 200, (3, 5), generator=torch.Generator().manual_seed(3))


def pairs(kinds: Sequence[str] = tuple(CASES), builds: Sequence[str] = zoo.BUILDS) -> list[tuple[str, str]]:
    """(probe, build), where the build offers the point."""
    return [(kind, build) for kind in kinds for build in builds if kind != "folded" or build in TOWERS]


def identities(build: str) -> tuple[Any, ...]:
    """Probes that keep everything, by the way of each kind of selection."""
    return (
        Received(keep="100%"),
        Tapped(keep="100%"),
        Probed(shares=("100%",) * 3),
        Forgotten(**Forgotten.identity),
    )


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
        trace = reference.run(worked.entry, tokens[row, :-1].tolist(), worked.cuts, compact, worked.reads)
        assert logits.shape[1] == len(trace.logits) == STEPS
        assert (logits[row] - trace.logits).abs().max() <= tolerance, f"row {row}"
        assert tuple(layer[row] for layer in ledger.layer_tokens) == trace.lengths
        items = [item for item in ledger.items if item.row == row]
        assert [item.n_visual for item in items] == [len(content) for content in entry.content]
        for item, kept in zip(items, trace.kept(worked.entry), strict=True):
            assert sorted(set(item.kept.tolist())) == kept.tolist()


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
