"""What a method remembers between its steps reaches every later step, in the tokens of then."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch
import zoo
from byhand import Reference
from cases import TOWERS
from probes import Halve, Pick, forward

import winnow
from winnow.contract import CONTENT, Action, Method, Observe, Point, Reduce, Reduction, State, Step, View
from winnow.core.plan import Plan


@dataclass(frozen=True)
class Noting(Method):
    """Notes at `features` the cell of each token, and looks at its notes at each later point."""

    later: tuple[str, ...] = ("projected", "layers[0]", "layers[2]")
    seen: list = field(default_factory=list, compare=False, metadata={"setting": False})
    slug: ClassVar[str] = "noting"

    def steps(self, info):
        looks = [Step(Point.of(at), self._look) for at in self.later]
        return (Step(Point.of("features"), self._note), *looks)

    def _note(self, view: View, state: State) -> tuple[Action, State]:
        cell = torch.from_numpy(view.layout.cell)[view.ids]
        state = replace(state, token={"cell": cell}, item={"rows": torch.full((view.b,), view.n)})
        return Observe(), replace(state, summed={"patches": torch.ones(view.b, view.n)}, request={"told": "once"})

    def _look(self, view: View, state: State) -> tuple[Action, State]:
        self.seen.append((view, state))
        return Observe(), state


@pytest.mark.parametrize("build", TOWERS)
def test_state_from_features_reaches_the_layers(build):
    """In the LM's own order of tiles, without [CLS] and without what unpadding removed."""
    noting, model, parts = Noting(), zoo.model(build), zoo.samples(build, zoo.MIXED)
    with winnow.compress(model, noting):
        forward(model, zoo.collate(parts))
    expected = [cells.tolist() for part in parts for cells in Reference(model).entry(part).cells]
    for point in range(len(noting.later)):
        own = noting.seen[point * len(noting.seen) // 3 : (point + 1) * len(noting.seen) // 3]
        found = [cells.tolist() for _, state in own for cells in state.token["cell"]]
        assert sorted(found) == sorted(expected)
    for view, state in noting.seen:
        cells = torch.from_numpy(view.layout.cell[view.layout.kind == CONTENT])
        assert torch.equal(state.token["cell"], cells[view.ids])
        assert state.request == {"told": "once"}
        assert state.item["rows"].shape == (view.b,)


@pytest.mark.parametrize("build", TOWERS)
def test_state_from_features_follows_the_reductions_of_others(build):
    """Selected at `features`, paired at `projected`, selected in the LM: cells of representatives, sums of patches."""
    noting, model, inputs = Noting(later=("layers[2]",)), zoo.model(build), zoo.inputs(build, ("3 C 6", "2 C 4"))
    plan = Plan((noting, Pick(keep=20, at="features"), Halve(), Pick(keep=4, at="layers[2]"), noting))
    with winnow.compress(model, plan):
        forward(model, inputs)
    (before, own), *_ = noting.seen
    cells = torch.from_numpy(before.layout.cell[before.layout.kind == CONTENT])
    assert torch.equal(own.token["cell"], cells[before.ids])
    patches = own.summed["patches"]
    assert patches[:, :-1].unique().tolist() == [2]
    assert bool((patches[:, -1] == patches.sum(1) - 2 * (before.n - 1)).all())
    assert bool((patches.sum(1) <= 20).all())


def test_state_from_features_of_a_picture_that_is_partly_masked():
    """The caller's mask hides some of its tokens: what was remembered of the others is theirs."""
    noting, model = Noting(later=("layers[1]",)), zoo.model("llava_clip")
    inputs = zoo.inputs("llava_clip", ("3 A 6",))
    hidden = (inputs["input_ids"][0] == zoo.IMAGE).nonzero()[[0, 7, 8], 0]
    inputs["attention_mask"][0, hidden] = 0
    with winnow.compress(model, Plan((noting, Pick(keep=4, at="layers[2]")))):
        forward(model, inputs)
    ((view, state),) = noting.seen
    assert view.n == 22
    assert state.token["cell"].tolist() == [[i for i in range(25) if i not in (0, 7, 8)]]


@dataclass(frozen=True)
class BareWhereFull(Method):
    """Keeps all tokens at a point, and drops the newlines of a picture that fills its tiles."""

    at: str = "features"  # type: ignore[misc]
    slug: ClassVar[str] = "bare-where-full"

    def steps(self, info):
        return (Step(Point.of(self.at), self._act),)

    def _act(self, view: View, state: State) -> Reduce:
        drop = view.n_visual == 125
        return Reduce(Reduction.select(torch.arange(view.n).expand(view.b, -1), view.n), "drop" if drop else "keep")


@pytest.mark.parametrize("point", ["features", "projected", "layers[1]"])
def test_separators_belong_to_the_item(point):
    """Two pictures in one call of the encoder, one of which loses its newlines."""
    model = zoo.model("llava_next")
    with winnow.compress(model, BareWhereFull(at=point)) as handle:
        for rows in (("3 C 2 A 6",), ("3 C 6", "2 A 4")):
            forward(model, zoo.inputs("llava_next", rows))
            ledger = handle.last
            full = [item.n_visual == 125 for item in ledger.items]
            assert sorted(full) == [False, True]
            gone = sum(item.layout.n_separators for item, bare in zip(ledger.items, full, strict=True) if bare)
            assert gone > 0
            assert sum(ledger.logical) - sum(ledger.layer_tokens[-1]) == gone
