"""What a method sees of the KV cache of one layer, and what it may ask for there.

A view holds real slots only, in the order in which they were read; the engine groups samples so that nothing is padded.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.kv_budget import KVBudget
from winnow.core.step import Action, Step

Moment = Literal["before", "prefill", "decode"]
"""Before a layer attends in a prefill; after it has attended there; after it has attended for one decoded token."""

_CHUNK = 256


@dataclass(frozen=True)
class KVStep(Step):
    """A step at `kv[k]`: it gets a `KVView`, and a State whose token fields are `[b, G, N, …]`.

    Attributes:
        when: the moments at which it runs.
        recent: queries of earlier forwards that it wants while decoding, beside the one of this token.
        calls: whether it wants what the attention module was called with; it is then given every sample by itself.
        kinds: whether it wants to know what each slot is; a view then holds samples with as many slots of each kind.
        places: whether it wants to know where slots and queries stand; else they are numbered as they were read.
        most: slots that a head holds while decoding, before this step shortens it again; None: it does not.
    """

    when: tuple[Moment, ...] = ("prefill",)
    recent: int = 0
    calls: bool = False
    kinds: bool = False
    places: bool = False
    most: int | None = None


@dataclass(frozen=True)
class Codec(Action):
    """The slots that are there are stored in another form from now on.

    Attributes:
        encode: keys and values `[b, G, n, d]` → a `Block`, which can give them back.
        pair: whether the layer before is encoded with this one: `encode` takes its keys and values first, and gives
            its block first. What the two blocks share is held once.
        every: later slots stay as they are until this many are there, and are then encoded together; 0: they stay.
        multiple: only the first slots, a multiple of this many, are encoded now.
        later: how later slots are encoded; None: as these.
    """

    encode: Callable[..., Any]
    every: int = 0
    multiple: int = 1
    later: Callable[..., Any] | None = None
    pair: bool = False


@dataclass(frozen=True, eq=False)
class KVView:
    """The cache of one layer for b samples that hold equally many slots.

    Attributes:
        keys, values: `[b, G, N, d]`, as they are stored (keys with their rotary phase).
        queries: `[b, H, q, d]` of the newest q tokens, with their phase; H is a multiple of G.
        scaling: what logits are multiplied with.
        layer, depth: of the language model.
        moment: when the step runs.
        fresh: slots, the last ones, that this forward added.
        slots: `[b, G, N]` how many tokens were read before each one, per head where heads hold different ones.
        seen: tokens that this layer has read of each sample.
        kinds: `[b, G, N]` what each slot is: an index into `KINDS`; None where that is not known.
        allowed: `[b, q, N]` which slots each query reads, where that is not simply what came before.
        slot_bytes: bytes of one slot of all heads and of all samples of the batch.
        softcap: the bound of logits, where the model has one.
        sinks: `[H]` logits of a key that is nowhere, which takes its share of the attention; None where there is none.
        below: keys and values of the layer before, where both hold the same slots and it is not offloaded.
        rotary: turns keys by positions; None where the model's positions are not understood.
        seed: seeds this view's own random numbers.
        notes: counts for the ledger.
        module: what the method's `build` made.
        call: the attention module and what it was called with, where the step asks; hidden states and rotary embeddings
            of the real tokens alone.
        bias: `[b, G, N]` added to the logits of each slot as a key, where an earlier step gave slots a weight.
        own_heads: which KV heads of the layer these are, where heads hold unequal numbers of slots; None: all.
        places: `[b, G, N]` the position of each slot, or `[b, G, N, 3]` in time, height and width, where the step asks.
        query_places: `[b, q]` or `[b, q, 3]` those of the queries.
    """

    keys: Float[Tensor, "b g n d"]
    values: Float[Tensor, "b g n e"]
    queries: Float[Tensor, "b h q d"]
    scaling: float
    layer: int = 0
    depth: int = 1
    moment: Moment = "prefill"
    fresh: int = 0
    slots: Int[Tensor, "b g n"] | None = None
    seen: int = 0
    kinds: Int[Tensor, "b g n"] | None = None
    allowed: Bool[Tensor, "b q n"] | None = None
    slot_bytes: int = 0
    softcap: float | None = None
    sinks: Float[Tensor, " h"] | None = None
    below: tuple[Tensor, Tensor] | None = None
    rotary: Any = None
    seed: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    module: Any = None
    call: tuple[Any, Mapping[str, Any]] | None = None
    bias: Float[Tensor, "b g n"] | None = None
    own_heads: tuple[int, ...] | None = None
    places: Int[Tensor, "b g n *axes"] | None = None
    query_places: Int[Tensor, "b q *axes"] | None = None

    @staticmethod
    def of(keys: Tensor, values: Tensor, queries: Tensor | None = None, **known: Any) -> "KVView":
        """A view on plain tensors, without a model: a prompt that was read just now. Queries default to the keys."""
        if keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
            raise WinnowError(
                f"KVView.of takes keys and values [b, G, N, d]; got {tuple(keys.shape)} and {tuple(values.shape)}."
            )
        queries = keys if queries is None else queries
        if queries.shape[1] % keys.shape[1] or queries.shape[2] > keys.shape[2]:
            raise WinnowError(
                f"queries are [b, H, q, d] with H a multiple of {keys.shape[1]} and q ≤ {keys.shape[2]}; "
                f"got {tuple(queries.shape)}."
            )
        b, g, n, d = keys.shape
        known = {"scaling": d**-0.5, "fresh": n, "seen": n} | known
        known.setdefault("slots", torch.arange(n, device=keys.device).expand(b, g, n))
        known.setdefault("slot_bytes", b * g * (d * keys.itemsize + values.shape[-1] * values.itemsize))
        return KVView(keys, values, queries, **known)

    @property
    def b(self) -> int:
        return self.keys.shape[0]

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.keys.shape[1]

    @property
    def n(self) -> int:
        return self.keys.shape[2]

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.queries.shape[1] // self.keys.shape[1]

    def rows(self, window: int | None = None) -> int:
        """How many of the newest queries a window of that size has."""
        q = self.queries.shape[2]
        return q if window is None else min(window, q)

    def visible(self, window: int | None = None, at: Int[Tensor, " w"] | None = None) -> Bool[Tensor, "#b w n"]:
        """Which slots each of the last `window` queries reads, or each of those that stand at `at`."""
        q = self.queries.shape[2]
        rows = torch.arange(q - self.rows(window), q, device=self.keys.device) if at is None else at
        if self.allowed is not None:
            return self.allowed[:, rows]
        return (torch.arange(self.n, device=self.keys.device) <= (self.n - q + rows)[:, None])[None]

    def attention(
        self, window: int | None = None, heads: Sequence[int] | None = None, at: Int[Tensor, " w"] | None = None
    ) -> Float[Tensor, "b h w n"]:
        """Attention of the last `window` queries over all slots, softmaxed in fp32.

        Args:
            heads: query heads; all by default.
            at: places of other queries, in the place of the last ones.
        """
        queries = self.queries[:, :, -self.rows(window) :] if at is None else self.queries[:, :, at]
        return self._attention(queries, self.visible(window, at), heads)

    def _attention(self, queries: Tensor, visible: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        keys = self.keys
        if heads is not None:
            at = torch.as_tensor(heads, device=keys.device)
            queries, keys = queries[:, at], keys[:, at // self.group]
            logits = queries @ keys.transpose(2, 3)
        else:
            b, h, w, d = queries.shape
            logits = (queries.reshape(b, self.heads, self.group * w, d) @ keys.transpose(2, 3)).reshape(b, h, w, -1)
        logits = logits.float() * self.scaling
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.bias is not None:
            each = self.bias.repeat_interleave(self.group, 1)
            logits = logits + (each if heads is None else each[:, at])[:, :, None]
        logits = logits.masked_fill(~visible[:, None], -torch.inf)
        if self.sinks is None:
            return logits.softmax(-1)
        sinks = self.sinks if heads is None else self.sinks[at]
        taken = sinks.float()[None, :, None, None].expand(*logits.shape[:3], 1)
        return torch.cat([logits, taken], -1).softmax(-1)[..., :-1]

    def mass(self, window: int | None = None) -> Float[Tensor, "b h n"]:
        """Attention that each slot got from the last `window` queries in all, summed over them in chunks of rows.

        The largest tensor is `[b, H, 256, N]`, whatever the number of queries.
        """
        total = torch.zeros(*self.queries.shape[:2], self.n, device=self.queries.device)
        for _, part in self.attention_parts(window):
            total += part.sum(2)
        return total

    def attention_parts(
        self, window: int | None = None, size: int = _CHUNK
    ) -> Iterator[tuple[slice, Float[Tensor, "b h r n"]]]:
        """`attention(window)`, at most `size` rows at a time: which rows of the window, and their attention."""
        w = self.rows(window)
        queries, visible = self.queries[:, :, self.queries.shape[2] - w :], self.visible(w)
        for start in range(0, w, size):
            part = slice(start, min(start + size, w))
            yield part, self._attention(queries[:, :, part], visible[:, part])

    def readers(self, window: int | None = None) -> Int[Tensor, "#b n"]:
        """How many of the last `window` queries read each slot."""
        return self.visible(window).sum(1)

    def per_kv_head(self, x: Float[Tensor, "b h *rest"]) -> Float[Tensor, "b g *rest"]:
        """The mean over the query heads of each KV head."""
        return x.unflatten(1, (self.heads, self.group)).mean(2)

    def budget(self, keep: KVBudget) -> int:
        """Slots that a head of this layer keeps under a budget that is a number of them."""
        return keep.of(self.n, self.fresh, layer=self.layer, depth=self.depth, slot_bytes=self.slot_bytes)

    def rand(self, *shape: int) -> Float[Tensor, "..."]:
        """Uniform numbers in [0, 1), `[b, *shape]`: the same for every sample, and other ones in each layer."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + self.layer)
        return torch.rand(*shape, generator=generator).to(self.keys.device).expand(self.b, *shape)

    def positions(self) -> Int[Tensor, "b g n *axes"]:
        """Where each slot stands; without `places`, as many tokens as were read before it."""
        if self.places is not None:
            return self.places
        if self.slots is None:
            raise WinnowError("this view does not know in which order its slots were read; give slots=.")
        return self.slots

    def query_positions(self) -> Int[Tensor, "b q *axes"]:
        """Where each query stands; without `query_places`, one after the other up to the newest slot."""
        if self.query_places is not None:
            return self.query_places
        return self.positions()[:, 0, -1:] + torch.arange(1 - self.rows(), 1, device=self.keys.device)

    def turned(self, keys: Tensor, shift: Tensor) -> Tensor:
        """Keys or queries `[b, H, n, d]` as they would be `shift` positions later, `[b, H, n]` or `[b, H, n, 3]`."""
        return self._rotary().turn(keys, shift)

    def turned_on_average(self, x: Float[Tensor, "*lanes d"], shifts: Int[Tensor, " s"]) -> Float[Tensor, "*lanes d"]:
        """The mean of the same keys or queries at all these shifts."""
        return self._rotary().turn_on_average(x, shifts)

    def _rotary(self) -> Any:
        if self.rotary is None:
            raise UnsupportedError(
                "the positions of this model are not rotary ones that are understood, so keys cannot be moved; "
                "use a method that leaves them where they are."
            )
        return self.rotary
