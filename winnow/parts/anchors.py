"""Anchors: tokens in some frames of a segment, into which its other tokens are merged (FastVID)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from winnow.core.reduction import Reduction
from winnow.core.select import rank_of, ranked
from winnow.parts.density_peaks import peak_scores
from winnow.parts.segments import ends


@lru_cache(maxsize=64)
def per_frame(counts: tuple[int, ...], device: torch.device) -> Int[Tensor, " t"]:
    """Numbers that are known from shapes, on the device."""
    return torch.tensor(counts, device=device)


def best_of_frames(score: Float[Tensor, "b t p"], count: Int[Tensor, "*b t"]) -> Bool[Tensor, "b t p"]:
    """So many tokens of each frame that have the highest scores."""
    return rank_of(score.flatten(0, 1)).view_as(score) < count[..., None]


def density_of_rest(
    tokens: Float[Tensor, "b t p d"],
    score: Float[Tensor, "b t p"],
    broken: Bool[Tensor, "b t p"],
    best: Sequence[int],
    neighbours: int,
) -> Float[Tensor, "b t p"]:
    """How good a centre each token of a frame is among those that are not its best, which are at −inf.

    Args:
        score: by which tokens are best.
        best: how many of each frame.
        neighbours: tokens by which density is measured, the token itself among them.
    """
    found = torch.full_like(score, -torch.inf)
    for i, t in product(range(score.shape[0]), range(score.shape[1])):
        rest = ranked(score[i, t, None])[0, best[t] :].sort().values
        own, _ = peak_scores(tokens[i, t, rest], neighbours, broken[i, t, rest])
        found[i, t, rest] = own.to(score.dtype).clamp_min(torch.finfo(score.dtype).min)
    return found


def anchor_quotas(
    segment: Int[Tensor, "b t"], context: Int[Tensor, " t"], every: int, room: int, exact: bool = True
) -> Int[Tensor, "b t"]:
    """How many anchors each frame has: in a segment's last frame and every few before it, as equally as it goes.

    Args:
        segment: numbers, ascending.
        context: what each frame adds to the anchors of its segment.
        every: frames from one with anchors to the next; fewer where they would not fit.
        room: anchors that a frame can have.
        exact: whether the later frames with anchors have one more where numbers do not divide; else it is lost.
    """
    total = torch.zeros_like(segment).scatter_add_(1, segment, context.expand_as(segment)).gather(1, segment)
    first, last = ends(segment)
    length, stride = last - first + 1, torch.ones_like(segment)
    for step in range(2, every + 1):
        frames = (length + step - 1) // step
        most = total // frames + (total % frames > 0) * exact
        stride = torch.where(most <= room, step, stride)
    frames = (length + stride - 1) // stride
    back = last - torch.arange(segment.shape[1], device=segment.device)
    more = (back // stride < total % frames) * exact
    return torch.where(back % stride == 0, total // frames + more, 0)


def merged_into_anchors(
    x: Float[Tensor, "v d"],
    frame: Int[Tensor, " v"],
    segment: Int[Tensor, " v"],
    rest: Bool[Tensor, " v"],
    anchors: Int[Tensor, " a"],
    beta: float,
    alone: Bool[Tensor, " a"] | None = None,
) -> Float[Tensor, "a v"]:
    """What each anchor of one item becomes, as weights of the tokens.

    Of every frame with anchors, the anchor that is most alike gets a token of the segment; the first among equals. An
    anchor to which n tokens belong, itself among them, becomes w times itself and 1 − w times their mean, where w is
    1 / (n + 1), and no less than `beta`.

    Args:
        x: tokens of unit length.
        frame, segment: of each token.
        rest: the tokens that are merged, anchors among them.
        anchors: as indices.
        alone: anchors that get the tokens of their own frame only.
    """
    own, number = frame[anchors], torch.arange(anchors.shape[0], device=anchors.device)[:, None]
    reached = rest & (segment[anchors][:, None] == segment)
    if alone is not None:
        reached = reached & ((own[:, None] == frame) | ~alone[:, None])
    alike = (x[anchors] @ x.T).masked_fill(~reached, -torch.inf)
    # The anchors of a frame go by the number of its first one.
    group = (own[:, None] == own).to(torch.uint8).argmax(1)[:, None].expand_as(alike)
    best = torch.full_like(alike, -torch.inf).scatter_reduce_(0, group, alike, "amax")
    found = reached & (alike == best.gather(0, group))
    order = torch.where(found, number, anchors.shape[0])
    first = torch.full_like(order, anchors.shape[0]).scatter_reduce_(0, group, order, "amin")
    found &= first.gather(0, group) == number
    count = found.sum(1, keepdim=True)
    weight = (1 / (count + 1).to(x.dtype)).clamp_min(beta)
    rows = found * ((1 - weight) / count.clamp_min(1))
    return rows.scatter_add(1, anchors[:, None], weight)


def with_anchors(
    x: Sequence[Float[Tensor, "n d"]],
    slot: Int[Tensor, "b n"],
    kept: Bool[Tensor, "b t p"],
    anchor: Bool[Tensor, "b t p"],
    left_out: Bool[Tensor, "b t p"],
    segment: Int[Tensor, "b t"],
    counts: tuple[int, ...],
    salient: int,
    beta: float,
    alone: Bool[Tensor, "b t"] | None = None,
) -> Reduction:
    """The map of whole videos: tokens that are kept as they are, and anchors as `merged_into_anchors` has them.

    Args:
        x: tokens of unit length of each item, in its own order.
        slot: frame · p + place of each of them.
        kept, anchor: which tokens are outputs: of each item `counts`, of which `salient` are kept.
        left_out: those that are not merged.
        alone: frames whose anchors get tokens of their own frame only.
    """
    order = slot.argsort(1)
    frame = torch.arange(slot.shape[1], device=slot.device) // kept.shape[2]
    chosen = Reduction.select((kept | anchor).flatten(1).gather(1, slot), counts=counts)
    rows = []
    for i, count in enumerate(counts):
        at = slot[i][chosen.representatives[i, :count]]
        row = (~anchor[i].flatten()[at]).sort(stable=True).indices[: count - salient]
        own, by_themselves = at[row], None if alone is None else alone[i][frame[at[row]]]
        rest, segments = ~left_out[i].flatten(), segment[i][frame]
        merged = merged_into_anchors(x[i][order[i]], frame, segments, rest, own, beta, by_themselves)
        whole = torch.zeros(count, slot.shape[1], dtype=merged.dtype, device=at.device).scatter_(1, at[:, None], 1)
        rows.append(whole.index_copy(0, row, merged)[:, slot[i]])
    mixed = Reduction.mix(pad_sequence(rows, batch_first=True), representative=chosen.representatives)
    return replace(mixed, counts=chosen.counts)


def anchor_quotas_naive(
    segment: Sequence[int], context: Sequence[int], every: int, room: int, exact: bool = True
) -> list[int]:
    """The same for one video, over lists."""
    quotas = [0] * len(segment)
    for number in set(segment):
        own = [t for t in range(len(segment)) if segment[t] == number][::-1]
        total = sum(context[t] for t in own)
        for stride in range(every, 0, -1):
            chosen = own[::stride]
            given = [total // len(chosen) + (exact and i < total % len(chosen)) for i in range(len(chosen))]
            if max(given) <= room or stride == 1:
                break
        for t, count in zip(chosen, given, strict=True):
            quotas[t] = count
    return quotas


def merged_into_anchors_naive(
    x: Tensor,
    frame: Sequence[int],
    segment: Sequence[int],
    rest: Sequence[bool],
    anchors: Sequence[int],
    beta: float,
    alone: Sequence[bool] | None = None,
) -> Tensor:
    """The same token by token."""
    members: dict[int, list[int]] = {a: [] for a in anchors}
    for v in range(len(frame)):
        for t in sorted({frame[a] for a in anchors}):
            own = [a for i, a in enumerate(anchors) if frame[a] == t and segment[a] == segment[v]]
            own = [a for a in own if alone is None or not alone[list(anchors).index(a)] or frame[v] == t]
            if own and rest[v]:
                members[max(own, key=lambda a: float(x[a] @ x[v]))].append(v)
    rows = torch.zeros(len(anchors), len(frame), dtype=x.dtype)
    for row, (anchor, own) in zip(rows, members.items(), strict=True):
        weight = max(beta, 1 / (len(own) + 1))
        row[own] = (1 - weight) / max(1, len(own))
        row[anchor] += weight
    return rows
