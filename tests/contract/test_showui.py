"""ShowUI (arXiv 2411.17465): tokens that skip LM layers (`Route`), chosen by a signal of pixels that the core lacks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from winnow.core.layout import Layout
from winnow.core.method import Method
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.step import Action, Reduce, Route, State, Step
from winnow.core.view import View

from .interpreter import Interpreter
from .layouts import clip_tower
from .sight import Sight, provides
from .signals import CellPixels
from .toy import Picture, ToyVLM, randn


@provides(CellPixels)
def _(signal: CellPixels, sight: Sight) -> Tensor:
    return sight.lane.picture.pixels.flatten(0, 1)[sight.lane.ids]


def components(pixels: Tensor, layout: Layout, delta: float) -> Tensor:
    """`[N, values]` of a whole grid to the number of each token's area of nearly equal pixels, by first appearance."""
    h, w = (int(size) + 1 for size in layout.place[layout.content][:, 2:].max(0))
    grid = pixels.unflatten(0, (h, w))
    label = torch.arange(h * w).reshape(h, w)
    right = (grid[:, 1:] - grid[:, :-1]).norm(dim=-1) < delta
    below = (grid[1:] - grid[:-1]).norm(dim=-1) < delta
    while True:  # the smallest label of a component reaches all of it
        new = label.clone()
        new[:, 1:] = torch.where(right, torch.minimum(new[:, 1:], new[:, :-1]), new[:, 1:])
        new[:, :-1] = torch.where(right, torch.minimum(new[:, 1:], new[:, :-1]), new[:, :-1])
        new[1:] = torch.where(below, torch.minimum(new[1:], new[:-1]), new[1:])
        new[:-1] = torch.where(below, torch.minimum(new[1:], new[:-1]), new[:-1])
        if torch.equal(new, label):
            return label.flatten().unique(return_inverse=True)[1]
        label = new


@dataclass(frozen=True)
class ShowUI(Method):
    """In every other layer, only a part of each uniform area is computed; the rest passes by unchanged."""

    skip: float = 0.5
    delta: float = 1.0
    every: int = 2

    def steps(self, info):
        steps = range(0, info.depth, self.every)
        return tuple(Step(Point("layers", k), self.route, (CellPixels(),)) for k in steps)

    def route(self, view: View, state: State) -> tuple[Action, State]:
        if "retain" not in state.token:
            areas = [components(pixels, view.layout, self.delta) for pixels in view[CellPixels()]]
            retain = torch.stack([self.retain(labels) for labels in areas])
            state = replace(state, token=state.token | {"retain": retain})
        return Route(Reduction.select(state.token["retain"])), state

    def retain(self, labels: Tensor) -> Tensor:
        """Of each component of n > 1 tokens, max(1, n − round(skip·n)), evenly spaced: mask `[N]`."""
        kept = torch.zeros(len(labels), dtype=torch.bool)
        for component in labels.unique():
            at = (labels == component).nonzero()[:, 0]
            n = len(at)
            count = 1 if n == 1 else max(1, n - round(self.skip * n))
            kept[at[torch.linspace(0, n - 1, count).floor().long()]] = True
        return kept


@dataclass(frozen=True)
class DropThird(Method):
    """Drop every third token before layer 2: what was decided about the others must follow them."""

    def steps(self, info):
        return (Step(Point("layers", 2), self.drop),)

    @staticmethod
    def drop(view: View, state: State) -> tuple[Action, State]:
        kept = torch.arange(view.n)[torch.arange(view.n) % 3 != 2]
        return Reduce(Reduction.select(kept.expand(view.b, -1), view.n)), state


def screen(h: int = 6, w: int = 7, seed: int = 0) -> Picture:
    """Two flat panels and some single cells of noise."""
    pixels = torch.zeros(h, w, 12, dtype=torch.float64)
    pixels[:, w // 2 :] = 1
    for i, (y, x) in enumerate(((0, 0), (2, 1), (h - 1, w - 1), (3, w // 2))):
        pixels[y, x] = 3 + randn(12, seed=100 + i)
    return Picture(randn(1, h * w, 16, seed=seed), clip_tower(h, w, 1), Layout.grid(h, w, newline=True), pixels)


def flood(pixels: Tensor, delta: float) -> list[set[int]]:
    """Components by flood fill, in the order of their first cell."""
    h, w = pixels.shape[:2]
    left, found = set(range(h * w)), []
    for start in range(h * w):
        if start not in left:
            continue
        component, todo = set(), [start]
        while todo:
            i = todo.pop()
            if i not in left:
                continue
            left.remove(i)
            component.add(i)
            y, x = divmod(i, w)
            for v, u in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if 0 <= v < h and 0 <= u < w and (pixels[y, x] - pixels[v, u]).norm() < delta:
                    todo.append(v * w + u)
        found.append(component)
    return found


TEXT, QUESTION = randn(3, 16, seed=1), randn(4, 16, seed=2)


def by_hand(model: ToyVLM, item: Picture, retain: Tensor, decode: Tensor | None = None) -> list[Tensor]:
    """Layer by layer with the plain block on the rows that take part; newlines are ones and always do."""
    rows = torch.ones(item.lm.n, 16, dtype=torch.float64)
    rows[item.lm.content] = model.projector(model.encode(item.patches[0])[1:])
    x, pos = torch.cat([TEXT, rows, QUESTION]), torch.arange(7 + item.lm.n)
    takes = torch.ones(len(x), dtype=torch.bool)
    takes[3 + torch.tensor(item.lm.content)] = retain
    states = [x]
    for k, layer in enumerate(model.layers):
        part = takes.nonzero()[:, 0] if k % 2 == 0 else pos
        new = x.clone()
        new[part] = layer(x[part], pos[part])
        if decode is not None:  # the next token attends to what took part in this layer
            decode = layer(torch.cat([x[part], decode]), torch.cat([pos[part], pos[-1:] + 1]))[-1:]
        x = new
        states.append(x)
    return states if decode is None else [*states, decode]


@pytest.mark.parametrize("skip", [0.25, 0.5, 0.9])
def test_equals_the_plain_layers_on_the_rows_that_take_part(skip: float) -> None:
    model, item, token = ToyVLM(), screen(), randn(1, 16, seed=9)
    interpreter = Interpreter(model, ShowUI(skip))
    (flow,) = interpreter.prefill([TEXT, item, QUESTION])
    labels = torch.zeros(42, dtype=torch.int64)
    for number, component in enumerate(flood(item.pixels, 1.0)):
        labels[list(component)] = number
    retain = ShowUI(skip).retain(labels)
    *states, last = by_hand(model, item, retain, token)
    for found, expected in zip([*flow.hidden, flow.x], states, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    content = flow.content.nonzero()[:, 0]
    for k in (0, 2):  # skipped rows keep their bits and leave nothing in the cache; all others change
        before, after = flow.hidden[k], [*flow.hidden, flow.x][k + 1]
        assert torch.equal(before[content[~retain]], after[content[~retain]])
        assert not (before[content[retain]] == after[content[retain]]).all(-1).any()
        assert flow.caches[k].k.shape[1] == len(before) - int((~retain).sum())
    assert flow.caches[1].k.shape[1] == len(flow.x)
    found = interpreter.decode(flow, token, pos=len(flow.x))
    torch.testing.assert_close(found, last, rtol=1e-10, atol=1e-10)


def test_components_equal_a_flood_fill_and_singletons_stay() -> None:
    item = screen(9, 11)
    (flow,) = Interpreter(ToyVLM(), ShowUI(0.9)).prefill([item, QUESTION])
    retain = flow.lanes[0].carried[(0, "retain")]
    components = flood(item.pixels, 1.0)
    assert 3 < len(components) < 99
    for component in components:
        n = len(component)
        assert int(retain[list(component)].sum()) == (1 if n == 1 else max(1, n - round(0.9 * n)))
    assert any(len(c) == 1 for c in components)


@pytest.mark.parametrize("method", [ShowUI(skip=0.0), ShowUI(delta=0.0), ShowUI(delta=-1.0, skip=0.9)])
def test_nothing_skipped_is_the_plain_model_bit_for_bit(method: ShowUI) -> None:
    model, item = ToyVLM(), screen()
    (flow,) = Interpreter(model, method).prefill([TEXT, item, QUESTION])
    assert torch.equal(flow.x, by_hand(model, item, torch.ones(42, dtype=torch.bool))[-1])


def test_a_constant_picture_is_one_component() -> None:
    item = screen()
    item.pixels.fill_(0.3)
    (flow,) = Interpreter(ToyVLM(), ShowUI(0.7)).prefill([item, QUESTION])
    assert int(flow.lanes[0].carried[(0, "retain")].sum()) == 42 - round(0.7 * 42)


def test_the_choice_follows_its_tokens_through_another_methods_cut() -> None:
    item = screen()
    (plain,) = Interpreter(ToyVLM(), ShowUI()).prefill([item, QUESTION])
    (flow,) = Interpreter(ToyVLM(), ShowUI(), DropThird()).prefill([item, QUESTION])
    retain = plain.lanes[0].carried[(0, "retain")][flow.lanes[0].ids]
    assert len(retain) == 28
    assert torch.equal(flow.lanes[0].carried[(0, "retain")], retain)
    assert flow.caches[2].k.shape[1] == int(retain.sum()) + item.lm.n_separators + 4


def test_items_of_a_batch_equal_themselves_alone() -> None:
    model, a, b = ToyVLM(), screen(), screen(seed=5)
    b.pixels[2:4] = 2
    both = Interpreter(model, ShowUI()).prefill([TEXT, a, QUESTION], [TEXT, b, QUESTION])
    for flow, item in zip(both, (a, b), strict=True):
        (alone,) = Interpreter(model, ShowUI()).prefill([TEXT, item, QUESTION])
        torch.testing.assert_close(flow.x, alone.x, rtol=1e-12, atol=1e-12)
