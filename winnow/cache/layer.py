"""HeldLayer: the cache of one layer under a plan, behind the interface of transformers' own cache layers.

Outside it counts what was read, so that `generate`, masks and later turns go on as if nothing were missing. Inside it
holds what the plan left. It attends itself: the model's attention function is given what is held, and the part of the
model's mask that belongs to it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from winnow.cache.blocks import Coded
from winnow.cache.context import Context
from winnow.cache.dense import Dense
from winnow.cache.masks import allowed, mask_for, real_of
from winnow.cache.places import Places
from winnow.cache.placing import Placing
from winnow.cache.queries import Asked
from winnow.cache.ragged import Ragged
from winnow.cache.run import Runner
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.kv import Codec, KVStep, Moment
from winnow.core.packing import Packing
from winnow.signals.tap import AttendsItself

Steps = tuple[tuple[int, KVStep], ...]


class Held(AttendsItself):
    """What a held layer gives in the place of keys and values: the layer itself, which attends when it is asked."""

    __slots__ = ("layer", "new")

    def __init__(self, layer: "HeldLayer", new: tuple[Tensor, Tensor]) -> None:
        self.layer, self.new = layer, new

    def attend(
        self, plain: Callable[..., Any], module: nn.Module, query: Tensor, mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """In the place of the attention function `plain`."""
        return self.layer.attend(self.new, plain, module, query, mask, args, kwargs)

    def shown(self) -> tuple[Any, Any]:
        store = self.layer.store
        if not self.layer.changed:
            return store.read()  # type: ignore[union-attr]
        if not isinstance(store, Dense) or store.bias is not None:
            return self, self
        return tuple(torch.cat(pair, 2) for pair in zip(store.read(), self.new, strict=True))  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedError(
            f"this model computes with its cached keys ({name}) before it attends, so its cache cannot be compressed; "
            "use a plan without methods of the cache."
        )


class HeldLayer(Placing, CacheLayerMixin):
    """The cache of one layer.

    Args:
        index: of the layer.
        steps: (number of the method in the plan, step) at `kv[index]`.
        context: of the request.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, index: int, steps: Steps, context: Context) -> None:
        super().__init__()
        self.index, self.context = index, context
        self.runner = Runner(self, steps)
        self.store: Dense | Coded | Ragged | None = None
        self.seen = 0
        self.changed = False
        self.uncut = 0
        self.codec: tuple[int, Codec] | None = None
        self.kinds: Tensor | None = None
        self.places: Places | None = None
        self.token_bytes = 0
        self.read_now: tuple[Packing, Tensor | None] | None = None
        self.called: dict[str, Any] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        lanes = key_states.shape[0] * key_states.shape[1]
        sizes = (x.shape[3] * x.itemsize for x in (key_states, value_states))
        self.token_bytes = lanes * sum(sizes)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def adopt(self, keys: Tensor, values: Tensor) -> None:
        """Take over what a plain layer holds."""
        self.lazy_initialization(keys, values)
        self.store, self.seen = Dense(keys, values), keys.shape[2]
        self.bound(self.store)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Take new keys and values; what it returns goes to the attention function."""
        self.context.check()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.prefetch()
        self.waits = True
        if self.changed:
            held = Held(self, (key_states, value_states))
            return held, held
        first = self.store is None
        if first:
            whole = torch.contiguous_format
            self.store = Dense(key_states.clone(memory_format=whole), value_states.clone(memory_format=whole))
            self.bound(self.store)
        else:
            self.store.append(key_states, value_states)  # type: ignore[union-attr]
        self._count(key_states.shape[2])
        moment: Moment = "decode" if key_states.shape[2] == 1 and not first else "prefill"
        if not self.runner.acts(moment) and self.context.few_of(self.index) is None:
            self.waits = False
            return self.store.read()  # type: ignore[union-attr]
        held = Held(self, (key_states, value_states))
        return held, held

    def _count(self, new: int) -> None:
        self.seen += new
        self.uncut += new
        self.read_now = None if self.context.reads is None else self.context.reads(self.index)
        if self.context.kinds is not None:
            now = self.context.kinds()
            self.kinds = now if self.kinds is None else torch.cat([self.kinds, now], 1)
        if self.context.places is not None:
            now = self.context.places(self.index)
            if self.places is None:
                self.places = Places.of_a_plain_cache(self.seen - new, now)
            self.places.append(now, self.seen - new)

    def attend(
        self,
        new: tuple[Tensor, Tensor],
        plain: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        mask: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The attention of this layer over what it holds; then the plan's steps shorten that."""
        n = query.shape[2]
        if self.changed:
            real = None if n == 1 else self.context.once(("real", n), mask, lambda: real_of(mask, n))
            self.store.append(*new, real, self.seen)  # type: ignore[union-attr]
            self._count(n)
        moment: Moment = "decode" if n == 1 and self.seen > 1 else "prefill"
        asked = Asked(module, query, mask, kwargs, self.called)
        rest = (args, kwargs)
        if moment == "decode":
            sparse = self.runner.few()
        else:
            sparse = [] if self.changed else self.runner.before(asked)
        if sparse:
            output = self.runner.sparse(sparse, plain, asked, rest)
        else:
            output = self._attend(plain, asked, rest)
        self.runner.run(moment, asked)
        if self.places is not None and self.changed:
            self.places.keep(self.store, self.seen, self.runner.recent, moment == "decode")
        self.called, self.waits = None, False
        if self.leaves:
            self.offload()
        return output

    def _attend(self, plain: Callable[..., Any], asked: Asked, rest: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        store, query, mask = self.store, asked.query, asked.mask
        args, kwargs = rest
        if isinstance(store, Ragged):
            self.context.check_plain(asked.module, kwargs)
            seen = allowed(mask)
            latest = None if seen is None or query.shape[2] == 1 else seen[..., -query.shape[2] :]
            return store.attend(query, latest, asked.scaling), None
        keys, values = store.read()  # type: ignore[union-attr]
        if self.changed:
            held = (store.length, store.real, store.bias)  # type: ignore[union-attr]
            mask = mask_for(mask, query.shape[2], *held, query.shape[1], query.dtype)
        return plain(asked.module, query, keys, values, mask, *args, **kwargs)

    @property
    def slots_held(self) -> int:
        """Real slots of all samples and heads."""
        self.mark_padding()
        store = self.store
        if store is None:
            return 0
        if isinstance(store, Ragged):
            return sum(store.lengths)
        real = store.rows_held * store.length if store.real is None else int(store.real.sum())
        return real * store.heads

    def mark_padding(self) -> None:
        """Which slots of a cache that is still whole are real, also where no step has looked at them."""
        if self.changed or self.read_now is None or not isinstance(self.store, Dense):
            return
        packing, past = self.read_now
        self.store.real = None
        if past is not None or packing.padded:
            mask = packing.mask
            before = mask.new_ones(mask.shape[0], self.seen - packing.width) if past is None else past.bool()
            self.store.real = torch.cat([before.to(mask.device), mask], 1)

    def cut(self, store: Dense | Coded | Ragged, decoding: bool = False) -> None:
        """Put another store in the place of this one."""
        self.bound(store, decoding)
        self.store, self.changed = store, True
        self.uncut = min(self.uncut, store.uncut) if isinstance(store, Coded) else 0

    def get_seq_length(self) -> int:
        """Tokens that were read."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """What a mask must tell of: all that was read; the new tokens alone, once every layer was shortened."""
        if not (self.changed and self.context.all_changed):
            return self.seen + query_length, 0
        # One column more than there are queries: transformers would leave out a square causal mask.
        return query_length + 1, self.seen - 1

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, down to where the plan cut last."""
        count = max(0, self.seen - tokens_to_remove) if tokens_to_remove > 0 else -tokens_to_remove
        if count == 0 or self.store is None:
            return
        if count > (self.uncut if self.changed else self.seen):
            raise WinnowError(
                f"cannot crop {count} tokens: the cache of layer {self.index} was compressed {self.uncut} tokens ago, "
                "and what was dropped then is gone; start with a new cache, or crop less."
            )
        self.store.crop(count)
        self.seen -= count
        self.uncut -= count
        self.kinds = None if self.kinds is None else self.kinds[:, : self.seen]
        if self.places is not None:
            self.places.crop(self.seen)
        self.runner.crop(count)

    def _move(self, move: Callable[[Tensor], Tensor]) -> None:
        if self.store is not None:
            samples = self.store.rows_held
            self.store = self.store.rows(move)
            self.runner.move(move, samples)
            self.kinds = None if self.kinds is None else move(self.kinds)
            if self.places is not None:
                self.places.move(move)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._move(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._move(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._move(lambda x: x.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        self.store, self.seen, self.uncut, self.changed, self.is_initialized = None, 0, 0, False, False
        self.codec = self.kinds = self.places = self.read_now = None
        self.waits = self.leaves = self.away = False
        self.runner.reset()


def held_bytes(cache: Any) -> int:
    """Bytes of all distinct storages that compressed layers hold, and of the keys and values of the other layers.

    A window of transformers is a view of a longer tensor, of which the window counts.
    """
    found: dict[int, int] = {}
    plain = 0
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, HeldLayer):
            storages = (x.untyped_storage() for x in layer.tensors())
            found |= {storage.data_ptr(): storage.nbytes() for storage in storages}
        else:
            own = (getattr(layer, "keys", None), getattr(layer, "values", None))
            plain += sum(x.nbytes for x in own if x is not None)
    return sum(found.values()) + plain
