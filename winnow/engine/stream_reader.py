"""Reader: what a stream has read so far, and forwards that go on from there."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from winnow.cache.layer import HeldLayer, held_bytes
from winnow.core.errors import WinnowError, WinnowWarning
from winnow.core.ledger import Ledger
from winnow.engine.bound_plan import BoundPlan
from winnow.engine.handle import Handle
from winnow.engine.request import Override, overridden
from winnow.engine.stream_input import Piece
from winnow.engine.stream_plan import keeps_distances, most_slots
from winnow.engine.versions import cache_keyword


class Reader:
    """The cache of a stream, what methods remember of it, and the position behind it.

    A read that fails or is interrupted changes nothing. A shallow copy is a reader of its own.

    Args:
        handle: of the model.
        plan: as each part of the stream is read under it.
        bounded: whether the plan promises to bound the cache.
    """

    def __init__(self, handle: Handle, plan: BoundPlan, bounded: bool) -> None:
        self.handle, self.bound, self.model, self.plan = handle, handle.bound, handle.model, plan
        self.cache: Any = DynamicCache(config=self.bound.lm.config)
        self.memory: dict[int, dict[str, Any]] | None = {}  # None while a question is answered
        self.next = self._reach = 0
        self._most = most_slots(plan.plan, self.bound) if bounded else None
        self._warned = keeps_distances(plan.plan)
        self._ends = self.model.generation_config.eos_token_id
        self._ends = self._ends if isinstance(self._ends, list) else [self._ends]

    @property
    def held(self) -> tuple[int, ...]:
        """By layer, the slots of all heads that the cache holds."""
        return tuple(map(_slots, self.cache.layers))

    @property
    def kv_bytes(self) -> int:
        return held_bytes(self.cache)

    def read(self, piece: Piece) -> Ledger:
        """One forward over a part of the stream; what became of its frames."""
        made = copy.copy(self)
        made.cache, made.memory = _fork(self.cache), dict(self.memory or {})
        ledger = made._read(piece)
        self.__dict__.update(made.__dict__)
        return ledger

    def _read(self, piece: Piece) -> Ledger:
        ids = piece.ids.to(self.bound.device)
        given = {name: _moved(value, self.model) for name, value in piece.rest.items()}
        positions, after = self._positions(piece, given)
        refused = None
        try:
            self._forward(ids, positions, given)
        except WinnowError:
            raise
        except ValueError as error:  # the model counts placeholders itself, and says so in words of its own
            refused = type(error).__name__
        if refused is not None:
            raise WinnowError(
                f"{type(self.model).__name__} cannot read this part of the stream ({refused}): its {ids.shape[1]} "
                "tokens need a placeholder for each token of its pixels, and the pixels their grids and sizes."
            )
        ledger = self.handle.last
        if ledger is None or not ledger.items:
            raise WinnowError("this part of a stream holds no frame: pass pixels, with a placeholder for each token.")
        if self._most is not None and sum(self.held) > self._most:
            raise WinnowError(
                f"the cache would hold {sum(self.held):,} slots: {self.plan.plan} does not keep to its number in every "
                "layer and head when more frames come; use another method of the cache."
            )
        self.next = after
        self._reach = after if positions is None else max(after, int(positions.max()) + 1)
        self._warn_of_distances()
        return ledger

    def answer(self, ids: Int[Tensor, "1 m"], count: int) -> Iterator[Int[Tensor, "1 1"]]:
        """Tokens behind these ones, greedily, on a copy of the cache."""
        made = copy.copy(self)
        made.cache, made.memory, ids = _fork(self.cache), None, ids.to(self.bound.device)
        try:
            for _ in range(count):
                positions = None
                if self.bound.info.mrope:
                    at = torch.arange(made.next, made.next + ids.shape[1], device=ids.device)
                    positions = at.expand(3, 1, -1)
                made.next += ids.shape[1]
                ids = made._forward(ids, positions, {})[:, -1].argmax(-1, keepdim=True)
                yield ids
                if int(ids) in self._ends:
                    return
        finally:
            let_go(made.cache)

    def _forward(self, ids: Tensor, positions: Tensor | None, given: dict[str, Tensor]) -> Tensor:
        """Logits `[1, 1, vocabulary]` behind the last token."""
        if not self.handle.attached:
            raise WinnowError("the model was detached from winnow under this session; open a new one.")
        called = {cache_keyword(self.model): self.cache, "logits_to_keep": 1, "return_dict": True, **given}
        override = Override(self.plan, None, memory=self.memory)
        with torch.no_grad(), overridden(self.handle._engine.attachment, override):
            logits: Tensor = self.model(input_ids=ids, position_ids=positions, use_cache=True, **called).logits
        return logits

    def _positions(self, piece: Piece, given: dict[str, Tensor]) -> tuple[Tensor | None, int]:
        """`[3, 1, n]` positions of a part, and where what is read next goes on; None where the model counts itself.

        They are those of one long prompt: the model's own rule, from where the last part ended. That rule may let text
        go on before the last moment of a video, so it is asked for one token of text more.
        """
        ids = piece.ids.to(self.bound.device)
        n = ids.shape[1]
        if not self.bound.info.mrope:
            if piece.positions is not None:
                raise WinnowError(f"{type(self.model).__name__} has positions on one axis; leave position_ids out.")
            return None, self.next + n
        types = torch.zeros_like(ids)
        for number, modality in ((1, "image"), (2, "video")):
            types = types.masked_fill(ids == self.bound.token_ids[modality], number)
        given["mm_token_type_ids"] = types.int()
        if piece.positions is not None:
            found = piece.positions.to(ids.device)
        else:
            more = pad(ids, (0, 1))
            known = {**given, "mm_token_type_ids": pad(types, (0, 1)).int(), "attention_mask": torch.ones_like(more)}
            found = self.model._prepare_position_ids_for_generation(more, known)[-3:].expand(3, 1, -1) + self.next
        return found[..., :n], int(found[..., n].max())

    def _warn_of_distances(self) -> None:
        places = getattr(self.bound.lm.config, "max_position_embeddings", None)
        if self._warned or places is None or self._reach <= places:
            return
        self._warned = True
        warnings.warn(
            f"this stream has passed the {places} positions that the model was trained with: what it reads of early "
            "frames lies further away than it has learned. A method of the cache that moves its sinks along "
            "(shift=true), under positions=compact, keeps all distances within the slots that are held.",
            WinnowWarning,
            stacklevel=4,
        )


def let_go(cache: Any) -> None:
    """Free a cache that nobody goes on with, now: its layers know one another, and would wait for a full collection."""
    for layer in cache.layers:
        if isinstance(layer, HeldLayer):
            layer.reset()
            layer.context.layers = []
            layer.__dict__.clear()


def _fork(cache: Any) -> Any:
    """A copy that goes on by itself. Keys of a plain layer are never written in place, and are shared."""
    plain = [layer for layer in cache.layers if not isinstance(layer, HeldLayer)]
    tensors = [getattr(layer, name, None) for layer in plain for name in ("keys", "values")]
    return copy.deepcopy(cache, {id(x): x for x in tensors if x is not None})


def _slots(layer: Any) -> int:
    """Of all heads that a layer holds."""
    if isinstance(layer, HeldLayer):
        return layer.slots_held
    keys = getattr(layer, "keys", None)
    return 0 if keys is None or not keys.numel() else keys.shape[0] * keys.shape[1] * keys.shape[2]


def _moved(value: Tensor, model: Any) -> Tensor:
    return value.to(model.device, model.dtype if value.is_floating_point() else None)
