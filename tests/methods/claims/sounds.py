"""Claims of methods for sounds, on drawn sounds as mel tokens: there is no audio model to ask yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.methods.directional import Sample
from tests.methods.sounds import Heard, crossed, filmed, heard, left_of, runs
from winnow.core.reduction import Reduction
from winnow.core.sounds import longest_dropped
from winnow.core.view import View
from winnow.methods.a_tome import AToMe
from winnow.methods.audio_guided import AudioGuided
from winnow.methods.audio_pool import AudioPool
from winnow.methods.audio_segments import AudioSegments
from winnow.methods.evs import EVS
from winnow.methods.speechprune import ALIKE, SEEN, SpeechPrune

from .finding import Finding, compared, nearer

SOUNDS = 40
OTHERS = range(100, 112)  # sounds from which the words of a question have their sound


def a_tome(s: Sample, rolled: Sample) -> Iterator[Finding]:
    def whole(reduce: Callable[[Heard], Reduction]) -> np.ndarray:
        shares = [1 - crossed(reduce(one), one.changes) / len(one.changes) for one in tones()]
        return np.array(shares)

    claim = "at 43 % of the tokens, changes of tone lie between two outputs, and in none, more often than by pooling"
    own = whole(lambda one: AToMe(keep="43%").reduce(one.view))
    pooled = whole(lambda one: windows(one.view, "43%"))
    yield compared("a-tome", claim, f"{SOUNDS} sounds of tones and silence", ("a-tome", "windows"), own, pooled)


def audio_guided(s: Sample, rolled: Sample) -> Iterator[Finding]:
    """OmniZip's figures are answers of Qwen2.5-Omni; here loudness stands for what its encoder attends to."""
    made = [filmed(seed) for seed in range(SOUNDS)]
    method = AudioGuided(keep="10%", window=12, top=0.5)
    own, evs = (np.array([left_of(one.reduce(clip.view), clip) for clip in made]) for one in (method, EVS(keep="10%")))
    claim = "more of what is seen while an event is heard than by change alone, at a tenth of the tokens"
    what = f"{SOUNDS} drawn sounds with clips in which something is always new"
    yield compared("audio-guided", claim, what, ("audio-guided", "evs"), own, evs)


def audio_pool(s: Sample, rolled: Sample) -> Iterator[Finding]:
    def gone(reduce: Callable[[View], Reduction]) -> np.ndarray:
        return np.array([longest_dropped(reduce(one.view).lane(0), one.view.layout) for one in words()])

    def every_third(view: View) -> Reduction:
        return Reduction.select(torch.arange(0, view.n, 3).expand(view.b, -1), view.n)

    claim = "pooling by 3 leaves nothing out that every third token leaves out"
    what = f"{SOUNDS} sounds of words, longest span in seconds of which nothing is left"
    own = gone(lambda view: AudioPool(k=3).reduce(view))
    yield nearer("audio-pool", claim, what, ("audio-pool", "every third"), own, gone(every_third))


def audio_segments(s: Sample, rolled: Sample) -> Iterator[Finding]:
    def lost(reduce: Callable[[View], Reduction]) -> np.ndarray:
        return np.array([inside(one.view.tokens[0], reduce(one.view)) for one in words()])

    claim = "segments lose less of a sound than windows of equal length, at a quarter of the tokens"
    what = f"{SOUNDS} sounds of words, share of the variance that lies inside an output"
    own = lost(lambda view: AudioSegments(keep="25%").reduce(view))
    yield nearer("audio-segments", claim, what, ("segments", "windows"), own, lost(lambda view: windows(view, "25%")))


def speechprune(s: Sample, rolled: Sample) -> Iterator[Finding]:
    """The paper's 89.23 against 42.49 by random pruning are answers of Qwen2-Audio; here it is the evidence."""
    sound_of, found = prototypes(), {"both": [], "random": [], "phase 2": []}
    for seed in range(SOUNDS):
        one, generator = heard(seed, "words"), torch.Generator().manual_seed(seed)
        noise = torch.randn(1, one.view.n, generator=generator)
        found["both"].append(recall(both_phases(one, sound_of, noise), one.evidence))
        unrelated = sound_of[:, torch.randperm(sound_of.shape[1], generator=generator)]
        _, attention = of_text(one.view.tokens, unrelated, noise)
        alone = SpeechPrune(left="20%").attended(seen_by(one, {SEEN: attention}))
        found["phase 2"].append(recall(alone.index[0], one.evidence))  # type: ignore[index]
        blind = torch.randperm(one.view.n, generator=generator)[: round(0.2 * one.view.n)]
        found["random"].append(recall(blind, one.evidence))
    what = f"{SOUNDS} sounds, 'which digit comes after the bell?', evidence left at 20 %"
    own, random, second = (np.array(values) for values in found.values())
    yield compared("speechprune", "more evidence than at random", what, ("both phases", "random"), own, random)
    claim = "more evidence than by phase 2 alone for other words"
    yield compared("speechprune", claim, what, ("both phases", "phase 2, other words"), own, second)


def tones() -> Iterator[Heard]:
    return (heard(seed, "tones") for seed in range(SOUNDS))


def words() -> Iterator[Heard]:
    return (heard(seed, "words") for seed in range(SOUNDS))


def windows(view: View, keep: str) -> Reduction:
    """As many windows of nearly equal length as a budget says."""
    m = max(1, round(float(keep.rstrip("%")) / 100 * view.n))
    cluster = torch.arange(view.n) * m // view.n
    weight = 1 / torch.bincount(cluster).float()[cluster]
    return Reduction.assign(cluster.expand(view.b, -1), weight.expand(view.b, -1), m=m)


def inside(x: Tensor, reduction: Reduction) -> float:
    """The share of the variance of a sound that its outputs do not say."""
    gone = sum(float((x[run] - x[run].mean(0)).square().sum()) for run in runs(reduction))
    return gone / float(x.square().sum())


def prototypes() -> Tensor:
    """`[2, D]` what the words of the question sound like, in the mean of other sounds: the bell, and a digit."""
    own: dict[str, list[Tensor]] = {"event": [], "word": []}
    for seed in OTHERS:
        one = heard(seed, "words")
        for event in one.sound.events:
            start, stop = (round(t / 0.04) for t in event.span)
            own[event.kind].append(one.view.tokens[0, start:stop].mean(0))
    return torch.stack([torch.stack(rows).mean(0) for rows in own.values()])


def of_text(x: Tensor, sound_of: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines with the words, and a last token that looks at what the words sound like, and at noise."""
    cosines = normalize(x, dim=-1) @ normalize(sound_of, dim=-1).T
    return cosines, (4 * cosines.mean(-1) + noise).softmax(1)


def seen_by(one: Heard, signals: dict) -> View:
    return View(one.view.tokens, one.view.layout, one.view.ids, one.view.n, signals)


def both_phases(one: Heard, sound_of: Tensor, noise: Tensor, left: str = "20%") -> Tensor:
    """The tokens that are left behind both phases."""
    method, (cosines, attention) = SpeechPrune(left=left), of_text(one.view.tokens, sound_of, noise)
    first = method.similar(seen_by(one, {ALIKE: cosines})).index
    rows = one.view.tokens[:, first[0]]  # type: ignore[index]
    later = View(rows, one.view.layout, first, one.view.n, {SEEN: attention.gather(1, first)})  # type: ignore[arg-type]
    return first[0, method.attended(later).index[0]]  # type: ignore[index]


def recall(kept: Tensor, evidence: Tensor) -> float:
    return float(evidence[kept].sum() / evidence.sum())


CLAIMS = {
    "a-tome": a_tome,
    "audio-guided": audio_guided,
    "audio-pool": audio_pool,
    "audio-segments": audio_segments,
    "speechprune": speechprune,
}
