"""VisionZip (arXiv 2412.04467) on LLaVA-NeXT: a reduction at `features`, over tiles that become a mosaic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from winnow.core.errors import WinnowError
from winnow.core.layout import CLS, CONTENT, PAD
from winnow.core.method import Method
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.signal import Signal
from winnow.core.step import Reduce, State, Step
from winnow.core.view import View
from winnow.signals.vision import VisionAttention, VisionKeys

from .interpreter import Interpreter
from .layouts import next_layouts, picture
from .toy import Picture, ToyVLM, randn


@dataclass(frozen=True)
class VisionZip(Method):
    """Per tile: [CLS] and the patches that it attends to; the rest summed into strided targets by key similarity."""

    dominant: int = 5
    contextual: int = 2
    row: Signal = VisionAttention(layer=-1, query="cls", heads="sum")
    keys: Signal = VisionKeys(layer=-1)

    def steps(self, info):
        return (Step(Point.of("features"), self.zip, (self.row, self.keys)),)

    def zip(self, view: View, state: State) -> tuple[Reduce, State]:
        kind = view.layout.kind
        tile = np.cumsum(kind == CLS) - 1
        parts = []
        for t in range(tile.max() + 1):
            cls = np.flatnonzero((tile == t) & (kind == CLS))
            patches = torch.as_tensor(np.flatnonzero((tile == t) & (kind == CONTENT)))
            parts.append(self._tile(view, int(cls[0]), patches))
        if len(parts) == 1:
            order = [part[group] for group in range(3) for part in parts]
        else:  # the thumbnail by itself; then dominant patches in the mosaic's order, the tiles' [CLS], contextual ones
            order = [*parts[0], self._raster(view, [p[1] for p in parts[1:]])]
            order += [p[0] for p in parts[1:]] + [p[2] for p in parts[1:]]
        index, target, weight, anchor = [], [], [], []
        for source, into, scale, stands in order:
            target.append(into + sum(a.shape[-1] for a in anchor))
            index.append(source)
            weight.append(scale)
            anchor.append(stands)
        sizes = {"n": view.n, "m": sum(a.shape[-1] for a in anchor)}
        edges = (torch.cat(x, -1) for x in (index, target, weight))
        return Reduce(
            Reduction.edges(*edges, **sizes, anchor=torch.cat(anchor, -1), ordered=False), separators="drop"
        ), state

    def _tile(self, view: View, cls: int, patches: Tensor) -> list[tuple[Tensor, ...]]:
        """Three groups of (sources, outputs from 0, weights, anchors): [CLS], dominant, contextual."""
        score = view[self.row][:, patches]
        d, c = self.dominant - 1, self.contextual
        if d + c >= len(patches):
            raise WinnowError(f"a tile of {len(patches)} patches cannot give {d + c + 1} tokens")
        top = score.topk(d, dim=-1).indices.sort(-1).values
        taken = torch.zeros_like(score, dtype=torch.uint8).scatter(-1, top, 1)
        left = patches[torch.argsort(taken, dim=-1, stable=True)[:, : len(patches) - d]]
        step = max(1, left.shape[-1] // max(1, c))
        at = torch.arange(c) * step
        # [CLS] has no place in the picture: it stands at the first patch that no output stands for.
        place = left[:, [1 if c and step > 1 else c]]
        groups = [(*copies(torch.full((view.b, 1), cls))[:3], place), copies(patches[top])]
        if c == 0:
            return [*groups, copies(left[:, :0])]
        keys = view[self.keys]
        keys = normalize(keys.gather(1, left[..., None].expand(-1, -1, keys.shape[-1])), dim=-1)
        near = (keys @ keys[:, at].transpose(1, 2)).argmax(-1)
        near[:, at] = torch.arange(c)
        other = torch.ones_like(near, dtype=torch.float64)
        other[:, at] = 0
        count = torch.zeros(view.b, c, dtype=torch.float64).scatter_add(1, near, other).clamp_min(1)
        weight = torch.where(other == 0, 1.0, 1 / count.gather(1, near))
        return [*groups, (left, near, weight, left[:, at])]

    @staticmethod
    def _raster(view: View, groups: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The dominant patches of all tiles, read row by row over the mosaic."""
        rows = torch.cat([g[0] for g in groups], -1)
        place = view.layout.place
        width = place[:, 3].max() + 1
        order = view.groups(place[:, 2] * width + place[:, 3]).gather(-1, rows).argsort(-1)
        return copies(rows.gather(-1, order))


def copies(rows: Tensor) -> tuple[Tensor, ...]:
    """A group whose outputs are copies of rows `[b, m]`."""
    return rows, torch.arange(rows.shape[-1]).expand_as(rows), torch.ones_like(rows, dtype=torch.float64), rows


def by_hand(x: Tensor, attention: Tensor, keys: Tensor, seen: list[int], dominant: int, contextual: int):
    """One tile `[1 + h·w, D]`, in loops: ([CLS], {patch: row}, contextual rows). `seen`: its patches but letterbox."""
    best = sorted(seen, key=lambda i: -attention[i].item())[: dominant - 1]
    left = [i for i in seen if i not in best]
    step = max(1, len(left) // contextual) if contextual else 1
    targets = left[::step][:contextual]
    members: dict[int, list[int]] = {t: [] for t in targets}
    unit = keys / keys.norm(dim=-1, keepdim=True)
    for i in left:
        if i not in targets and targets:
            members[max(targets, key=lambda t: (unit[i] @ unit[t]).item())].append(i)
    merged = [x[t] + sum((x[i] for i in members[t]), torch.zeros_like(x[0])) / max(1, len(members[t])) for t in targets]
    return x[0], {i: x[i] for i in best}, merged


def tower_of(model: ToyVLM, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, [CLS] row and head-mean keys of the last block, from the plain modules."""
    x = torch.cat([model.cls[None], patches])
    for block in model.blocks[:-1]:
        x = block(x)
    q, k, _ = model.blocks[-1].qkv(model.blocks[-1].norm1(x), None)
    return model.blocks[-1](x), model.blocks[-1].weights(q, k).sum(0)[0], k.mean(0)


H, W, ROWS, COLS, LETTERBOX = 4, 5, 2, 2, 1


@pytest.fixture(scope="module")
def next_picture() -> Picture:
    tower, lm = next_layouts(H, W, ROWS, COLS, LETTERBOX)
    assert lm.n_content == H * W + (ROWS * H - 2) * COLS * W
    assert tower.n_content == lm.n_content  # the letterbox is no content
    return Picture(randn(5, H * W, 16, seed=3), tower, lm)


def seen(t: int) -> list[int]:
    """Rows of tile t (its [CLS] is row 0) that are no letterbox: it covers the mosaic's first and last line."""
    lines = range(H) if t == 0 else range(1, H) if t <= 2 else range(H - 1)
    return [1 + line * W + col for line in lines for col in range(W)]


@pytest.mark.parametrize("contextual", [0, 2, 3])
def test_equals_a_loop_over_tiles_in_the_mosaic_order(next_picture: Picture, contextual: int) -> None:
    model, d = ToyVLM(), 5
    found = [by_hand(*tower_of(model, p), seen(t), d, contextual) for t, p in enumerate(next_picture.patches)]
    order = [found[0][0], *(found[0][1][i] for i in sorted(found[0][1])), *found[0][2]]
    mosaic = {}
    for t, (_, best, _) in enumerate(found[1:]):
        mosaic |= {(t // COLS * H + (i - 1) // W, t % COLS * W + (i - 1) % W): row for i, row in best.items()}
    order += [mosaic[at] for at in sorted(mosaic)]
    order += [cls for cls, _, _ in found[1:]] + [row for _, _, merged in found[1:] for row in merged]

    method = VisionZip(dominant=d, contextual=contextual)
    text = randn(3, 16, seed=1)
    (flow,) = Interpreter(model, method).prefill([text, next_picture, text])
    assert len(flow.hidden[0]) == 6 + 5 * (d + contextual)  # the promised count, and no newline
    torch.testing.assert_close(flow.hidden[0][3:-3], model.projector(torch.stack(order)), rtol=1e-10, atol=1e-10)
    wrong = [*order[:d], *order[d + 1 :], order[d]]
    assert not torch.allclose(flow.hidden[0][3:-3], model.projector(torch.stack(wrong)))


def test_each_patch_that_is_left_goes_to_one_target(next_picture: Picture) -> None:
    interpreter = Interpreter(ToyVLM(), VisionZip(dominant=4, contextual=3))
    interpreter.encode([(0, next_picture)])
    reduction = interpreter.log[0][2].reduction.lane(0)
    used = (reduction.to_matrix() != 0).sum(0)
    kind = torch.tensor(next_picture.tower.kind)
    assert bool((used[kind != PAD] == 1).all())
    assert bool((used[kind == PAD] == 0).all())
    assert len(set(reduction.anchors.tolist())) == reduction.m  # every output has a place of its own
    assert bool((kind[reduction.anchors] == CONTENT).all())
    assert not reduction.is_stochastic  # a sum of target and mean, not a mean


def test_contextual_is_a_sum_of_target_and_mean() -> None:
    """With all tokens equal to v, contextual = 2v."""
    method = VisionZip(dominant=3, contextual=2)
    v = randn(16, seed=5)
    layout = picture(4, 5).tower
    view = View.of(v.expand(1, 21, 16), {method.row: torch.rand(1, 21), method.keys: randn(1, 21, 8)}, layout=layout)
    action, _ = method.zip(view, State())
    out = action.reduction.apply(view.tokens)[0]
    torch.testing.assert_close(out, torch.stack([v] * 3 + [2 * v] * 2))


def test_items_of_a_batch_equal_themselves_alone(next_picture: Picture) -> None:
    model, other = ToyVLM(), Picture(randn(5, H * W, 16, seed=9), next_picture.tower, next_picture.lm)
    text = randn(2, 16)
    both = Interpreter(model, VisionZip()).prefill([text, next_picture, text], [text, other, text])
    for flow, one in zip(both, (next_picture, other), strict=True):
        (alone,) = Interpreter(model, VisionZip()).prefill([text, one, text])
        torch.testing.assert_close(flow.x, alone.x, rtol=1e-12, atol=1e-12)
