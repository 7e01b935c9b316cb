"""Blocks of the tower and layers of the language model that many plans give equal inputs, computed once.

A plan that acts inside the tower or inside the language model leaves what comes before as it is. There a block or a
layer runs for one plan, and its output is remembered; where another plan calls it with equal arguments, that output is
handed out, and the keys and values go into the cache of the call. Nothing is assumed of where plans act: arguments are
compared, and a call that differs in any of them is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from winnow.bench.shared_prompts import SharedPrompts
from winnow.core.signal import Site
from winnow.engine.bound_plan import BoundPlan
from winnow.engine.handle import Handle
from winnow.engine.hooks import stand_in
from winnow.engine.versions import CACHE_NAMES
from winnow.engine.watch import modules_seen
from winnow.signals.tap import only_show, probed

LIMIT = 2**30  # bytes that are remembered of a batch

Given = dict[str | int, Any]


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a block or a layer.

    Attributes:
        given: its arguments by name or place, without the cache.
        output: `[*, D]`
        stored: the keys and values that it left in a cache that was empty; None where it had none.
        modules: what its modules were given and gave, where a plan looked at them.
    """

    given: Given
    output: Tensor
    stored: tuple[Tensor, Tensor] | None
    modules: dict[str, tuple[Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        kept = [*(self.stored or ()), *(x for pair in self.modules.values() for x in pair)]
        return 2 * self.output.nbytes + sum(x.nbytes for x in kept)


class SharedLayers:
    """Stands in for the forward of every block and layer of a compressed model while it is entered.

    Outside of `under(plan)` all of them run.
    """

    def __init__(self, handle: Handle) -> None:
        bound = handle.bound
        self._bound = bound
        self._removers: list[Callable[[], None]] = []
        self._plan: BoundPlan | None = None
        self._prompts: SharedPrompts | None = None
        self._known: dict[Site, Call] = {}
        # Where there are several towers, blocks share a number; and layers may read the keys of others.
        towers = () if bound.family.other_blocks else bound.blocks
        layers = bound.layers if bound.kv_of == tuple(range(len(bound.layers))) else ()
        self._parts = [(Site("vision", i), block) for i, block in enumerate(towers)]
        self._parts += [(Site("lm", i), layer) for i, layer in enumerate(layers)]

    def __enter__(self) -> SharedLayers:
        self._removers = [stand_in(part, _Forward(self._run, site, part)) for site, part in self._parts]
        return self

    def __exit__(self, *exception: object) -> None:
        self.forget()
        while self._removers:
            self._removers.pop()()

    def forget(self) -> None:
        """The next batch has other inputs."""
        self._known.clear()

    @contextmanager
    def under(self, plan: BoundPlan, prompts: SharedPrompts | None = None) -> Iterator[None]:
        """Share what runs inside, and runs under this plan.

        Args:
            prompts: where rows of the request share what their prompts begin with.
        """
        self._plan, self._prompts = plan, prompts
        try:
            yield
        finally:
            self._plan = self._prompts = None

    def shares_prompts(self, plan: BoundPlan) -> bool:
        """Whether prompts about one picture may begin alike under a plan, all the way through the language model.

        Then batches of whole pictures are worth their padding.
        """
        bound, config = self._bound, self._bound.lm.config
        plain = config._attn_implementation == "sdpa" and any(site.stack == "lm" for site, _ in self._parts)
        acts = plan.first_layer is not None or plan.kv or plan.cross_reads
        looks = plan.reads_text or plan.probed or any(site.stack == "lm" for site in plan.listeners)
        return plain and not (acts or looks or bound.family.cross)

    def _run(self, site: Site, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        if self._plan is None or not self._can_share(self._plan, site, cache):
            return plain(*args, **kwargs)
        given: Given = dict(enumerate(args))
        given |= {name: x for name, x in kwargs.items() if name not in CACHE_NAMES}
        if any(isinstance(x, dict | list) for x in given.values()):
            return plain(*args, **kwargs)  # layers may leave something there for others
        known, looked = self._known.get(site), modules_seen() if site.stack == "lm" else None
        if known is None or not _alike(known.given, given) or (looked is not None and not known.modules):
            output = None
            if self._prompts is not None and site.stack == "lm" and looked is None:
                output = self._prompts.run(plain, site.index, args, kwargs)
            if output is None:
                output = plain(*args, **kwargs)
            self._remember(site, given, output, cache, dict(looked or {}))
            return output
        if site in self._plan.listeners:
            only_show(plain, *args, **kwargs)  # fills the cache as well
        elif known.stored is not None:
            cache.update(*known.stored, site.index)  # type: ignore[union-attr]
        if looked is not None:
            looked.update(known.modules)
        return known.output.clone()

    def _can_share(self, plan: BoundPlan, site: Site, cache: Any) -> bool:
        """Whether the call does what its arguments say, and leaves its output, keys and values, and nothing else."""
        if torch.is_grad_enabled() or probed.get() is not None:
            return False
        if site.stack == "vision":
            # Blocks of packed tiles attend several times, and behind the first step tokens may be weighted.
            shown_once = site not in plan.listeners or not self._bound.family.packed
            return cache is None and shown_once and (plan.first_block is None or site.index < plan.first_block)
        if cache is None or plan.kv or plan.cross_reads:
            return False
        layers = getattr(cache, "layers", ())
        held = layers[site.index].get_seq_length() if site.index < len(layers) else 0
        return not held and all(type(layer) is DynamicLayer for layer in layers)

    def _remember(
        self, site: Site, given: Given, output: Any, cache: Any, modules: dict[str, tuple[Tensor, Tensor]]
    ) -> None:
        if not isinstance(output, Tensor) or (cache is not None and type(cache.layers[site.index]) is not DynamicLayer):
            return
        known = self._known.get(site)
        if known is not None and (known.output.numel() > output.numel() or not modules):
            return  # what one plan has shortened, others seldom read
        stored = None if cache is None else (cache.layers[site.index].keys, cache.layers[site.index].values)
        call = Call(given, output.clone(), stored, modules)
        held = sum(other.nbytes for at, other in self._known.items() if at != site)
        if held + call.nbytes <= LIMIT:
            self._known[site] = call


class _Forward:
    """In the place of the forward of one block or layer."""

    name = "forward"

    def __init__(self, run: Callable[..., Any], site: Site, part: nn.Module) -> None:
        self.run, self.site, self.plain = run, site, part.forward
        functools.update_wrapper(self, self.plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.site, self.plain, args, kwargs)


def _alike(a: Given, b: Given) -> bool:
    return a.keys() == b.keys() and all(_equal(a[name], b[name]) for name in a)


def _equal(a: Any, b: Any) -> bool:
    """Whether two arguments are equal; what is of another kind than tensors, numbers and words is only itself."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return isinstance(a, bool | int | float | str) and type(a) is type(b) and a == b
