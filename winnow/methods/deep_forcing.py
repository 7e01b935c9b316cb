"""Deep Forcing (arXiv 2512.05081): long streams from a small cache, with deep sinks that are moved behind the window.

Looks at: queries of the newest frames. Cost: one product of a summed query with all keys when the cache is full, and a
second copy of the keys that it holds. The cache serves any stream: in a language model a frame is one token (then ask
for windows of thousands). It was tried on a toy that writes moving shapes on an 8 × 8 grid (`winnow.learn.generation`),
not on Wan: that it makes long videos better is not shown here.

Departs from the paper: query heads of one KV head are averaged. What is kept between sinks and newest frames fills
whole frames in reading order, whatever frames it came from.

Departs from the released code: none is released.
"""

from typing import Literal

import torch
from torch import Tensor

from winnow.contract import (
    Action,
    CacheMethod,
    Count,
    KVBudget,
    KVReduce,
    KVStep,
    KVView,
    ModelInfo,
    Observe,
    Point,
    Reduction,
    Repose,
    State,
    UnsupportedError,
    WinnowError,
    keep_slots,
    register,
)
from winnow.parts.frame_cache import between, closing, participation, unmoved


@register("deep-forcing")
class DeepForcing(CacheMethod):
    """Keeps the first frames, the newest ones, and between them what the newest look at; all closes up in time.

    Args:
        sink: frames at the beginning that stay.
        recent: newest frames, which stay and whose queries vote.
        window: frames that are held at most, and shortened to `sink + top + recent` when there are more; none: all.
        top: so many frames' worth of single tokens stays between the two, chosen by each head for itself.
        by: what they are chosen by: products with the queries, attention, or what is newest (deep sinks alone).
        frame: tokens of a frame.
        move: whether what is kept is moved in time to follow without a gap. The newest frames stay where they are.
    """

    identity = {"window": None}
    decodes = True

    sink: Count = 10
    recent: Count = 4  # type: ignore[misc]
    window: Count | None = 21
    top: Count = 7
    by: Literal["product", "attention", "newest"] = "product"
    frame: Count = 1
    move: bool = True

    def check(self) -> None:
        held = self.sink + self.top + self.recent
        if self.recent < 1 or self.frame < 1 or (self.window is not None and held > self.window):
            raise WinnowError(
                f"deep-forcing: sink {self.sink} + top {self.top} + recent {self.recent} frames of {self.frame} tokens "
                f"are to stay in a window of {self.window}; give window ≥ {held}, recent ≥ 1 and frame ≥ 1."
            )

    def score(self, view: KVView) -> Tensor:
        rows = view.rows(self.recent * self.frame)
        if self.by == "newest":
            return torch.arange(view.n, device=view.keys.device).float().expand(view.b, view.heads, -1)
        if self.by == "attention":
            return view.per_kv_head(view.mass(rows))
        return participation(view.queries[:, :, -rows:], view.keys)

    def shorten(self, view: KVView, keep: KVBudget | None = None) -> KVReduce | None:
        if self.window is None or view.n <= self.window * self.frame:
            return None
        sizes = (size * self.frame for size in (self.sink, self.top, self.recent))
        return keep_slots(Reduction.select(between(self.score(view), *sizes), view.n))

    def evict(self, view: KVView, state: State) -> tuple[Action, State]:
        if self.move and not state.token:  # of every sample from the beginning, since samples of a batch fill up apart
            state = State({"keys": view.keys, "shift": torch.zeros_like(view.keys[..., 0], dtype=torch.int32)})
        return self.shorten(view) or Observe(), state

    def close(self, view: KVView, state: State) -> tuple[Action, State]:
        """Behind an eviction: what was kept follows without a gap, turned from where it was first."""
        if view.n != (self.sink + self.top + self.recent) * self.frame or view.n == view.seen:
            return Observe(), state
        keys, shift = unmoved(view.keys, **state.token), closing(view.slots, self.frame).int()  # type: ignore[arg-type]
        return Repose(shift, keys), State({"keys": keys, "shift": shift})

    def steps(self, info: ModelInfo) -> tuple[KVStep, ...]:
        if self.move and info.mrope:
            raise UnsupportedError(
                f"deep-forcing moves keys by the number of tokens that left, and {info.model} does not count its "
                "positions in tokens; use deep-forcing:move=false."
            )
        acts = (self.evict, self.close) if self.move else (self.evict,)
        rows = self.recent * self.frame
        return tuple(
            KVStep(Point("kv", k), act, when=("prefill", "decode"), recent=rows)
            for k in range(info.depth)
            for act in acts
        )

    def at_budget(self, budget, content):
        """The same shares of a window of so many tokens."""
        window = max(1, KVBudget.parse(budget).of(content, content, layer=0, depth=1) // self.frame)
        held = self.sink + self.top + self.recent
        recent = max(1, window * self.recent // held)
        sink = min(window - recent, window * self.sink // held)
        return self.replace(window=window, sink=sink, recent=recent, top=window - sink - recent)
