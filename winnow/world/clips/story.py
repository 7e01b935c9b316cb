"""What happens in a clip: scenes between cuts, and in each up to three lanes in which one thing each acts.

Lanes are rows or columns of the picture, for the whole clip. So nothing covers anything else, and what happens is known
without looking at pixels.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from winnow.world.clips.names import (
    CLIP_COLORS,
    CLIP_GLYPHS,
    CLIP_SHAPES,
    CLIP_WORDS,
    DIRECTIONS,
    FPS,
    MOST_VISITS,
)
from winnow.world.clips.records import Act, Center, Kind, Track

LANES = 3
EXTENTS = (21, 26)  # of things in a picture of 84 pixels
JITTER = 2
PAN = 20  # pixels that the camera moves in all, in a picture of 84
LONGEST_STAY, LONGEST_WAY = 4, 4  # seconds


@dataclass(frozen=True)
class ClipSpec:
    """What happens in a clip. Ranges are inclusive; `acts` and `cuts` are weights.

    `things` lanes are used in each scene; `pan` is the share of clips with a moving camera among those in which
    nothing else moves; with `needle` a word is shown in every clip, for one second.
    """

    things: tuple[int, int] = (1, 3)
    still: float = 2
    visit: float = 3
    repeat: float = 2
    cross: float = 2
    hit: float = 3
    word: float = 1
    shapes: float = 0.3  # share among things that stand still or visit
    cuts: tuple[float, ...] = (0.7, 0.18, 0.12)
    pan: float = 0.6
    needle: bool = False

    @property
    def acts(self) -> dict[Act, float]:
        return {
            "still": self.still,
            "visit": self.visit,
            "repeat": self.repeat,
            "cross": self.cross,
            "hit": self.hit,
            "word": self.word,
        }


@dataclass(frozen=True)
class Story:
    """`cuts` are the seconds that begin with one; `pan` is (axis, pixels along it from the first frame to the last)."""

    tracks: tuple[Track, ...]
    cuts: tuple[int, ...]
    pan: tuple[int, int]


def tell(rng: random.Random, seconds: int, side: int, spec: ClipSpec) -> Story:
    """Make up what happens. Names come once in a clip."""
    writer = _Writer(rng, seconds, side, spec)
    count = rng.choices(range(len(spec.cuts)), spec.cuts)[0]
    count = min(count, seconds // 3)
    drawn = sorted(rng.sample(range(2, seconds - max(1, count)), count))
    cuts = [cut + at for at, cut in enumerate(drawn)]  # scenes have two seconds or more
    edges = [0, *cuts, seconds]
    scenes = list(pairwise(edges))
    shown = rng.randrange(len(scenes)) if spec.needle else -1
    for number, (start, end) in enumerate(scenes):
        writer.scene(start, end, number == shown)
    pan = (0, 0)
    still = all(not track.direction for track in writer.tracks)
    if still and rng.random() < spec.pan:
        pan = rng.randrange(2), rng.choice((-1, 1)) * 2 * round(PAN * side / 168)
    return Story(tuple(writer.tracks), tuple(cuts), pan)


class _Writer:
    def __init__(self, rng: random.Random, seconds: int, side: int, spec: ClipSpec) -> None:
        self.rng, self.seconds, self.side, self.spec = rng, seconds, side, spec
        self.axis = rng.randrange(2)  # along which lanes run
        self.tracks: list[Track] = []
        self.names: dict[Kind, Iterator[str]] = {
            "glyph": iter(rng.sample(CLIP_GLYPHS, len(CLIP_GLYPHS))),
            "shape": iter(rng.sample(CLIP_SHAPES, len(CLIP_SHAPES))),
            "text": iter(rng.sample(CLIP_WORDS, len(CLIP_WORDS))),
        }

    def scene(self, start: int, end: int, needle: bool) -> None:
        lanes = self.rng.sample(range(LANES), self.rng.randint(*self.spec.things))
        acts = self.rng.choices(list(self.spec.acts), list(self.spec.acts.values()), k=len(lanes))
        once = {"repeat", "word", "hit"}  # in a scene; a second one stands still
        acts = ["still" if act in once and act in acts[:at] else act for at, act in enumerate(acts)]
        if needle and "word" not in acts:
            acts[0] = "word"
        if "word" in acts and self.axis == 1:  # a word is wider than a column
            lanes, acts = [LANES // 2], ["word"]
        if end - start < 3:
            acts = [act if act == "word" else "still" for act in acts]
        for lane, act in zip(lanes, acts, strict=True):
            getattr(self, f"_{act}")(lane, start, end)

    def _still(self, lane: int, start: int, end: int) -> None:
        self._standing(self._thing("still"), lane, start, end, [(start, end)])

    def _visit(self, lane: int, start: int, end: int) -> None:
        """Comes, goes, or both, while the camera looks."""
        how = self.rng.randrange(3)
        first = start if how == 0 else self.rng.randrange(start + 1, end - (how == 2))
        last = end if how == 1 else self.rng.randint(first + 1, min(end - 1, first + LONGEST_STAY))
        self._standing(self._thing("visit"), lane, start, end, [(first, last)])

    def _repeat(self, lane: int, start: int, end: int) -> None:
        """Is there for a second each time; the number is drawn before the times."""
        number = self.rng.randint(1, min(MOST_VISITS, (end - start + 1) // 2))
        room = end - start - (2 * number - 1)
        gaps = sorted(self.rng.randint(0, room) for _ in range(number))
        visits = [(start + 2 * at + gap, start + 2 * at + gap + 1) for at, gap in enumerate(gaps)]
        self._standing(self._thing("repeat", "glyph"), lane, start, end, visits)

    def _word(self, lane: int, start: int, end: int) -> None:
        at = self.rng.randrange(start, end)
        track = self._thing("word", "text")
        self._at(track, self._point(lane, self.side / 2), at, at + 1)
        track.visits = ((at, at + 1),)
        self.tracks.append(track)

    def _cross(self, lane: int, start: int, end: int) -> None:
        """Moves through the picture, from edge to edge."""
        length = self.rng.randint(2, min(LONGEST_WAY, end - start))
        first = self.rng.randint(start, end - length)
        track = self._thing("cross", "glyph")
        self._move(track, self._across(lane), first, first + length, 0.0, float(self.side), self.rng.randrange(2))
        track.enters, track.leaves = first > start, first + length < end
        self.tracks.append(track)

    def _hit(self, lane: int, start: int, end: int) -> None:
        """A glyph moves up to a shape, which changes its colour when it is touched; both stay."""
        target = self._thing("target", "shape")
        if target.kind != "shape":  # all shapes are used
            self._standing(target, lane, start, end, [(start, end)])
            return
        hitter, along, across = self._thing("hit", "glyph"), self.rng.randrange(2), self._across(lane)
        touch = self.rng.randrange(start + 2, end)
        first = self.rng.randint(max(start, touch - LONGEST_WAY), touch - 1)
        far = self.side - target.extent / 2 - JITTER
        near = far - (target.extent + hitter.extent) / 2
        self._move(hitter, across, first, touch, hitter.extent / 2, near, along)
        self._at(hitter, self._turned(near if along else self.side - near, across), touch, end)
        hitter.visits, hitter.enters = ((first, end),), first > start
        target.changes = touch
        target.later = self.rng.choice([color for color in CLIP_COLORS if color != target.color])
        self._at(target, self._turned(far if along else self.side - far, across), start, end)
        target.visits = ((start, end),)
        hitter.partner, target.partner = target, hitter
        self.tracks += [target, hitter]

    def _thing(self, act: Act, kind: Kind | None = None) -> Track:
        """A new thing; a glyph where the clip has shown every shape."""
        kind = kind or ("shape" if self.rng.random() < self.spec.shapes else "glyph")
        name = next(self.names[kind], "")
        if not name:
            kind, name = "glyph", next(self.names["glyph"])
        extent = round(self.rng.randint(*EXTENTS) * self.side / 84)
        color = self.rng.choice(CLIP_COLORS) if kind == "shape" else ""
        centers: list[Center | None] = [None] * (FPS * self.seconds)
        return Track(kind, act, name, extent, centers, (), color=color, mirrored=self.rng.random() < 0.5)

    def _standing(self, track: Track, lane: int, start: int, end: int, visits: list[tuple[int, int]]) -> None:
        slot = (self.rng.randrange(LANES) + 0.5) * self.side / LANES + self.rng.randint(-JITTER, JITTER)
        place = self._point(lane, slot)
        for first, last in visits:
            self._at(track, place, first, last)
        track.visits = tuple(visits)
        track.enters = len(visits) > 1 or visits[0][0] > start
        track.leaves = len(visits) > 1 or visits[-1][1] < end
        self.tracks.append(track)

    def _move(self, track: Track, across: float, start: int, end: int, near: float, far: float, along: int) -> None:
        """From `near` to `far` along the lane, or mirrored, in the seconds [start, end)."""
        steps = FPS * (end - start)
        for step in range(steps):
            place = near + (far - near) * (step + 0.5) / steps
            track.centers[FPS * start + step] = self._turned(place if along else self.side - place, across)
        track.visits, track.direction = ((start, end),), DIRECTIONS[self.axis][along]

    def _at(self, track: Track, place: Center, start: int, end: int) -> None:
        for frame in range(FPS * start, FPS * end):
            track.centers[frame] = place

    def _point(self, lane: int, along: float) -> Center:
        return self._turned(along, self._across(lane))

    def _across(self, lane: int) -> float:
        return (lane + 0.5) * self.side / LANES + self.rng.randint(-JITTER, JITTER)

    def _turned(self, along: float, across: float) -> Center:
        return (along, across) if self.axis == 0 else (across, along)
