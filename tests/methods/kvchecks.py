"""What the tests of cache methods share: tiny models seen layer by layer, and checks that hold for every method.

Scores are worked out by the tests from what `Layer` holds, which is read from a model that knows nothing of winnow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import winnow
from tests import kvdecode, kvhand
from winnow.contract import CacheMethod, KVReduce, KVView, Observe, State

# Prompts and what follows: equal tokens have keys of equal norms, whose order is that of the rounding.
_DISTINCT = torch.stack([torch.randperm(118, generator=torch.Generator().manual_seed(row)) + 2 for row in range(3)])
STEPS = _DISTINCT[:, :12]


@dataclass(frozen=True)
class Layer:
    """One layer in a prefill: `origin` are queries without their phase, `[b, H, n, d]`; keys `[b, G, n, d]` have it."""

    origin: Tensor
    keys: Tensor
    values: Tensor
    frequencies: Tensor

    @property
    def n(self) -> int:
        return self.keys.shape[2]

    @property
    def queries(self) -> Tensor:
        """With their phase."""
        return rotated(self.origin, torch.arange(self.n), self.frequencies)

    @property
    def attention(self) -> Tensor:
        """`[b, H, n, n]`."""
        keys = self.keys.repeat_interleave(self.origin.shape[1] // self.keys.shape[1], 1)
        logits = self.queries @ keys.transpose(2, 3) / self.keys.shape[3] ** 0.5
        return logits.masked_fill(torch.ones(self.n, self.n).triu(1).bool(), -torch.inf).softmax(-1)


def rotated(x: Tensor, at: Tensor, frequencies: Tensor) -> Tensor:
    """The halves of `x` as real and imaginary parts, turned by positions."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * at[..., None] * frequencies)
    return torch.cat([turned.real, turned.imag], -1)


@torch.no_grad()
def layers_of(model: Any, ids: Tensor) -> list[Layer]:
    """What the layers of a Llama compute for a prompt."""
    hidden: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: hidden.append(kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    cache = model(input_ids=ids, use_cache=True).past_key_values
    for hook in hooks:
        hook.remove()
    d = model.config.head_dim
    frequencies = model.config.rope_parameters["rope_theta"] ** (-torch.arange(0, d, 2) / d)
    found = []
    for layer, states, held in zip(model.model.layers, hidden, cache.layers, strict=True):
        origin = layer.self_attn.q_proj(states).unflatten(2, (-1, d)).transpose(1, 2)
        found.append(Layer(origin, held.keys, held.values, frequencies))
    return found


@torch.no_grad()
def kept_by(model: Any, ids: Tensor, plan: str) -> list[Tensor]:
    """`[b, G, k]` the slots that each layer holds after a prefill under a plan."""
    with winnow.compress(model, plan):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    return [layer.store.slots.long() for layer in cache.layers]


Kept = Callable[[Any, Tensor, int], list[Tensor]]


def first_slots(model: Any, ids: Tensor, k: int) -> list[Tensor]:
    """A stub."""
    return [torch.arange(k).expand(ids.shape[0], 2, k)] * len(model.model.layers)


def even_slots(model: Any, ids: Tensor, k: int) -> list[Tensor]:
    """A stub."""
    return [(torch.arange(k) * ids.shape[1] // k).expand(ids.shape[0], 2, k)] * len(model.model.layers)


STUBS = (first_slots, even_slots)


def check_kept(kept: Kept, score: Callable[[Layer, int], Tensor], counts: tuple[int, ...] = (7, 20, 41)) -> None:
    """In every layer of a random tiny Llama, the slots are those with the largest scores `[b, G, n]`.

    Args:
        score: of a layer from which k slots are to be kept.
    """
    for seed in range(2):
        model = kvhand.text_model("llama", layers=2, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.stack([torch.randperm(118, generator=generator)[:53] + 2 for _ in range(2)])  # no equal norms
        layers = layers_of(model, ids)
        for k in counts:
            for found, layer in zip(kept(model, ids, k), layers, strict=True):
                assert torch.equal(found, score(layer, k).topk(k).indices.sort(-1).values)


def view_of(
    b: int = 1,
    g: int = 2,
    n: int = 40,
    d: int = 8,
    group: int = 2,
    rows: int | None = None,
    seed: int = 0,
    sharp: float = 2.0,
    **known: Any,
) -> KVView:
    """Random keys, values and queries, peaky enough that scores differ."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(b, g, n, d, generator=generator) for _ in range(2))
    queries = sharp * torch.randn(b, g * group, rows or n, d, generator=generator)
    return KVView.of(keys, values, queries, **known)


def attention_by_hand(view: KVView) -> Tensor:
    """`[b, H, q, N]` causal attention of the newest queries, row by row."""
    b, h, q, _ = view.queries.shape
    out = torch.zeros(b, h, q, view.n, dtype=torch.float64)
    for row in range(q):
        seen = view.n - q + row + 1
        for head in range(h):
            keys = view.keys[:, head // view.group, :seen].double()
            logits = (keys @ view.queries[:, head, row, :, None].double())[..., 0] * view.scaling
            out[:, head, row, :seen] = logits.softmax(-1)
    return out


def views(seed: int = 0, b: int = 2, n: int = 40, **known: Any) -> KVView:
    """A random view of four query heads and two KV heads."""
    return view_of(b=b, n=n, d=16, seed=seed, sharp=1.0, **known)


def sample(view: KVView, row: int, **known: Any) -> KVView:
    """One sample of a view of prompts."""
    return KVView.of(*(x[row : row + 1] for x in (view.keys, view.values, view.queries)), **known)


def chosen(method: CacheMethod, view: KVView) -> Tensor | None:
    """`[b, G, k]`, or None where nothing is dropped."""
    action, _ = method.evict(view, State())
    if isinstance(action, Observe):
        return None
    assert isinstance(action, KVReduce)
    assert action.k is action.v
    return action.k.index


def check_method(method: CacheMethod, **known: Any) -> None:
    """What every method promises that keeps as many slots in every head.

    Args:
        method: with a budget of 9.
        known: what its views need.
    """
    view = views(**known)
    found = chosen(method, view)
    assert found.shape == (2, 2, 9)
    assert (found.diff(dim=-1) > 0).all()
    for row in range(2):
        assert torch.equal(chosen(method, sample(view, row, **known)), found[row : row + 1])
    rounded = [x.bfloat16() for x in (view.keys, view.values, view.queries)]
    low = chosen(method, KVView.of(*rounded, **known))
    assert torch.equal(low, chosen(method, KVView.of(*(x.float() for x in rounded), **known)))
    broken = view.keys.clone()
    broken[:, :, 17] = torch.nan
    assert 17 not in chosen(method, KVView.of(broken, view.values, view.queries, **known))
    for n in (1, 2, 5, 9):
        assert chosen(method, views(n=n, **known)) is None
        few = chosen(method.replace(keep=1), views(n=n + 1, **known))
        first, last = method.replace(keep=1).ends(view)
        assert few is None if first + last > n else few.shape == (2, 2, max(1, first + last))
    assert chosen(method.configured(keep="100%"), view) is None


def check_on_model(build: str, plan: str) -> Any:
    """Logits of a left-padded batch equal those of the full cache with what was evicted by then masked, and those of
    its samples alone. Returns the cache."""
    own = kvdecode.case(build, layers=2, ids=_DISTINCT[:, 12 : 12 + max(kvdecode.LENGTHS)])
    got, _ = own.check_evictions(plan, STEPS)
    own.check_batch(plan, STEPS)
    return got.past_key_values


def decoded(method: CacheMethod, view: KVView, steps: int, seed: int = 0) -> Iterator[tuple[KVView, Tensor]]:
    """Random tokens decoded one by one behind a prompt: for each, the view, and `[b, G, m]` the slots left after it.

    The tests' own bookkeeping: states and slots follow every eviction here, as the engine does it.
    """
    generator = torch.Generator().manual_seed(1000 + seed)  # no token of the prompt comes again
    state, now = State(), view
    for step in range(steps + 1):
        action, state = method.evict(now, state)
        at = action.k.index if isinstance(action, KVReduce) else torch.arange(now.n).expand(now.b, now.heads, -1)
        wide = at[..., None].expand(-1, -1, -1, now.keys.shape[3])
        keys, values, slots = now.keys.gather(2, wide), now.values.gather(2, wide), now.slots.gather(2, at)
        state = State(
            {k: torch.cat([x.gather(2, at), x.new_zeros(*x.shape[:2], 1)], 2) for k, x in state.token.items()}
        )
        yield now, slots
        if step == steps:
            return
        new = torch.randn(2, now.b, now.heads, 1, now.keys.shape[3], generator=generator)
        seen = torch.full_like(slots[..., :1], now.seen)
        now = KVView.of(
            torch.cat([keys, new[0]], 2),
            torch.cat([values, new[1]], 2),
            torch.randn(now.b, now.queries.shape[1], 1, now.keys.shape[3], generator=generator),
            slots=torch.cat([slots, seen], 2),
            seen=now.seen + 1,
            fresh=1,
            moment="decode",
            rotary=now.rotary,
        )


def refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(winnow.WinnowError, match=says):
        make()
