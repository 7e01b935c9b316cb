"""StreamingLLM (arXiv 2309.17453): keeps the first slots of the cache and the newest ones.

Looks at: how many slots there are. Cost: none; with `shift`, a rotation of the sinks at each eviction.

Departs from the paper: prompts are read whole and then cut. The sinks stay where they were read unless `shift` is on.
Departs from the released code: keys are cached with their phase, so the sinks are moved instead of all slots; distances
are the same. `released` is kvpress's press of that name.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.contract import (
    Action,
    CacheMethod,
    Count,
    KVBudget,
    KVStep,
    KVView,
    ModelInfo,
    Observe,
    Repose,
    State,
    UnsupportedError,
    WinnowError,
    register,
)


@register("streaming-llm")
class StreamingLLM(CacheMethod):
    """Keeps the first tokens, which serve as sinks of attention, and a window of the newest.

    Args:
        keep: slots of a head, the sinks among them.
        n_sink: tokens at the beginning that stay.
        shift: whether the sinks follow the window, so that no gap lies between them.
        limit: slots that a head holds at most while decoding, and `every` more; none: what is decoded stays.
        every: decoded tokens between two evictions.
    """

    released = {"keep": "50%", "n_sink": 4, "shift": False}

    keep: KVBudget = KVBudget("20%")
    n_sink: Count = 4
    shift: bool = False
    limit: Count | None = None
    every: Count = 1

    def check(self) -> None:
        if self.limit is not None and self.limit <= self.n_sink:
            raise WinnowError(
                f"streaming-llm: limit={self.limit} leaves no window behind {self.n_sink} sinks; "
                f"allowed: limit ≥ {self.n_sink + 1}, or none."
            )
        if self.shift and self.keep.is_kinds:
            raise WinnowError(
                f"streaming-llm: with keep={self.keep} the newest slots are no window that sinks can follow; "
                "leave shift off, or give keep as one count or share."
            )

    def ends(self, view: KVView) -> tuple[int, int]:
        return self.n_sink, 0

    def score(self, view: KVView) -> Tensor:
        """Below 0, so that a budget by mass, which means nothing here, is refused."""
        age = torch.arange(-view.n, 0, device=view.keys.device, dtype=torch.float32)
        return age.expand(view.b, view.heads, -1)

    def steps(self, info: ModelInfo) -> tuple[KVStep, ...]:
        found = super().steps(info)
        if not self.shift:
            return found
        if info.mrope:
            raise UnsupportedError("its positions have three axes, along which a window has no begin; leave shift off.")
        return tuple(own for step in found for own in (step, replace(step, run=self.follow, places=True)))

    def follow(self, view: KVView, state: State) -> tuple[Action, State]:
        """The sinks move to right before the window, from wherever they are."""
        s = self.n_sink
        later = view.moment == "decode" and view.n != self.limit
        if (self.keep.is_all and self.limit is None) or view.n <= s or later:
            return Observe(), state
        at: Tensor = view.positions()
        moved = state.token.get("moved", torch.zeros_like(at))
        sinks, window = at[..., :s] + moved[..., :s], at[..., s : s + 1]
        wanted = window - s + torch.arange(s, device=window.device)
        shift = F.pad(wanted - sinks, (0, view.n - s))
        return Repose(shift), replace(state, token={**state.token, "moved": moved + shift})
