"""Runner: the one place where a method's step meets the cache of a layer."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from winnow.cache.blocks import Coded
from winnow.cache.dense import Dense
from winnow.cache.groups import Group, groups_of, of_group, parts_of
from winnow.cache.joining import Part, coded, joined
from winnow.cache.masks import real_of
from winnow.cache.memory import Memory
from winnow.cache.queries import Asked
from winnow.cache.ragged import Ragged
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.kv import Codec, KVStep, KVView, Moment
from winnow.core.reduction import Reduction
from winnow.core.step import Action, Attend, KVReduce, Observe, Repose

Answers = list[tuple[Group, KVView, Action]]


class Runner:
    """Runs the steps of one layer.

    Args:
        layer: the `HeldLayer`.
        steps: (number of the method, step) at its point.
    """

    def __init__(self, layer: Any, steps: tuple[tuple[int, KVStep], ...]) -> None:
        self.layer, self.steps, self.memory = layer, steps, Memory()
        self.queries: Tensor | None = None
        self._recent = max((step.recent for _, step in steps), default=0)
        self._calls = any(step.calls for _, step in steps)
        self._moments = {moment for _, step in steps for moment in step.when}

    @property
    def wants_calls(self) -> bool:
        """Whether a step wants what the attention module is called with."""
        return self._calls

    def acts(self, moment: Moment) -> bool:
        """Whether any step looks at this moment, or wants to have seen its queries later."""
        return moment in self._moments or (moment == "prefill" and "before" in self._moments) or self._recent > 0

    def before(self, asked: Asked) -> list[tuple[Group, Reduction]]:
        """The rows that are computed in this prefill, where a step says so; empty: all."""
        found: list[tuple[Group, Reduction]] = []
        for number, step in self.steps:
            if "before" not in step.when:
                continue
            for group, _, action in self._answers(number, step, "before", asked):
                if isinstance(action, Attend):
                    found.append((group, action.rows))
                elif not isinstance(action, Observe):
                    raise WinnowError(
                        f"{self._slug(number)}: before a layer attends, a step returns Attend or Observe."
                    )
        return found

    def sparse(self, rows: list[tuple[Group, Reduction]], plain: Any, asked: Asked, rest: Any) -> Any:
        """Attention among some rows alone; the others get zeros, and go on with what they are."""
        args, kwargs = rest
        module, query = asked.module, asked.query
        keys, values = self.layer.store.read()
        out = None
        for group, chosen in rows:
            for lane, row in enumerate(group.rows):
                index = chosen.lane(lane).index
                own = index if group.index is None else group.index[lane][index]
                q, k, v = (x[row : row + 1, :, own] for x in (query, keys, values))
                part = plain(module, q, k, v, None, *args, **kwargs)[0]
                if out is None:
                    out = part.new_zeros(query.shape[0], query.shape[2], *part.shape[2:])
                out[row, own] = part[0]
        return out, None

    def run(self, moment: Moment, asked: Asked) -> None:
        """Run the steps of this moment, in the order of the plan."""
        if self._recent:
            whole = asked.query if self.queries is None else torch.cat([self.queries, asked.query], 2)
            self.queries = whole[:, :, -self._recent :].detach()
        for number, step in self.steps:
            if moment in step.when:
                self._apply(number, self._answers(number, step, moment, asked))
        self._encode_tail()

    def _answers(self, number: int, step: KVStep, moment: Moment, asked: Asked) -> Answers:
        layer, store = self.layer, self.layer.store
        if not layer.changed and asked.mask is not None:
            n = store.length
            store.real = layer.context.once(("all", n), asked.mask, lambda: real_of(asked.mask, n))
        found: Answers = []
        recent = self.queries[:, :, -step.recent :] if moment == "decode" and step.recent else None  # type: ignore[index]
        if recent is None and layer.changed and layer.uncut < asked.query.shape[2]:
            recent = asked.query  # an earlier step has shortened what this forward added
        for group in groups_of(store, layer.kinds, layer.seen):
            view = self._view(group, number, moment, asked, recent)
            state = self.memory.of(number, group, view.n)
            with torch.no_grad():
                action, after = step.act(view, state)
            self.memory.put(number, group, after)
            layer.context.note(view.notes)
            found.append((group, view, action))
        return found

    def _view(self, group: Group, number: int, moment: Moment, asked: Asked, recent: Tensor | None) -> KVView:
        layer, context, store = self.layer, self.layer.context, self.layer.store
        keys, values, slots, _ = parts_of(store, group, layer.seen)
        queries, allowed, fresh = asked.of(group, store, keys.shape[2], recent)
        kinds = None
        if layer.kinds is not None:
            own = layer.kinds.to(slots.device)[torch.tensor(group.rows, device=slots.device)]
            kinds = own[:, None].expand(-1, keys.shape[1], -1).gather(2, slots.long())
        return KVView(
            keys,
            values,
            queries,
            asked.scaling,
            layer.index,
            context.depth,
            moment,
            fresh,
            slots,
            layer.seen,
            kinds,
            allowed,
            layer.token_bytes,
            asked.kwargs.get("softcap"),
            self._below(group),
            context.rotary,
            context.seed,
            {},
            context.modules.get(number),
            asked.call_of(group, fresh) if self._calls and moment == "prefill" else None,
        )

    def _below(self, group: Group) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the layer before, where it holds as many slots."""
        index = self.layer.index
        store = getattr(self.layer.context.layers[index - 1], "store", None) if index else None
        if not isinstance(store, Dense) or store.length != self.layer.store.length or group.heads is not None:
            return None
        keys, values = store.read()
        return of_group(keys, group), of_group(values, group)

    def _slug(self, number: int) -> str:
        return self.layer.context.methods[number]

    def _apply(self, number: int, answers: Answers) -> None:
        if all(isinstance(action, Observe) for *_, action in answers):
            return
        layer, store = self.layer, self.layer.store
        if any(isinstance(action, Codec) for *_, action in answers):
            self._encode(number, answers)
            return
        if isinstance(store, Coded):
            raise UnsupportedError(
                f"{self._slug(number)} shortens a cache that is stored in another form already; in a plan, name it "
                "before the codec, and leave its limit unset."
            )
        heads = store.heads if isinstance(store, Ragged) else store.read()[0].shape[1]
        parts = [self._part(number, group, view, action) for group, view, action in answers]
        for part in parts:
            if part.counts is not None:
                self.memory.split(part.group, part.counts, heads)
        layer.cut(joined(parts, heads, isinstance(store, Ragged)))

    def _part(self, number: int, group: Group, view: KVView, action: Action) -> Part:
        """What an action leaves of a group."""
        _, _, slots, bias = parts_of(self.layer.store, group, self.layer.seen)
        match action:
            case Observe():
                return Part(group, view.keys, view.values, slots, bias)
            case Repose(positions=shift, keys=own):
                shift = shift[:, None].expand(-1, view.heads, -1) if shift.ndim == 2 else shift
                return Part(group, view.turned(view.keys if own is None else own, shift), view.values, slots, bias)
            case KVReduce(k=k, v=v):
                self._check(number, view, action)
                at = k.representatives
                self.memory.reduce({n for n, _ in self.steps}, group, k)
                if action.log_bias is not None:
                    bias = action.log_bias
                elif bias is not None:
                    bias = bias.gather(2, at)
                return Part(group, k.apply(view.keys), v.apply(view.values), slots.gather(2, at), bias, k.counts)
            case _:
                raise WinnowError(
                    f"{self._slug(number)}: a step at kv returns KVReduce, Codec, Repose or Observe, "
                    f"got {type(action).__name__}."
                )

    def _check(self, number: int, view: KVView, action: KVReduce) -> None:
        k, v = action.k, action.v
        lanes = view.keys.shape[:2]
        if any(x.n != view.n or x.m < 1 or x.lanes != lanes for x in (k, v)) or (k.m, k.counts) != (v.m, v.counts):
            raise WinnowError(
                f"{self._slug(number)}: maps of the cache take {view.n} slots in lanes {tuple(lanes)} and give as many "
                f"outputs for keys as for values, at least one; got {k.n} → {k.m} and {v.n} → {v.m} in lanes "
                f"{tuple(k.lanes)} and {tuple(v.lanes)}."
            )

    def _encode(self, number: int, answers: Answers) -> None:
        """Store what is there in the form of a codec."""
        store = self.layer.store
        if isinstance(store, Ragged) or store.bias is not None:
            raise UnsupportedError(
                f"{self._slug(number)} stores slots in another form, which is not built for heads that hold unequal "
                "numbers of slots, nor for slots with a weight of their own; use it without such a method."
            )
        if isinstance(store, Coded):
            raise UnsupportedError(f"{self._slug(number)} comes after another codec; a cache has one.")
        codecs = [action for *_, action in answers if isinstance(action, Codec)]
        if len(codecs) != len(answers):
            raise WinnowError(f"{self._slug(number)}: a step encodes the cache of all samples, or of none.")
        parts = []
        for (group, view, _), codec in zip(answers, codecs, strict=True):
            slots = parts_of(store, group, self.layer.seen)[2]
            part = Part(group, view.keys, view.values, slots)
            parts.append((part, codec.encode, view.n - view.n % codec.multiple))
        self.layer.codec = codecs[0]
        self.layer.cut(coded(store, parts))

    def _encode_tail(self) -> None:
        store, codec = self.layer.store, self.layer.codec
        if codec is not None and codec.every and isinstance(store, Coded) and store.tail.length >= codec.every:
            store.encode(codec.later or codec.encode, codec.every)
            self.layer.uncut = store.tail.length

    def crop(self, count: int) -> None:
        """The last slots were taken back."""
        if self.queries is not None:
            self.queries = self.queries[:, :, : max(0, self.queries.shape[2] - count)]
        if not isinstance(self.layer.store, Ragged):
            self.memory.crop(self.layer.store.length)

    def move(self, move: Any, samples: int) -> None:
        """Samples were chosen, repeated or reordered."""
        self.queries = None if self.queries is None else move(self.queries)
        self.memory.move(move(torch.arange(samples)[:, None])[:, 0].tolist())

    def reset(self) -> None:
        self.memory, self.queries = Memory(), None

    def tensors(self) -> Iterator[Tensor]:
        yield from self.memory.tensors()
        if self.queries is not None:
            yield self.queries
