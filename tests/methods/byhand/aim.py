"""Half of the tokens of a tile merged into their likest, then a quarter; PageRank in the layer before each cut."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from byhand import Choice, Cut, Entry, Hand, Reference, Seen, cut, share, top
from torch import Tensor
from torch.nn.functional import normalize

from methods.byhand import tiles_of

SETTINGS = {"rounds": 2, "first": 2, "last": 3, "left": "20%"}


def merged(x: Tensor, rounds: int) -> list[tuple[int, Tensor]]:
    """For each output, its place among the tokens and its row, in the order of the tokens.

    Between rounds, tokens in even places that were not merged come first, the likest first.
    """
    rows = list(enumerate(x))
    for number in range(rounds):
        gone = min(len(x) // 2 ** (number + 1), len(rows) // 2)
        if gone == 0:
            break
        alike = normalize(torch.stack([row for _, row in rows]), dim=-1)
        even, odd = range(0, len(rows), 2), range(1, len(rows), 2)
        best = {i: odd[int(top(alike[list(odd)] @ alike[i], 1))] for i in even}
        ranked = sorted(best, key=lambda i: -float(alike[i] @ alike[best[i]]))
        groups = {i: [i] for i in ranked[gone:]} | {j: [j] for j in odd}
        for i in ranked[:gone]:
            groups[best[i]].append(i)
        rows = [(rows[j][0], torch.stack([rows[i][1] for i in own]).mean(0)) for j, own in groups.items()]
    return sorted(rows, key=lambda row: row[0])


def page_rank(weights: Tensor) -> Tensor:
    """`[H, n, n]` attention to `[n]`; a softmax at a tenth of the temperature is the tenth power, scaled."""
    votes = weights.double() ** 10
    votes = votes / votes.sum(-1, keepdim=True)
    worth = torch.full((len(votes), len(votes[0])), 1 / len(votes[0]), dtype=torch.float64)
    for _ in range(5):
        worth = torch.einsum("hi,hij->hj", worth, votes)
    return (worth**2).mean(0).sqrt()


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    rounds: int,
    first: int,
    last: int,
    left: int | str,
) -> Hand:
    entered: dict[int, int] = {}

    def merge(seen: Sequence[Seen]) -> Seen:
        now = seen[-1]
        hidden, stay = now.hidden.clone(), torch.ones(len(now.held), dtype=torch.bool)
        for number, content in enumerate(entry.content):
            stay[content] = False
            for tile in tiles_of(reference, entry, number):
                for place, row in merged(now.hidden[0, content[tile]], rounds):
                    hidden[0, content[tile[place]]] = row
                    stay[content[tile[place]]] = True
            entered[number] = int(stay[content].sum())
        return Seen(hidden[:, stay], now.held[stay])

    def at(layer: int) -> Choice:
        def choose(number: int, rows: Tensor, seen: Sequence[Seen]) -> Tensor:
            before = seen[layer - 1]
            rank = page_rank(reference.lm_attention(layer - 1, before, entry))
            now = [int((before.held == seen[-1].held[row]).nonzero()[0, 0]) for row in rows]
            n, end = entered[number], share(left, entered[number], "down")
            keep = int(
                n - (layer - first + 1) / (last - first + 1) * (n - float(str(left).rstrip("%")) / 100 * n) + 1e-9
            )
            return rows[top(rank[now], max(end, keep))]

        return choose

    cuts: dict[int, Cut] = {0: merge} if rounds else {}
    return Hand(entry, cuts | {layer: cut(entry, at(layer)) for layer in range(first, last + 1)})
