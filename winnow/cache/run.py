"""Runner: the one place where a method's step meets the cache of a layer."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from winnow.cache.blocks import Coded, Lot, encode
from winnow.cache.dense import Dense
from winnow.cache.few import Few, Rows
from winnow.cache.groups import Group, groups_of, of_group, parts_of, slots_of
from winnow.cache.joining import Part, joined
from winnow.cache.masks import real_of
from winnow.cache.memory import Memory
from winnow.cache.parted import Portion, check_parted, portions_of
from winnow.cache.queries import Asked
from winnow.cache.ragged import Ragged
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.kv import Codec, KVStep, KVView, Moment
from winnow.core.packing import Packing
from winnow.core.reduction import Reduction
from winnow.core.step import Action, Attend, Follow, KVReduce, Observe, Parted, Repose

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
        self.recent = max((step.recent for _, step in steps), default=0)
        self._calls = any(step.calls for _, step in steps)
        self.most = min((step.most for _, step in steps if step.most is not None), default=None)
        self._moments = {moment for _, step in steps for moment in step.when}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Runner":
        """Of a copied cache: the same steps, with what they remember copied."""
        made = memo[id(self)] = copy.copy(self)
        made.layer, made.queries = copy.deepcopy(self.layer, memo), copy.deepcopy(self.queries, memo)
        made.memory = copy.deepcopy(self.memory, memo)
        return made

    @property
    def wants_calls(self) -> bool:
        """Whether a step wants what the attention module is called with."""
        return self._calls

    def acts(self, moment: Moment) -> bool:
        """Whether any step looks at this moment, or wants to have seen its queries later."""
        return moment in self._moments or (moment == "prefill" and "before" in self._moments) or self.recent > 0

    def before(self, asked: Asked) -> Rows:
        """The rows that are computed in this prefill, where a step says so (None: all of a group); empty: all."""
        found: Rows = []
        for number, step in self.steps:
            if "before" not in step.when:
                continue
            for group, view, action in self._answers(number, step, "before", asked):
                if not isinstance(action, Attend | Parted | Observe):
                    raise WinnowError(
                        f"{self._slug(number)}: before a layer attends, a step returns Attend, Parted or Observe."
                    )
                if isinstance(action, Parted):
                    check_parted(action, view, self._slug(number))
                    found.append((group, action))
                    continue
                found.append((group, action.rows if isinstance(action, Attend) else None))
        return found if any(rows is not None for _, rows in found) else []

    def few(self) -> Rows:
        """The slots that this layer reads for a decoded token, where an earlier layer says so; empty: all."""
        few = self.layer.context.few_of(self.layer.index)
        return [] if few is None else few.of_layer(self.layer)

    def sparse(self, rows: Rows, plain: Any, asked: Asked, rest: Any) -> Any:
        """Attention among some rows alone, or in parts; queries of others get zeros, and go on with what they are."""
        args, kwargs = rest
        kwargs = {name: value for name, value in kwargs.items() if name != "position_ids"}  # those of all rows
        query, out = asked.query, None
        pair = self.layer.store.read()
        columns = torch.arange(pair[0].shape[2], device=pair[0].device)
        for group, chosen in rows:
            for lane, row in enumerate(group.rows):
                own = columns if group.index is None else group.index[lane].to(columns.device)
                if isinstance(chosen, Parted):
                    lots = portions_of(chosen, group, lane, own, pair, asked)
                else:
                    lots = iter((self._portion(chosen, lane, row, own, pair, asked),))
                for new, keys, values, mask in lots:
                    part = plain(asked.module, query[row : row + 1, :, new], keys, values, mask, *args, **kwargs)[0]
                    if out is None:
                        out = part.new_zeros(query.shape[0], query.shape[2], *part.shape[2:])
                    out[row, new] = part[0]
        return out, None

    @staticmethod
    def _portion(chosen: Any, lane: int, row: int, own: Tensor, pair: tuple[Tensor, Tensor], asked: Asked) -> Portion:
        """Some rows of a sample, which attend to one another."""
        # A layer on another device may have chosen.
        own = own if chosen is None else own[chosen.lane(lane).index.to(own.device)]
        start = pair[0].shape[2] - asked.query.shape[2]
        new, mask = own[own >= start] - start, asked.mask
        part_mask = None  # of two axes, it tells of padding alone, and none is left
        if mask is not None and mask.ndim == 4:
            part_mask = mask[row if mask.shape[0] > 1 else 0][None, :, new][..., own]
        return new, pair[0][row : row + 1, :, own], pair[1][row : row + 1, :, own], part_mask

    def run(self, moment: Moment, asked: Asked) -> None:
        """Run the steps of this moment, in the order of the plan."""
        if self.recent:
            whole = asked.query if self.queries is None else torch.cat([self.queries, asked.query], 2)
            self.queries = whole[:, :, -self.recent :].detach()
        for number, step in self.steps:
            if moment in step.when and not self._encoded_by(number):
                answers = self._answers(number, step, moment, asked)
                if moment == "decode" and any(isinstance(action, Attend) for *_, action in answers):
                    self.layer.context.few = Few.of(self.layer, self._slug(number), answers)
                else:
                    self._apply(number, answers, moment == "decode")
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
        keys, values, slots, bias = parts_of(store, group, layer.seen)
        cut = layer.changed and layer.uncut == 0
        queries, allowed, fresh = asked.of(group, store, keys.shape[2], recent, cut)
        kinds = None
        if layer.kinds is not None:
            own = layer.kinds.to(slots.device)[torch.tensor(group.rows, device=slots.device)]
            kinds = own[:, None].expand(-1, keys.shape[1], -1).gather(2, slots.long())
        places, query_places = self._places(group, slots, queries.shape[2], recent is not None)
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
            asked.sinks_of(group, store),
            self._below(group),
            context.rotary,
            context.seed,
            {},
            context.modules.get(number),
            asked.call_of(group, fresh) if self._calls and moment == "prefill" else None,
            bias,
            group.heads,
            places,
            query_places,
        )

    def _places(self, group: Group, slots: Tensor, q: int, remembered: bool) -> tuple[Tensor | None, Tensor | None]:
        """Where the slots of a group stand, and its q newest queries; None where nobody asks.

        Args:
            remembered: whether the queries are those of several forwards.
        """
        layer = self.layer
        if layer.places is None:
            return None, None
        stand = layer.places.of(group.rows, slots)
        if remembered or group.index is None:
            return stand, layer.places.newest(group.rows, q).to(slots.device)
        columns = group.index[:, -q:].to(slots.device) + layer.seen - layer.store.length
        return stand, layer.places.of(group.rows, columns[:, None])[:, 0]

    def _below(self, group: Group) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the layer before, where it holds as many slots."""
        index = self.layer.index
        other: Any = self.layer.context.layers[index - 1] if index else None
        store = None if getattr(other, "away", False) else getattr(other, "store", None)
        if not isinstance(store, Dense) or store.length != self.layer.store.length or group.heads is not None:
            return None
        keys, values = store.read()
        return of_group(keys, group), of_group(values, group)

    @property
    def slugs(self) -> str:
        """The methods whose steps run here."""
        return ", ".join(dict.fromkeys(self._slug(number) for number, _ in self.steps))

    def _slug(self, number: int) -> str:
        return self.layer.context.methods[number]

    def _apply(self, number: int, answers: Answers, decoding: bool = False) -> None:
        for index in {i for *_, action in answers if isinstance(action, Follow) for i in action.layers}:
            other: Any = self.layer.context.layers[index]
            if hasattr(other, "runner") and self.layer.read_now is not None:
                away = other.away
                other.prefetch()
                other.runner.follow(number, self.layer.read_now[0])
                if away:
                    other.offload()
        if all(isinstance(action, Observe | Follow) for *_, action in answers):
            return
        layer, store = self.layer, self.layer.store
        if any(isinstance(action, Codec) for *_, action in answers):
            self._encode(number, answers)
            return
        if isinstance(store, Coded):
            raise UnsupportedError(
                f"{self._slug(number)} shortens a cache that is stored in another form already; in a plan, name it "
                "before the codec, leave its limit unset, and read all of the prompt in one turn."
            )
        heads = store.heads
        parts = [self._part(number, group, view, action) for group, view, action in answers]
        ragged = isinstance(store, Ragged) or any(part.unequal_heads for part in parts)
        for part in parts:
            if ragged or part.counts is not None:
                each = (part.keys.shape[2],) * (len(part.group.rows) * part.keys.shape[1])
                self.memory.split(part.group, part.counts or each, heads, ragged)
        layer.cut(joined(parts, heads, ragged), decoding)

    def follow(self, number: int, left: Packing) -> None:
        """Of what this layer read in this forward, the tokens of another layer alone stay."""
        layer, own = self.layer, self.layer.read_now[0]
        if own.sizes == left.sizes:
            return
        layer.mark_padding()
        stays = torch.zeros_like(left.real).scatter(1, left.source, left.mask).gather(1, own.source)
        first, answers = layer.seen - own.width, []
        for group in groups_of(layer.store, None, layer.seen):
            keys, values, slots, _ = parts_of(layer.store, group, layer.seen)
            new = slots.long() - first
            rows = stays.to(new.device)[torch.tensor(group.rows, device=new.device)]
            kept = (new < 0) | rows[:, None].expand(-1, new.shape[1], -1).gather(2, new.clamp_min(0))
            chosen = Reduction.select(kept)
            answers.append((group, KVView(keys, values, keys[:, :, :0], 1.0), KVReduce(chosen, chosen)))
        self._apply(number, answers)  # type: ignore[arg-type]

    def _part(self, number: int, group: Group, view: KVView, action: Action) -> Part:
        """What an action leaves of a group."""
        _, _, slots, bias = parts_of(self.layer.store, group, self.layer.seen)
        match action:
            case Observe() | Follow():
                return Part(group, view.keys, view.values, slots, bias)
            case Repose(positions=shift, keys=own):
                shift = shift[:, None].expand(-1, view.heads, -1) if shift.ndim == 2 else shift
                return Part(group, view.turned(view.keys if own is None else own, shift), view.values, slots, bias)
            case KVReduce(k=k, v=v):
                self._check(number, view, action)
                at = k.representatives
                self.memory.reduce({n for n, _ in self.steps}, group, at, v)
                if action.log_bias is not None:
                    bias = action.log_bias
                elif bias is not None:
                    bias = bias.gather(2, at)
                keys, values = reduced(k, view.keys), reduced(v, view.values)
                return Part(group, keys, values, slots.gather(2, at), bias, k.counts)
            case _:
                raise WinnowError(
                    f"{self._slug(number)}: a step at kv returns KVReduce, Codec, Repose, Follow or Observe, "
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
        layers = self._coded_layers(number, codecs[0])
        found = []
        for (group, view, _), codec in zip(answers, codecs, strict=True):
            slots = None
            if store.slots is not None or group.index is not None:
                slots = parts_of(store, group, self.layer.seen)[2].to(torch.int32)
                slots = slots[:, :1].clone() if store.slots is None else slots  # all heads hold the same
            below = [self._below(group) for _ in layers[1:]]
            pairs: list[Any] = [*below, (view.keys, view.values)]
            lots = tuple(Lot.of(group.rows, keys, values, slots) for keys, values in pairs)
            count = view.n - view.n % max(1, codec.multiple)
            if count:
                encode(lots, codec.encode, count, self.layer.seen)
            found.append(lots)
        self.layer.codec = (number, codecs[0])
        for layer, lots in zip(layers, zip(*found, strict=True), strict=True):
            layer.cut(Coded(list(lots)))

    def _coded_layers(self, number: int, codec: Codec) -> list[Any]:
        """The layers that a codec encodes here: this one, or the one before and this one."""
        layer = self.layer
        if not codec.pair:
            return [layer]
        below: Any = layer.context.layers[layer.index - 1] if layer.index else None
        if getattr(below, "away", False):
            raise UnsupportedError(
                f"{self._slug(number)} stores two layers together, of which an offloaded cache has one on the device; "
                "leave cache_implementation unset, or use another codec."
            )
        own: Any = layer.store
        other: Any = getattr(below, "store", None)
        same = isinstance(other, Dense) and other.length == own.length and other.bias is None
        if same and (own.slots is not None or other.slots is not None):
            same = torch.equal(slots_of(own, layer.seen), slots_of(other, layer.seen))
        if not same:
            raise UnsupportedError(
                f"{self._slug(number)} stores layers {layer.index - 1} and {layer.index} together, and these do not "
                "hold the same slots as they are; use it without a method that drops others in each layer, without "
                "another codec, and on models all of whose layers attend to everything."
            )
        return [below, layer]

    def _encoded_by(self, number: int) -> bool:
        """Whether a codec has done its work here: what comes later waits in the tail."""
        return self.layer.codec is not None and self.layer.codec[0] == number

    def _encode_tail(self) -> None:
        if self.layer.codec is None or not self.layer.codec[1].every:
            return
        codec = self.layer.codec[1]
        layers = [self.layer]
        if codec.pair:
            layers.insert(0, self.layer.context.layers[self.layer.index - 1])
        for lots in zip(*(layer.store.lots for layer in layers), strict=True):
            while lots[-1].waiting >= codec.every:
                encode(lots, codec.later or codec.encode, codec.every, self.layer.seen)
        for layer in layers:
            layer.uncut = min(layer.uncut, layer.store.uncut)

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

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put `change` of each tensor that is remembered in its place."""
        self.memory.each(change)
        self.queries = None if self.queries is None else change(self.queries)

    def tensors(self) -> Iterator[Tensor]:
        yield from self.memory.tensors()
        if self.queries is not None:
            yield self.queries


def reduced(chosen: Reduction, x: Tensor) -> Tensor:
    """What is left of keys or values; sums run in fp32, because thousands of slots may become one."""
    if chosen.is_selection:
        return chosen.apply(x)
    return chosen.apply(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
