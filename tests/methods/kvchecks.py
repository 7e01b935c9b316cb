"""What the tests of cache methods share: tiny models seen layer by layer, and checks that hold for every method.

Scores are worked out by the tests from what `Layer` holds, which is read from a model that knows nothing of winnow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor
from transformers import DynamicCache

import winnow
from tests import kvhand
from winnow.contract import CacheMethod, KVReduce, KVView, Observe, State

LENGTHS = (19, 26, 11)
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


def views(seed: int = 0, b: int = 2, n: int = 40, **known: Any) -> KVView:
    """A random view of four query heads and two KV heads."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, b, 2, n, 16, generator=generator)
    return KVView.of(keys, values, torch.randn(b, 4, n, 16, generator=generator), **known)


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
        alone = (x[row : row + 1] for x in (view.keys, view.values, view.queries))
        assert torch.equal(chosen(method, KVView.of(*alone, **known)), found[row : row + 1])
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


def _cases(build: str) -> tuple[Any, dict[str, Tensor], list[dict[str, Tensor]]]:
    """A model, a left-padded batch of three, and its samples."""
    if build in kvhand.TEXTS:
        inputs = kvhand.prompt(LENGTHS)
        inputs["input_ids"] = _DISTINCT[:, 12 : 12 + max(LENGTHS)] * inputs["attention_mask"]
        return (
            kvhand.text_model(build, layers=2),
            inputs,
            [{k: v[row : row + 1, -n:] for k, v in inputs.items()} for row, n in enumerate(LENGTHS)],
        )
    return zoo.model(build), zoo.inputs(build, zoo.RAGGED), zoo.samples(build, zoo.RAGGED)


class _Watching(kvhand.Forced):
    """Writes given tokens, and looks at the cache after each of them."""

    def __init__(self, tokens: Tensor, cache: DynamicCache) -> None:
        super().__init__(tokens)
        self.cache, self.evicted = cache, {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.evicted[self.cache.get_seq_length()] = kvhand.evicted_of(self.cache)
        return super().__call__(input_ids, scores)


def _written(model: Any, inputs: dict[str, Tensor], tokens: Tensor) -> tuple[tuple[Tensor, ...], Any, Any]:
    """Logits of each step, what was evicted by each number of tokens that were read, and the cache."""
    cache = DynamicCache()
    watching = _Watching(tokens, cache)
    steps = tokens.shape[1]
    out = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        logits_processor=[watching],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.logits, watching.evicted, cache


def check_on_model(build: str, plan: str) -> Any:
    """Logits of a left-padded batch equal those of the full cache with what was evicted by then masked, and those of
    its samples alone. Returns the cache."""
    model, inputs, alone = _cases(build)
    with winnow.compress(model, plan):
        got, evicted, cache = _written(model, inputs, STEPS)
        singles = [_written(model, one, STEPS[row : row + 1])[0] for row, one in enumerate(alone)]
    with kvhand.evicting(model, lambda layer, n: evicted.get(n - 1, {}).get(layer)):
        wanted, _, _ = _written(model, inputs, STEPS)
    plain, _, _ = _written(model, inputs, STEPS)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for row, single in enumerate(singles):
        for a, b in zip(got, single, strict=True):
            torch.testing.assert_close(a[row], b[0], atol=2e-5, rtol=1e-5)
    assert (got[-1] - plain[-1]).abs().max() > 1e-3  # something was really dropped
    return cache


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
