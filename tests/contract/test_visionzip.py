"""VisionZip (arXiv 2412.04467) on LLaVA-NeXT, in the engine: a reduction at `features` over tiles that become a mosaic.

In another form than the built-in method: counts of a tile, an explicit edge for each source and output, and an output
for [CLS] that stands at a patch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import zoo
from byhand import Entry, Reference
from probes import forward
from torch import Tensor
from torch.nn.functional import normalize

import winnow
from winnow.contract import (
    CLS,
    CONTENT,
    Layout,
    Method,
    Point,
    Reduce,
    Reduction,
    State,
    Step,
    View,
    VisionAttention,
    VisionKeys,
    WinnowError,
)


@dataclass(frozen=True)
class VisionZip(Method):
    """Per tile: [CLS] and the patches that it attends to; the rest summed into strided targets by key similarity."""

    dominant: int = 5
    contextual: int = 2
    row: VisionAttention = VisionAttention(heads="sum")  # noqa: RUF009
    keys: VisionKeys = VisionKeys()  # noqa: RUF009

    slug = "zip"
    identity = None

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
        index, target, weight, representative = [], [], [], []
        for source, into, scale, stands in order:
            target.append(into + sum(a.shape[-1] for a in representative))
            index.append(source)
            weight.append(scale)
            representative.append(stands)
        sizes = {"n": view.n, "m": sum(a.shape[-1] for a in representative)}
        edges = (torch.cat(x, -1) for x in (index, target, weight))
        return Reduce(
            Reduction.edges(*edges, **sizes, representative=torch.cat(representative, -1), ordered=False),
            separators="drop",
        ), state

    def _tile(self, view: View, cls: int, patches: Tensor) -> list[tuple[Tensor, ...]]:
        """Three groups of (sources, outputs from 0, weights, representatives): [CLS], dominant, contextual."""
        content = torch.as_tensor(view.layout.content)
        score = view[self.row][:, torch.searchsorted(content, patches)]  # which has values for the patches alone
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
        other = torch.ones_like(near, dtype=torch.float32)
        other[:, at] = 0
        count = torch.zeros(view.b, c, dtype=torch.float32).scatter_add(1, near, other).clamp_min(1)
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
    return rows, torch.arange(rows.shape[-1]).expand_as(rows), torch.ones_like(rows, dtype=torch.float32), rows


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


def zipped(method: VisionZip, reference: Reference, sample: dict) -> Entry:
    """What enters the LM, tile by tile in loops. Under `compact` it does not matter where a row stood."""
    entry = reference.entry(sample)
    vision, block, side = reference.vision(sample), 3, int(reference.cells**0.5)
    embeds, held = entry.embeds, entry.held
    for picture, item in enumerate(entry.items):
        features, keys = vision.features[picture], vision.keys[block][picture]
        rows = vision.cls[block][picture].sum(0).unflatten(0, (-1, reference.cells))
        _, width = sample["image_sizes"][picture].tolist()
        across = -(-width // reference.tile)
        found = []
        for x, attention, own in zip(features, rows, keys, strict=True):
            padded = torch.cat([attention.new_zeros(1), attention])  # [CLS] is row 0
            found.append(
                by_hand(x, padded, own, list(range(1, reference.cells + 1)), method.dominant, method.contextual)
            )
        mosaic = {}
        for t, (_, best, _) in enumerate(found[1:]):
            for i, row in best.items():
                mosaic[t // across * side + (i - 1) // side, t % across * side + (i - 1) % side] = row
        made = [found[0][0], *(found[0][1][i] for i in sorted(found[0][1])), *found[0][2]]
        made += [mosaic[at] for at in sorted(mosaic)]
        made += [cls for cls, _, _ in found[1:]] + [row for _, _, merged in found[1:] for row in merged]
        projected = reference.model.model.multi_modal_projector(torch.stack(made)[None])
        before, after = held < item[0], held > item[-1]
        embeds = torch.cat([embeds[:, before], projected, embeds[:, after]], 1)
        held = torch.cat([held[before], item[: len(made)], held[after]])
    return replace(entry, embeds=embeds, held=held)


@pytest.mark.parametrize("contextual", [0, 2, 3])
def test_equals_a_loop_over_tiles_in_the_mosaic_order(contextual):
    """A batch of ragged rows, with one picture, none, and two; no newline is left."""
    method, model = VisionZip(contextual=contextual), zoo.model("llava_next")
    parts = zoo.samples("llava_next", ("3 C 6", "11", "2 B 4 C 5", "3 A 2"))
    reference = Reference(model)
    with winnow.compress(model, method, positions="compact") as handle:
        logits, lengths = forward(model, zoo.collate(parts)).logits[:, -1], handle.last.layer_tokens[0]
    for row, part in enumerate(parts):
        entry = zipped(method, reference, part)
        assert lengths[row] == len(entry.held)
        assert (logits[row] - reference.run(entry, compact=True).logits[0]).abs().max() <= 1e-5


def test_each_patch_goes_to_one_output_and_each_output_has_a_place_of_its_own():
    model, part = zoo.model("llava_next"), zoo.sample("llava_next", "3 C 6")
    with winnow.compress(model, VisionZip(dominant=4, contextual=3)) as handle:
        forward(model, part)
        (point, slug, reduction), *_ = handle.last.items[0].reductions
    assert (point, slug) == ("features", "zip")
    assert bool(((reduction.to_matrix() != 0).sum(0) <= 1).all())
    assert len(set(reduction.representatives.tolist())) == reduction.m  # every output has a place of its own
    assert not reduction.is_stochastic  # a sum of target and mean, not a mean


def test_contextual_is_a_sum_of_target_and_mean():
    """With all tokens equal to v, contextual = 2v."""
    method, generator = VisionZip(dominant=3, contextual=2), torch.Generator().manual_seed(5)
    v = torch.randn(16, generator=generator)
    layout = Layout.grid(4, 5, cls=True)
    signals = {
        method.row: torch.rand(1, 20, generator=generator),
        method.keys: torch.randn(1, 21, 8, generator=generator),
    }
    action, _ = method.zip(View.of(v.expand(1, 21, 16), signals, layout=layout), State())
    out = action.reduction.apply(v.expand(1, 21, 16))[0]
    torch.testing.assert_close(out, torch.stack([v] * 3 + [2 * v] * 2))
