"""A small interpreter for what the engine does not do yet: Route, Emit, KVReduce, and steps in vision blocks.

It plays them on the toy model, one sequence at a time, grouped views, no speed, and shows what each Action means, so
that a sketch in this folder proves that the contract can say what a paper does.
What the engine does is asked of the engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.core.layout import CONTENT, Layout
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.point import Point
from winnow.core.step import Action, Emit, KVReduce, Observe, Reduce, Route, State
from winnow.core.view import View

from .flow import Cache, Flow, Lane, Trace
from .sight import PROVIDERS, Sight
from .toy import Picture, ToyVLM, causal


class Interpreter:
    """A plan on a toy model. `requests` remembers State.request from call to call, for each row and method."""

    def __init__(self, model: ToyVLM, *methods: Method) -> None:
        self.model, self.plan = model, Plan(methods)
        self.steps = self.plan.steps(model.info)
        built = [method.build(model.info) for method in methods]
        self.modules = [m if m is None else m.to(torch.float64).requires_grad_(False) for m in built]
        self.requests: dict[Any, dict[str, Any]] = {}
        self.log: list[tuple[str, Lane | Cache, Action]] = []

    def encode(self, pictures: Iterable[tuple[int, Picture]]) -> list[tuple[Lane, Tensor]]:
        """(row, picture) through tower and projector: for each its lane in the LM's layout, and its rows `[n, D]`."""
        given = list(pictures)
        flows = [[self._tile(row, p, t) for t in range(len(p.patches))] for row, p in given]
        every = [flow for tiles in flows for flow in tiles]
        for i, block in enumerate(self.model.blocks):
            self._act(Point("blocks", i), every)
            halves = [self._attention(block, i, flow) for flow in every]
            self._act(Point("blocks", i, "mlp"), every)
            for flow, half in zip(every, halves, strict=True):
                self._mlp(block, i, flow, half)
        joined = [self._joined(row, p, tiles) for (row, p), tiles in zip(given, flows, strict=True)]
        self._act(Point("features"), joined)
        return [self._projected(flow) for flow in joined]

    def prefill(self, *samples: list[Tensor | Picture]) -> list[Flow]:
        """Samples, each a list of texts `[n, D]` and pictures, through tower and LM."""
        encoded = iter(
            self.encode((row, p) for row, sample in enumerate(samples) for p in sample if isinstance(p, Picture))
        )
        flows = [self._sequence(sample, encoded) for sample in samples]
        self._act(Point("projected"), flows)
        for i, layer in enumerate(self.model.layers):
            self._act(Point("layers", i), flows)
            for flow in flows:
                flow.hidden.append(flow.x)
                self._mlp(layer, i, flow, self._attention(layer, i, flow))
            self._act_kv(Point("kv", i), flows)
        return flows

    def decode(self, flow: Flow, x: Tensor, pos: int) -> Tensor:
        """One more token `[1, D]` of a prefilled sample, at a logical position: what the last layer gives for it."""
        for i, layer in enumerate(self.model.layers):
            q, k, v = layer.qkv(layer.norm1(x), torch.tensor([pos]))
            cache = flow.caches[i]
            cache.append(k, v)
            bias = None if cache.bias is None else cache.bias[:, None]
            cache.received = layer.weights(q, cache.k, bias)
            x = x + layer.join(cache.received, cache.v)
            x = x + layer.mlp(layer.norm2(x))
            self._act_kv(Point("kv", i), [flow])
        return x

    def _tile(self, row: int, picture: Picture, t: int) -> Flow:
        n = picture.tower.n // len(picture.patches)
        names = ("kind", "tile", "cell", "place", "boxes")
        arrays = {name: getattr(picture.tower, name)[t * n : (t + 1) * n] for name in names}
        # Tiles of one shape are grouped: which tile it is does not enter the key.
        layout = Layout(("tile", n, arrays["kind"].tobytes()), **arrays)
        lane = Lane(picture, layout, torch.arange(n), layout.n_content, row)
        x = torch.cat([self.model.cls[None], picture.patches[t]])
        return Flow(x, [lane], torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool))

    def _joined(self, row: int, picture: Picture, tiles: list[Flow]) -> Flow:
        lanes = [flow.lanes[0] for flow in tiles]
        n = picture.tower.n // len(tiles)
        lane = Lane(
            picture, picture.tower, torch.cat([t * n + x.ids for t, x in enumerate(lanes)]), picture.lm.n_content, row
        )
        lane.tiles = tiles
        alike = lambda name: {k: torch.cat([getattr(x, name)[k] for x in lanes]) for k in getattr(lanes[0], name)}  # noqa: E731
        lane.carried = {k: v for k, v in alike("carried").items() if k[0] != "bias"}
        lane.summed = alike("summed")
        x = torch.cat([flow.x for flow in tiles])
        return Flow(x, [lane], torch.zeros(len(x), dtype=torch.int64), torch.ones(len(x), dtype=torch.bool))

    def _projected(self, flow: Flow) -> tuple[Lane, Tensor]:
        """From the tower's rows to the LM's layout: rows that do not stand at content go."""
        lane = flow.lanes[0]
        lm, tower = lane.picture.lm, lane.layout
        place = {int(lm.cell[i]): j for j, i in enumerate(lm.content)}
        ids = [place.get(int(tower.cell[i]), -1) if tower.kind[i] == CONTENT else -1 for i in lane.ids]
        stays = torch.tensor([j for j, i in enumerate(ids) if i >= 0], dtype=torch.int64)
        now = torch.tensor([i for i in ids if i >= 0], dtype=torch.int64)
        if lane.ordered:  # outputs stand where their representatives stood: in the LM's order
            order = torch.argsort(now)
            stays, now = stays[order], now[order]
        lane.features = (lane.ids, flow.x)
        lane.carried = {k: v[stays] for k, v in lane.carried.items()}
        lane.summed = {k: v[stays] for k, v in lane.summed.items()}
        lane.layout, lane.ids, lane.entry = lm, now, lm.n_content
        return lane, self.model.projector(flow.x[stays])

    def _sequence(self, sample: list[Tensor | Picture], encoded: Any) -> Flow:
        """Text and items in one row; positions are those that an uncompressed row would have."""
        x, lane, content, pos, lanes, start = [], [], [], [], [], 0
        for part in sample:
            if isinstance(part, Tensor):
                x.append(part)
                own, item, full = torch.arange(len(part)), torch.full((len(part),), -1), len(part)
                content.append(torch.zeros(len(part), dtype=torch.bool))
            else:
                one, rows = next(encoded)
                at = torch.as_tensor(part.lm.content)[one.ids]
                breaks = torch.as_tensor((part.lm.kind != CONTENT).nonzero()[0])
                breaks = breaks if len(at) else breaks[:0]
                own = torch.cat([at, breaks])
                if one.ordered:
                    own = own.sort().values
                elif len(breaks):
                    raise WinnowError("outputs in an order of their own cannot stand between separators")
                real = torch.isin(own, at)
                rows_of_all = torch.ones(len(own), rows.shape[1], dtype=rows.dtype)  # what a separator looks like
                rows_of_all[real] = rows
                x.append(rows_of_all)
                item, full = torch.full((len(own),), len(lanes)), part.lm.n
                content.append(real)
                lanes.append(one)
            lane.append(item)
            pos.append(start + own)
            start += full
        return Flow(torch.cat(x), lanes, torch.cat(lane), torch.cat(content), torch.cat(pos))

    def _attention(self, block: Any, i: int, flow: Flow) -> tuple[Tensor, Tensor] | None:
        """Attention of the rows that are computed; what the others become is remembered for `_mlp`."""
        route = flow.routed()
        rows = torch.arange(len(flow.x)) if route is None else route[0].nonzero()[:, 0]
        pos, bias = flow.pos, flow.bias()
        u = block.norm1(flow.x[rows])
        q, k, v = block.qkv(u, None if pos is None else pos[rows])
        if route is not None and route[2] is not None:
            keys, values = (block.split(c).index_copy(1, rows, own) for c, own in zip(route[2], (k, v), strict=True))
        else:
            keys, values, bias = k, v, None if bias is None else bias[rows]
        mask = None if pos is None else causal(len(rows), keys.shape[1], u.dtype)
        total = mask if bias is None else bias if mask is None else mask + bias
        weights = block.weights(q, keys, total)
        out = block.join(weights, values)
        full = lambda x: x.new_full((len(flow.x), x.shape[-1]), torch.nan).index_copy(0, rows, x)  # noqa: E731
        heads = lambda x: x.new_full((x.shape[0], len(flow.x), x.shape[-1]), torch.nan).index_copy(1, rows, x)  # noqa: E731
        trace = Trace(full(u), heads(q), heads(k), heads(v), full(out), bias=bias, at=flow.where())
        flow.traces[i] = trace
        if pos is not None:
            own = None if bias is None else bias.expand(k.shape[0], -1)
            flow.caches[i] = Cache(keys, values, len(rows), own, weights)
        flow.x = flow.x.index_add(0, rows, out)
        return None if route is None else (route[0], route[1])

    def _mlp(self, block: Any, i: int, flow: Flow, route: tuple[Tensor, Tensor] | None) -> None:
        rows = torch.arange(len(flow.x)) if route is None else route[0].nonzero()[:, 0]
        if route is not None and len(route[0]) != len(flow.x):
            raise WinnowError("a Reduce inside a block whose rows are routed is not defined")
        u = block.norm2(flow.x[rows])
        out = block.mlp(u)
        if len(flow.x) == len(flow.traces[i].u1):  # else the two halves have no common coordinates
            full = lambda x: x.new_full((len(flow.x), x.shape[-1]), torch.nan).index_copy(0, rows, x)  # noqa: E731
            flow.traces[i].u2, flow.traces[i].mlp = full(u), full(out)
        x = flow.x.index_add(0, rows, out)
        flow.x = x if route is None else torch.where(route[0][:, None], x, route[1])

    def _act(self, point: Point, flows: list[Flow]) -> None:
        for number, step in self.steps:
            if step.at == point:
                for group in self._groups(number, flows):
                    self._run(number, step, group)

    def _groups(self, number: int, flows: list[Flow]) -> list[list[tuple[Flow, Lane]]]:
        """Lanes of equal length, layout and remembered fields; of one sample if the method remembers requests."""
        found: dict[Any, list[tuple[Flow, Lane]]] = {}
        streaming = self.plan.methods[number].streaming
        for flow in flows:
            for lane in flow.lanes:
                names = [sorted(k[1] for k in d if k[0] == number) for d in (lane.carried, lane.summed, lane.item)]
                key = (lane.layout, len(lane.ids), lane.entry, str(names), lane.row if streaming else None)
                found.setdefault(key, []).append((flow, lane))
        return list(found.values())

    def _state(self, number: int, row: int, holders: list[Any]) -> State:
        def stack(name: str) -> dict[str, Tensor]:
            keys = [k for k in getattr(holders[0], name) if k[0] == number]
            return {k[1]: torch.stack([getattr(h, name)[k] for h in holders]) for k in keys}

        request = self.requests.get(self._owner(number, row), {})
        return State(stack("carried"), stack("item"), request, stack("summed"))

    def _owner(self, number: int, row: int) -> tuple[int, int | None]:
        return (number, row if self.plan.methods[number].streaming else None)

    def _remember(self, number: int, row: int, holders: list[Any], state: State) -> None:
        self.requests[self._owner(number, row)] = state.request
        for name, values in (("carried", state.token), ("item", state.item), ("summed", state.summed)):
            for i, holder in enumerate(holders):
                others = {k: v for k, v in getattr(holder, name).items() if k[0] != number}
                setattr(holder, name, others | {(number, k): v[i] for k, v in values.items()})

    def _run(self, number: int, step: Any, group: list[tuple[Flow, Lane]]) -> None:
        lanes = [lane for _, lane in group]
        first, sights = lanes[0], [Sight(self.model, step.at, flow, lane) for flow, lane in group]
        view = View(
            torch.stack([flow.x[flow.slots(lane)] for flow, lane in group]),
            first.layout,
            torch.stack([lane.ids for lane in lanes]),
            first.entry,
            step.signals(lambda signal: torch.stack([PROVIDERS[type(signal)](signal, s) for s in sights])),
            module=self.modules[number],
        )
        action, state = step.act(view, self._state(number, first.row, lanes))
        self._remember(number, first.row, lanes, state)
        for i, (flow, lane) in enumerate(group):
            self._dispatch(number, step.at, action, i, flow, lane)
            self.log.append((str(step.at), lane, action))

    def _dispatch(self, number: int, point: Point, action: Action, i: int, flow: Flow, lane: Lane) -> None:
        match action:
            case Observe():
                return
            case Reduce():
                reduction = action.reduction.lane(i)
                flow.reduce(lane, reduction)
                if action.log_bias is not None:
                    lane.carried[("bias", number)] = action.log_bias[i]
                if point.name == "features":
                    lane.ordered &= reduction.ordered
            case Route():
                rows = action.rows.lane(i)
                lane.carried[("route",)] = rows.kept
                if action.output is not None:
                    lane.carried[("output",)] = action.output[i]
                if action.context is not None:
                    lane.carried |= {("context", "k"): action.context[0][i], ("context", "v"): action.context[1][i]}
            case Emit():
                provenance = None if action.provenance is None else action.provenance.lane(i)
                flow.emit(lane, action.tokens[i], action.layout, provenance)
            case _:
                raise WinnowError(f"{type(action).__name__} cannot be done at {point}")

    def _act_kv(self, point: Point, flows: list[Flow]) -> None:
        """At `kv` a lane is the cache of one sample: text and items, every head with tokens of its own."""
        for number, step in self.steps:
            if step.at != point:
                continue
            for row, flow in enumerate(flows):
                cache = flow.caches[point.index]
                n = cache.k.shape[1]
                sight = Sight(self.model, point, flow, cache=cache)
                signals = step.signals(lambda signal, sight=sight: PROVIDERS[type(signal)](signal, sight)[None])
                tokens = cache.k.transpose(0, 1).flatten(1)[None]
                view = View(tokens, Layout.grid(1, n), torch.arange(n)[None], cache.prompt, signals)
                action, state = step.act(view, self._state(number, row, [cache]))
                self._remember(number, row, [cache], state)
                if isinstance(action, KVReduce):
                    bias = None if action.log_bias is None else action.log_bias[0]
                    cache.reduce(action.k.lane(0), action.v.lane(0), bias)
                elif not isinstance(action, Observe):
                    raise WinnowError(f"{type(action).__name__} cannot be done at {point}")
                self.log.append((str(point), cache, action))
