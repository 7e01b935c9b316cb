"""What the interpreter moves: lanes (the tokens of one item), flows (one sequence in a stack), traces and caches."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.core.reduction import Reduction

from .toy import Picture

Key = tuple[object, ...]  # (number of the method, name); or ("route",) and the like, which belong to nobody


@dataclass(eq=False)
class Lane:
    """One item (in the tower: one tile of it) as it stands.

    `carried` and `summed` hold `[n, …]` for each token: after a reduction an output has what its representative had, or
    the sum over its sources. This is where State.token and State.summed live between steps.
    """

    picture: Picture
    layout: Layout
    ids: Tensor
    entry: int
    row: int = 0
    carried: dict[Key, Tensor] = field(default_factory=dict)
    summed: dict[Key, Tensor] = field(default_factory=dict)
    item: dict[Key, Tensor] = field(default_factory=dict)
    tiles: list[Flow] = field(default_factory=list)
    features: tuple[Tensor, Tensor] | None = None  # (ids, rows) as the projector read them
    ordered: bool = True  # outputs of the connector stand where their representatives stood

    def carry(self, reduction: Reduction) -> None:
        """Take every per-token field through a reduction, whoever made it."""
        feeds = (reduction.to_matrix() != 0).double()
        self.carried = {k: v[reduction.representatives] for k, v in self.carried.items()}
        self.summed = {k: torch.einsum("mn,n...->m...", feeds, v) for k, v in self.summed.items()}
        self.ids = self.ids[reduction.representatives]


@dataclass(eq=False)
class Trace:
    """What passed through one block: `[n, …]`, `[H, n, d]`; NaN where nothing was computed."""

    u1: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    attention: Tensor | None = None
    u2: Tensor | None = None
    mlp: Tensor | None = None
    bias: Tensor | None = None
    at: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # id of the lane → (ids then, slots then)


@dataclass(eq=False)
class Flow:
    """One sequence in one stack. `lane[s]` is the number of the lane that slot s belongs to, −1 for text."""

    x: Tensor
    lanes: list[Lane]
    lane: Tensor
    content: Tensor
    pos: Tensor | None = None
    traces: dict[int, Trace] = field(default_factory=dict)
    caches: dict[int, Cache] = field(default_factory=dict)
    hidden: list[Tensor] = field(default_factory=list)

    def slots(self, lane: Lane) -> Tensor:
        """Where the lane's content tokens lie, in their order."""
        return ((self.lane == self.lanes.index(lane)) & self.content).nonzero()[:, 0]

    def where(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {id(lane): (lane.ids, self.slots(lane)) for lane in self.lanes}

    def keep(self, kept: Tensor) -> None:
        self.x, self.lane, self.content = self.x[kept], self.lane[kept], self.content[kept]
        self.pos = None if self.pos is None else self.pos[kept]

    def reduce(self, lane: Lane, reduction: Reduction) -> None:
        """Outputs stand where their representatives stood, or in the item's first slots when they are not ordered."""
        slots, representatives = self.slots(lane), reduction.representatives
        if reduction.ordered and not bool((representatives.diff() > 0).all()):
            raise WinnowError("the representatives of an ordered reduction must ascend")
        at = slots[representatives] if reduction.ordered else slots[: reduction.m]
        rows = reduction.apply(self.x[slots])
        self.x = self.x.index_copy(0, at, rows)
        if self.pos is not None:
            self.pos = self.pos.index_copy(0, at, self.pos[slots[representatives]])
        mine = self.lane == self.lanes.index(lane)
        kept = ~(mine & (self.content | (reduction.m == 0)))
        kept[at] = True
        self.keep(kept)
        lane.carry(reduction)

    def emit(self, lane: Lane, tokens: Tensor, layout: Layout, provenance: Reduction | None) -> None:
        """The item's rows become other tokens: what its rows remembered survives only along a provenance."""
        number = self.lanes.index(lane)
        first = int((self.lane == number).nonzero()[0])
        left = self.lane != number
        new = torch.full((len(tokens),), number)
        put = lambda a, b: torch.cat([a[:first][left[:first]], b, a[first:][left[first:]]])  # noqa: E731
        self.x, self.content = put(self.x, tokens), put(self.content, new >= 0)
        self.pos = None if self.pos is None else torch.arange(len(self.x))
        self.lane = put(self.lane, new)
        if provenance is None:
            lane.carried, lane.summed = {}, {}
        else:
            lane.carry(provenance)
        lane.layout, lane.ids = layout, torch.arange(layout.n_content)

    def bias(self) -> Tensor | None:
        """The sum over methods of the additive bias of each key."""
        total = None
        for lane in self.lanes:
            for key, value in lane.carried.items():
                if key[0] == "bias":
                    total = torch.zeros(len(self.x), dtype=self.x.dtype) if total is None else total
                    total[self.slots(lane)] += value
        return total

    def routed(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None] | None:
        """Which slots are computed, what the others become, and what the computed ones attend to besides themselves."""
        if not any(("route",) in lane.carried for lane in self.lanes):
            return None
        rows, output = torch.ones(len(self.x), dtype=torch.bool), self.x.clone()
        context = None
        for lane in self.lanes:
            slots = self.slots(lane)
            rows[slots] = lane.carried.pop(("route",))
            if ("output",) in lane.carried:
                output[slots] = lane.carried.pop(("output",))
            if ("context", "k") in lane.carried:
                if len(slots) != len(self.x):
                    raise WinnowError("a Route with a context must cover the whole sequence")
                context = (lane.carried.pop(("context", "k")), lane.carried.pop(("context", "v")))
        return rows, output, context


@dataclass(eq=False)
class Cache:
    """Keys and values of one layer, `[H, n, d]`; every head may hold other tokens. `received` is `[H, rows, n]`."""

    k: Tensor
    v: Tensor
    prompt: int
    bias: Tensor | None = None
    received: Tensor | None = None
    carried: dict[Key, Tensor] = field(default_factory=dict)
    summed: dict[Key, Tensor] = field(default_factory=dict)
    item: dict[Key, Tensor] = field(default_factory=dict)

    def append(self, k: Tensor, v: Tensor) -> None:
        """New tokens: what is remembered of them is zero."""
        self.k, self.v = torch.cat([self.k, k], 1), torch.cat([self.v, v], 1)
        grow = lambda x: torch.cat([x, x.new_zeros(x.shape[0], k.shape[1], *x.shape[2:])], 1)  # noqa: E731
        self.carried = {key: grow(x) for key, x in self.carried.items()}
        self.summed = {key: grow(x) for key, x in self.summed.items()}
        self.bias = None if self.bias is None else grow(self.bias)

    def reduce(self, k: Reduction, v: Reduction, log_bias: Tensor | None) -> None:
        """Fields follow the map of the values; `[H, n, …]`, each head by itself."""
        heads = torch.arange(self.k.shape[0])[:, None]
        if not torch.equal(k.representatives, v.representatives):
            raise WinnowError("slot j of the keys and of the values must stand for one position")
        feeds = (v.to_matrix() != 0).double()
        self.k, self.v = k.apply(self.k), v.apply(self.v)
        self.carried = {key: x[heads, v.representatives] for key, x in self.carried.items()}
        self.summed = {key: torch.einsum("hmn,hn...->hm...", feeds, x) for key, x in self.summed.items()}
        if log_bias is not None:
            self.bias = log_bias
        elif self.bias is not None:
            self.bias = self.bias[heads, v.representatives]
