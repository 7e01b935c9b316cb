"""ToMe (arXiv 2210.09461): merging between attention and MLP of every vision block, with sizes that bias attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.method import Method
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.step import Reduce, State, Step
from winnow.core.view import View
from winnow.methods.tome import ToMe
from winnow.signals.vision import VisionAttention

from .interpreter import Interpreter
from .layouts import picture
from .toy import Picture, ToyVLM, randn


@dataclass(frozen=True)
class PairsOf(Method):
    """Merge neighbours before a block: a method that knows nothing of sizes."""

    block: int = 2

    def steps(self, info):
        return (Step(Point("blocks", self.block), self.merge),)

    @staticmethod
    def merge(view: View, state: State) -> tuple[Reduce, State]:
        cluster = (torch.arange(view.n) // 2).expand(view.b, -1)
        weight = torch.full((view.b, view.n), 0.5, dtype=torch.float64)
        weight[:, -1] = 0.5 if view.n % 2 == 0 else 1
        return Reduce(Reduction.assign(cluster, weight, m=(view.n + 1) // 2, ordered=True)), state


def by_hand(model: ToyVLM, patches: Tensor, r: int, proportional: bool) -> tuple[Tensor, list[set[int]]]:
    """One tile in loops over tokens: the tower's output and the patches that each row stands for."""
    x, groups = torch.cat([model.cls[None], patches]), [{i} for i in range(len(patches) + 1)]
    for i, block in enumerate(model.blocks):
        q, k, v = block.qkv(block.norm1(x), None)
        sizes = torch.tensor([float(len(g)) for g in groups], dtype=x.dtype)
        x = x + block.join(block.weights(q, k, sizes.log() if proportional and i else None), v)
        key = k.mean(0) / k.mean(0).norm(dim=-1, keepdim=True)
        best = {a: max(range(1, len(x), 2), key=lambda b: (key[a] @ key[b]).item()) for a in range(2, len(x), 2)}
        merged = sorted(best, key=lambda a: -(key[a] @ key[best[a]]).item())[:r]
        rows = {j: (x[j] * sizes[j], sizes[j], groups[j]) for j in range(len(x))}
        for a in merged:
            (s, n, g), (t, m, h) = rows.pop(a), rows[best[a]]
            rows[best[a]] = (t + s, m + n, h | g)
        order = sorted(j for j in rows if j % 2 == 0) + sorted(j for j in rows if j % 2)
        x = torch.stack([rows[j][0] / rows[j][1] for j in order])
        groups = [rows[j][2] for j in order]
        x = x + block.mlp(block.norm2(x))
    return x, groups


@dataclass(frozen=True)
class Seen(Method):
    """At the connector, keep the tokens that [CLS] attends to in a block of the tower that has run long before."""

    row: VisionAttention = VisionAttention(layer=1)
    keep: int = 5

    def reduce(self, view: View) -> Reduction:
        return Reduction.select(view[self.row].topk(self.keep, dim=-1).indices.sort(-1).values, view.n)


ITEM = picture(5, 5, frames=2, seed=4)


def encoded(model: ToyVLM, *methods: Method, item: Picture = ITEM):
    """Tower output by tile, from the ends of an interpreter's run; its lane, and the lanes of its tiles."""
    interpreter = Interpreter(model, *methods)
    ((lane, _),) = interpreter.encode([(0, item)])
    return interpreter, [flow.x for flow in lane.tiles], [flow.lanes[0] for flow in lane.tiles]


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("r", [1, 3, 6])
def test_equals_a_reference_loop(r: int, proportional: bool) -> None:
    model = ToyVLM(vision_depth=4)
    _, found, lanes = encoded(model, ToMe(r, proportional))
    for x, lane, patches in zip(found, lanes, ITEM.patches, strict=True):
        expected, groups = by_hand(model, patches, r, proportional)
        torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)
        assert lane.summed[(0, "size")].tolist() == [len(g) for g in groups]
        assert all(int(i) in g for i, g in zip(lane.ids, groups, strict=True))
        other = by_hand(model, patches, r, not proportional)[0]  # the test can tell the two kinds of attention apart
        assert other.shape == x.shape
        assert not torch.allclose(x, other)


def test_every_map_is_stochastic_and_gives_each_source_to_one_output() -> None:
    interpreter, _, lanes = encoded(ToyVLM(vision_depth=4), ToMe(4))
    maps = [action.reduction.lane(0) for _, lane, action in interpreter.log if lane is lanes[0]]
    assert len(maps) == 4
    for one in maps:
        assert one.is_stochastic
        assert bool(((one.to_matrix() != 0).sum(0) == 1).all())
    total = maps[3] @ maps[2] @ maps[1] @ maps[0]
    assert ((total.to_matrix() > 0).sum(-1)).tolist() == lanes[0].summed[(0, "size")].tolist()
    x = randn(26, 3, seed=1)
    rows = total.apply(x)
    assert torch.equal(total.expand(rows)[total.sources(5)], rows[5].expand(len(total.sources(5)), -1))


@pytest.mark.parametrize("block", [1, 2, 3])
def test_sizes_are_conserved_through_a_merge_of_another_method(block: int) -> None:
    _, _, lanes = encoded(ToyVLM(vision_depth=4), ToMe(3), PairsOf(block))
    for lane in lanes:
        assert lane.summed[(0, "size")].sum().item() == 26
        assert len(lane.ids) < 26 - 4 * 3


def test_r_0_is_the_identity_bit_for_bit() -> None:
    model = ToyVLM()
    _, found, _ = encoded(model, ToMe(0))
    for x, patches in zip(found, ITEM.patches, strict=True):
        assert torch.equal(x, model.encode(patches))


def test_duplicates_merge_first() -> None:
    patches = randn(1, 25, 16, seed=7)
    for even, odd in ((4, 9), (12, 3), (20, 21)):  # rows of the tower, where [CLS] is row 0
        patches[0, even - 1] = patches[0, odd - 1]
    item = Picture(patches, picture(5, 5).tower, picture(5, 5).lm)
    interpreter, _, _ = encoded(ToyVLM(vision_depth=1), ToMe(3), item=item)
    first = interpreter.log[0][2].reduction.lane(0)
    pairs = {tuple(first.sources(j).tolist()) for j in range(first.m) if len(first.sources(j)) > 1}
    assert pairs == {(4, 9), (3, 12), (20, 21)}


def test_the_rest_of_the_model_reads_what_is_left() -> None:
    """One tower step later: [CLS] goes, and merged tokens stand at their representatives, in the LM's order."""
    (flow,) = Interpreter(ToyVLM(), ToMe(4)).prefill([picture(5, 5), randn(2, 16)])
    lane = flow.lanes[0]
    assert len(lane.ids) == 25 - 3 * 4
    assert len(set(lane.ids.tolist())) == 13


def test_signals_of_the_tower_follow_what_was_merged_since() -> None:
    """A token that was merged after block 1 has the attention that its representative received there."""
    (flow,) = Interpreter(ToyVLM(vision_depth=4), ToMe(3), Seen()).prefill([ITEM, randn(2, 16)])
    lane, score = flow.lanes[0], {}
    for t, tile in enumerate(lane.tiles):
        trace, left = tile.traces[1], tile.lanes[0].ids.tolist()
        row = (trace.q[:, :1] @ trace.k.transpose(1, 2) / 8**0.5 + trace.bias).softmax(-1).mean(0)[0]
        then, _ = trace.at[id(tile.lanes[0])]
        score |= {t * 25 + i - 1: s.item() for i, s in zip(then.tolist(), row, strict=True) if i in left and i > 0}
    assert len(score) == 2 * (25 - 4 * 3)
    assert lane.ids.tolist() == sorted(sorted(score, key=lambda i: -score[i])[:5])


def test_the_point_inside_a_block_reads_back_and_lies_between_the_blocks() -> None:
    inside = Point("blocks", 1, "mlp")
    assert Point.of(str(inside)) == inside == Point.of("blocks[1].mlp")
    assert Point("blocks", 1).rank < inside.rank < Point("blocks", 2).rank < Point("features").rank
    for text in ("features.mlp", "kv[1].mlp", "blocks[1].attention", "blocks.mlp"):
        with pytest.raises(WinnowError):
            Point.of(text)


def test_a_model_without_that_point_is_refused() -> None:
    info = replace(ToyVLM().info, points=("blocks", "features", "projected", "layers"))
    with pytest.raises(UnsupportedError, match=r"acts at blocks\[0\].mlp"):
        ToMe(3).checked_steps(info)
