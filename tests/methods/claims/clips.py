"""Claims of methods for videos, on drawn clips of tokens: there is no video model to ask yet."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from tests.methods.directional import Sample, at_random
from winnow.core.frames_view import FramesView
from winnow.core.layout import Layout
from winnow.core.reduction import Reduction
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.centerclip import CenterCLIP
from winnow.methods.dycoke import DyCoke
from winnow.methods.evs import EVS
from winnow.methods.fastvid import FastVID
from winnow.methods.holitom import HoliTom
from winnow.methods.kffocus import KFFocus
from winnow.methods.prunevid import PruneVid
from winnow.methods.stc import STC
from winnow.methods.vidcom2 import VidCom2
from winnow.parts.evenly import evenly

from .finding import Finding, compared, nearer

CLIPS, FRAMES, SIDE, WIDTH = 60, 8, 6, 32
PLACES = SIDE * SIDE
LOOKS = (*FastVID().signals(), HoliTom().attention)
Clip = tuple[View, set[int]]


def background(seed: int, noise: float = 0.1) -> tuple[torch.Generator, torch.Tensor]:
    """Frames `[t, p, D]` that repeat one another but for a little noise."""
    generator = torch.Generator().manual_seed(seed)
    still = torch.randn(1, PLACES, WIDTH, generator=generator)
    return generator, still + noise * torch.randn(FRAMES, PLACES, WIDTH, generator=generator)


def shown(frames: torch.Tensor) -> View:
    return View.of(frames.flatten(0, 1)[None], layout=Layout.grid(SIDE, SIDE, FRAMES))


def moving(seed: int) -> Clip:
    """A thing of 2 × 2 tokens that walks over a still background, and where it stands behind the first frame."""
    generator, frames = background(seed)
    thing = torch.randn(4, WIDTH, generator=generator)
    row, col = torch.randint(SIDE - 1, (2,), generator=generator).tolist()
    found = set()
    for t in range(FRAMES):
        cells = [(row + r) * SIDE + (col + t) % (SIDE - 1) + c for r in (0, 1) for c in (0, 1)]
        frames[t, cells] = thing
        found |= {t * PLACES + cell for cell in cells if t}
    return shown(frames), found


def flash(seed: int) -> Clip:
    """A thing of 3 × 3 tokens that is there in one frame only, and its tokens."""
    generator, frames = background(seed)
    row, col = torch.randint(SIDE - 2, (2,), generator=generator).tolist()
    t = int(torch.randint(1, FRAMES, (1,), generator=generator))
    cells = [(row + r) * SIDE + col + c for r in range(3) for c in range(3)]
    frames[t, cells] = torch.randn(9, WIDTH, generator=generator)
    return shown(frames), {t * PLACES + cell for cell in cells}


def recall(found: Reduction, wanted: set[int]) -> float:
    return len(wanted & set(found.representatives.reshape(-1).tolist())) / len(wanted)


def evs(s: Sample, rolled: Sample) -> Iterator[Finding]:
    yield beside_random("evs", EVS(keep="25%"))


def dycoke(s: Sample, rolled: Sample) -> Iterator[Finding]:
    yield beside_random("dycoke", DyCoke())


def beside_random(slug: str, method: EVS | DyCoke | HoliTom) -> Finding:
    own, blind = [], []
    for seed in range(CLIPS):
        view, wanted = moving(seed)
        found = method.reduce(looked_at(view, seed))
        own.append(recall(found, wanted))
        blind.append(recall(at_random(view, found.m), wanted))
    what = f"{CLIPS} clips of {FRAMES} frames, tokens of a thing that walks"
    claim = "what moves is kept more often than by as many tokens at random"
    return compared(slug, claim, what, (slug, "random"), np.array(own), np.array(blind))


def vidcom2(s: Sample, rolled: Sample) -> Iterator[Finding]:
    clips = [flash(seed) for seed in range(CLIPS)]
    own, equal = (
        np.array([recall(VidCom2(keep="12.5%", temperature=heat).reduce(view), wanted) for view, wanted in clips])
        for heat in (0.01, 1e6)
    )
    what = f"{CLIPS} clips of {FRAMES} frames, tokens of a thing that is there in one"
    claim = "shares by frame find more of what is in one frame than equal shares"
    yield compared("vidcom2", claim, what, ("shares by frame", "equal shares"), own, equal)


def holitom(s: Sample, rolled: Sample) -> Iterator[Finding]:
    yield beside_random("holitom", HoliTom(keep="15%"))


def prunevid(s: Sample, rolled: Sample) -> Iterator[Finding]:
    merging = lambda view: PruneVid().merge(view, State())[0].reduction  # noqa: E731
    counts = [np.array([merging(make(seed)[0]).m for seed in range(CLIPS)]) for make in (static, restless)]
    what = f"{CLIPS} clips of {FRAMES} frames, tokens left of {FRAMES * PLACES} behind the merging"
    yield nearer("prunevid", "still places become fewer tokens than moving ones", what, ("still", "moving"), *counts)


def centerclip(s: Sample, rolled: Sample) -> Iterator[Finding]:
    own, blind = [], []
    for view, _ in map(moving, range(CLIPS)):
        found = CenterCLIP(keep="12.5%", segments=1).reduce(view)
        own.append(distance(view, found))
        blind.append(distance(view, at_random(view, found.m)))
    what = f"{CLIPS} clips of {FRAMES} frames, distance of a token to the nearest kept"
    names = ("medoids", "random")
    yield nearer(
        "centerclip", "medoids lie nearer to all tokens than random ones", what, names, *map(np.array, (own, blind))
    )


def fastvid(s: Sample, rolled: Sample) -> Iterator[Finding]:
    found: dict[float, list[float]] = {0.4: [], 0.0: []}
    for seed in range(CLIPS):
        view = looked_at(moving(seed)[0], seed)
        for context, radii in found.items():
            radii.append(distance(view, FastVID(keep="10%", context=context).reduce(view), farthest=True))
    claim = "nothing is as far from what is kept as by attention alone"
    what = f"{CLIPS} clips of {FRAMES} frames, largest distance of a token to those kept"
    names = ("anchors and attention", "attention")
    yield nearer("fastvid", claim, what, names, *map(np.array, found.values()))


def static(seed: int) -> Clip:
    """Frames that repeat one another but for a little noise."""
    return shown(background(seed)[1]), set()


def restless(seed: int) -> Clip:
    """Frames of which half the places are drawn anew each time."""
    generator, frames = background(seed)
    frames[:, : PLACES // 2] = torch.randn(FRAMES, PLACES // 2, WIDTH, generator=generator)
    return shown(frames), set()


def looked_at(view: View, seed: int) -> View:
    """A view whose tokens get as much attention in each frame as at their place in the others."""
    own = torch.rand(1, 1, PLACES, generator=torch.Generator().manual_seed(seed))
    row = own.expand(1, FRAMES, PLACES).reshape(1, -1)
    return View.of(view.tokens, dict.fromkeys(LOOKS, row), layout=view.layout)


def distance(view: View, found: Reduction, farthest: bool = False) -> float:
    """Of a token to the nearest of those that are kept, in the mean or at most."""
    gaps = torch.cdist(view.tokens[0], view.tokens[0, found.representatives[0]]).amin(1)
    return float(gaps.max() if farthest else gaps.mean())


def ts_llava(s: Sample, rolled: Sample) -> Iterator[Finding]:
    """Of an event of 2 × 2 tokens in one of 50 frames: whether a token of it is sampled, or its frame shown."""
    frames, side = 50, 24
    sampled = set(evenly(frames * side**2, 2880).tolist())
    shown = set(evenly(frames, 6).tolist())
    generator = torch.Generator().manual_seed(0)
    alone, both = [], []
    for _ in range(2000):
        t, row, col = (int(torch.randint(n, (1,), generator=generator)) for n in (frames, side - 1, side - 1))
        cells = {(t * side + row + r) * side + col + c for r in (0, 1) for c in (0, 1)}
        alone.append(float(bool(cells & sampled)))
        both.append(float(bool(cells & sampled) or t in shown))
    what = "2000 events of 2 × 2 tokens in one of 50 frames, share of which something is left"
    claim = "sampled tokens and a thumbnail show more events than sampled tokens alone"
    yield compared("ts-llava", claim, what, ("both", "sampled alone"), np.array(both), np.array(alone))


def kffocus(s: Sample, rolled: Sample) -> Iterator[Finding]:
    """An event of a second in a video of two minutes, at two frames a second, and 16 frames to show."""
    own, blind = [], []
    for seed in range(CLIPS):
        random = np.random.default_rng(seed)
        start = int(random.integers(1, 238))
        frames = (120 + 4 * random.standard_normal((240, 16, 16, 3))).clip(0, 255).astype(np.uint8)
        frames[start : start + 2, 2:14, 2:14] = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        view = FramesView(torch.from_numpy(frames)[None], torch.arange(240)[None] / 2)
        found = KFFocus(keyframes=16, context=0).choose(view, State()).reduction.index[0].tolist()
        own.append(float(bool({start, start + 1} & set(found))))
        blind.append(float(bool({start, start + 1} & set(evenly(240, 16).tolist()))))
    what = f"{CLIPS} clips of 240 frames with an event of two, share of which a frame enters"
    claim = "keyframes find more events than as many frames at equal distances"
    yield compared("kffocus", claim, what, ("keyframes", "equal distances"), np.array(own), np.array(blind))


def stc(s: Sample, rolled: Sample) -> Iterator[Finding]:
    """A frame of which half is what all earlier frames showed, and half is new."""
    method, half = STC(keep=12), PLACES // 2
    new: dict[str, list[float]] = {"history": [], "none": []}
    for seed in range(CLIPS):
        generator = torch.Generator().manual_seed(seed)
        old, fresh = torch.nn.functional.normalize(torch.randn(2, WIDTH, generator=generator), dim=-1)
        noise = 0.02 * torch.randn(FRAMES + 1, PLACES, WIDTH, generator=generator)
        frames = old + noise
        frames[-1, half:] += fresh - old
        state = State()
        for frame in frames:
            view = View.of(frame[None], layout=Layout.grid(SIDE, SIDE))
            action, state = method.prune(view, state)
        for name, found in (("history", action.reduction), ("none", method.reduce(view))):
            new[name].append(float((found.representatives >= half).float().mean()))
    what = f"{CLIPS} streams of {FRAMES} frames and one of which half is new, share of kept tokens that are"
    claim = "with a history more is kept of what earlier frames have not shown"
    yield compared("stc", claim, what, ("history", "none"), *map(np.array, new.values()))


CLAIMS = {
    "stc": stc,
    "evs": evs,
    "dycoke": dycoke,
    "vidcom2": vidcom2,
    "holitom": holitom,
    "prunevid": prunevid,
    "centerclip": centerclip,
    "fastvid": fastvid,
    "ts-llava": ts_llava,
    "kffocus": kffocus,
}
