"""Claims of methods that share a budget over crops, on pictures cut as LLaVA-NeXT cuts them.

The reference model reads one tile. Here its tower sees each picture as a thumbnail and its four quarters at twice the
size, which hold no more detail than the thumbnail; what is asked is where the budget goes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from tests.methods.directional import Ear, Gap, PerScene, Sample, questions, sampled
from winnow.bench.tasks import Ask, Task, open_world
from winnow.core.budget import Budget
from winnow.core.method import Method
from winnow.core.view import View
from winnow.methods.globalcom2 import GlobalCom2
from winnow.methods.token_correlation_compression import TokenCorrelationCompression
from winnow.signals.features import ClsLogits
from winnow.signals.vision import VisionAttention, VisionKeys
from winnow.testing import Picture

from .finding import Finding, as_many, compared

SCENES = 60
LAYOUT = Picture.tiled(16, 2, 2).lm
SIGNALS = (ClsLogits(-1), VisionAttention(query="auto"), VisionAttention(2, query="auto"), VisionKeys())


def quarter(number: int, ask: Ask) -> Image.Image:
    picture = open_world(ask)
    (w, h), (row, col) = picture.size, divmod(number, 2)
    return picture.crop((col * w // 2, row * h // 2, (col + 1) * w // 2, (row + 1) * h // 2)).resize((w, h))


@functools.cache
def tiled(s: Sample) -> list[View]:
    """A view of each of the first scenes in five tiles."""
    ear, tiles = Ear(SIGNALS, (0,)), []
    for opener in (open_world, *(functools.partial(quarter, number) for number in range(4))):
        sampled(s.handle, s.processor, ear, Task({}, questions()[:SCENES], opener))
        tiles.append(ear.heard["projected"])
        ear.heard.clear()
    cell = torch.from_numpy(LAYOUT.cell[LAYOUT.content])

    def joined(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([part[:, -256:] for part in parts], 1)[:, cell]  # less a [CLS] in front

    views = []
    for batch in zip(*tiles, strict=True):
        signals = {signal: joined([view[signal] for view in batch]) for signal in SIGNALS}
        views.append(View.of(joined([view.tokens for view in batch]), signals, layout=LAYOUT))
    return views


def in_crops(s: Sample, views: list[View], method: Method) -> PerScene:
    """The share of the evidence's tokens in crops that is kept."""
    kept = torch.cat([method.reduce(view).kept for view in views]).numpy()
    crop, found = LAYOUT.tiles > 0, []
    for request, own in zip(s.requests, kept, strict=False):
        mask = LAYOUT.covering(request.evidence) & crop
        found.append((own & mask).sum() / mask.sum())
    return np.array(found, dtype=float)


def globalcom2(s: Sample, rolled: Sample) -> Iterator[Finding]:
    views = tiled(s)
    for share in (0.25, 0.1):
        own = GlobalCom2(keep=Budget(share))
        found = [in_crops(s, views, method) for method in (own, own.replace(temperature=1e6))]
        claim, what = "ratios that follow the thumbnail keep more evidence than equal ones", "evidence left in crops"
        yield compared("globalcom2", claim, f"{share:.0%} of five tiles, {what}", ("its ratios", "equal"), *found)


def token_correlation(s: Sample, rolled: Sample) -> Iterator[Finding]:
    views, slug = tiled(s), TokenCorrelationCompression.slug
    own = TokenCorrelationCompression(keep=Budget(0.1), local_layer=2)
    found = [in_crops(s, views, method) for method in (own, own.replace(partners=1.0))]
    claim = "ratios by what is not repeated keep more evidence than equal ones"
    yield compared(slug, claim, "10% of five tiles, evidence left in crops", ("its ratios", "equal"), *found)
    kept = s.answers(TokenCorrelationCompression())[1]
    what = f"{kept.sum(1).double().mean():.0f} tokens on average, evidence left"
    recalls = s.recall(kept), s.recall(as_many(s, kept))
    yield compared(slug, "what is kept holds the evidence", what, ("own", "as many at random"), *recalls)
    counts, many = kept.sum(1).double().numpy(), s.objects.sum(1).double().numpy()
    full = many > np.median(many)
    yield apart(slug, counts[full], counts[~full])


def apart(slug: str, first: PerScene, second: PerScene) -> Finding:
    """The claim that fuller pictures keep more; the two halves are not paired, so each enters with its own mean."""
    value = first.mean() - second.mean()
    half = 1.96 * (first.var(ddof=1) / len(first) + second.var(ddof=1) / len(second)) ** 0.5
    shown = f"tokens kept: pictures that things cover more of {first.mean():.1f}, the others {second.mean():.1f}"
    return Finding(slug, "pictures with more in them keep more tokens", Gap(value, value - half, value + half), shown)


CLAIMS = {"globalcom2": globalcom2, "token-correlation-compression": token_correlation}
