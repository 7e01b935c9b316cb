"""Questions about a clip: their answers, and where and when what they depend on is seen.

What is asked for is drawn before what happens (the number of visits, directions, colours, seconds), or the rarer answer
is asked about more often (cuts), so that no type has an answer that is right for most clips.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from winnow.world.clips.names import CLIP_GLYPHS, CLIP_SHAPES, DIRECTIONS, FPS, TYPES
from winnow.world.clips.records import ClipQuestion, Sight
from winnow.world.clips.story import Story
from winnow.world.items import Box

Draft = tuple[str, str, Iterable[Sight]]  # text, answer, evidence
_ASKED_CUTS = (0.12, 0.75, 1.0)  # how often clips with 0, 1, 2 cuts are asked for their number


@dataclass
class View:
    """A clip as the questioner sees it."""

    story: Story
    seconds: int
    side: int

    def __post_init__(self) -> None:
        self.things = [track for track in self.story.tracks if track.kind != "text"]
        self.words = [track for track in self.story.tracks if track.kind == "text"]
        self.entering = [track for track in self.things if track.enters]
        self.leaving = [track for track in self.things if track.leaves]
        self.changing = [track for track in self.things if track.changes is not None]

    def whole(self, seconds: Iterable[int]) -> list[Sight]:
        """All of the picture in these seconds."""
        box = Box(0, 0, self.side, self.side)
        return [Sight(FPS * second + i, box) for second in seconds for i in range(FPS)]


def _presence(view: View, rng: random.Random) -> Draft | None:
    if not view.things:
        return None
    if rng.random() < 0.5:
        track = rng.choice(view.things)
        return f"is there a {track.name}?", "yes", track.sights(0, view.seconds)
    shown = {track.name for track in view.things}
    absent = [name for name in rng.choice((CLIP_GLYPHS, CLIP_GLYPHS, CLIP_SHAPES)) if name not in shown]
    return (f"is there a {rng.choice(absent)}?", "no", ()) if absent else None


def _change(view: View, rng: random.Random) -> Draft | None:
    """What one picture has and an earlier one has not, or the other way round."""
    verb = rng.choice(("enters", "leaves"))
    moving = view.entering if verb == "enters" else view.leaving
    if len(moving) != 1 or len(moving[0].visits) > 1:
        return None
    (track,) = moving
    start, end = track.visits[0]
    around = (start, start + 1) if verb == "enters" else (end - 1, end)
    seen = track.sights(*around)
    # Where nothing was before, or is after: half of what a change is.
    shift = -FPS if verb == "enters" else FPS
    return f"what {verb}?", track.name, [*seen, *(Sight(sight.frame + shift, sight.box) for sight in seen)]


def _color(view: View, rng: random.Random) -> Draft | None:
    if not view.changing:
        return None
    track = rng.choice(view.changing)
    start, end = track.visits[0]
    if rng.random() < 0.5:
        return f"what color is the {track.name} first?", track.color, track.sights(start, start + 1)
    return f"what color is the {track.name} last?", track.later, track.sights(end - 1, end)


def _order(view: View, rng: random.Random) -> Draft | None:
    once = [track for track in view.things if track.act != "repeat"]
    if len(once) < 2:
        return None
    first, second = rng.sample(once, 2)
    if first.start == second.start:
        return None
    answer = "yes" if first.start < second.start else "no"
    seen = [sight for track in (first, second) for sight in track.sights(track.start, track.start + 1)]
    return f"is the {first.name} before the {second.name}?", answer, seen


def _count(view: View, rng: random.Random) -> Draft | None:
    repeated = [track for track in view.things if track.act == "repeat"]
    if not repeated:
        return None
    track = rng.choice(repeated)
    return f"how many times is there a {track.name}?", str(len(track.visits)), track.sights(0, view.seconds)


def _cuts(view: View, rng: random.Random) -> Draft | None:
    number = len(view.story.cuts)
    if rng.random() >= _ASKED_CUTS[number]:
        return None
    return "how many cuts?", str(number), view.whole(at for cut in view.story.cuts for at in (cut - 1, cut))


def _motion(view: View, rng: random.Random) -> Draft | None:
    moving = [track for track in view.things if track.direction]
    if not moving:
        return None
    track = rng.choice(moving)
    end = track.partner.changes if track.partner else track.visits[0][1]
    return f"where is the {track.name} going?", track.direction, track.sights(track.start, end or 0)


def _camera(view: View, rng: random.Random) -> Draft | None:
    axis, way = view.story.pan
    if not way:
        return None
    return "where is the view going?", DIRECTIONS[axis][way > 0], view.whole((0, view.seconds - 1))


def _cause(view: View, rng: random.Random) -> Draft | None:
    hits = [(track.partner, track) for track in view.changing if track.partner is not None]
    if not hits:
        return None
    hitter, target = rng.choice(hits)
    touch = target.changes or 0
    seen = hitter.sights(touch - 1, touch + 1) + target.sights(touch - 1, touch + 1)
    if rng.random() < 0.5:
        return f"what changes the {target.name}?", hitter.name, seen
    return f"what does the {hitter.name} change?", target.name, seen


def _when(view: View, rng: random.Random) -> Draft | None:
    """In which second, counted from 0."""
    drafts: list[Draft] = []
    for track in view.entering:
        if len(track.visits) == 1:
            text = f"when does the {track.name} enter?"
            drafts.append((text, str(track.start), track.sights(track.start, track.start + 1)))
    for track in view.changing:
        at = track.changes or 0
        drafts.append((f"when does the {track.name} change?", str(at), track.sights(at - 1, at + 1)))
    if len(view.words) == 1:
        (word,) = view.words
        drafts.append(("when is there a word?", str(word.start), word.sights(0, view.seconds)))
    return rng.choice(drafts) if drafts else None


def _needle(view: View, rng: random.Random) -> Draft | None:
    if len(view.words) != 1:
        return None
    (word,) = view.words
    return "what word is there?", word.name, word.sights(0, view.seconds)


_MAKERS: dict[str, Callable[[View, random.Random], Draft | None]] = {
    "presence": _presence,
    "change": _change,
    "color": _color,
    "order": _order,
    "count": _count,
    "cuts": _cuts,
    "motion": _motion,
    "camera": _camera,
    "cause": _cause,
    "when": _when,
    "needle": _needle,
}


def ask(
    story: Story, seconds: int, side: int, rng: random.Random, per_type: int = 1, types: Sequence[str] = TYPES
) -> tuple[ClipQuestion, ...]:
    """Up to `per_type` different questions of each type; fewer where the clip gives no occasion."""
    view = View(story, seconds, side)
    questions: dict[str, ClipQuestion] = {}
    for kind in types:
        for _ in range(per_type):
            draft = _MAKERS[kind](view, rng)
            if draft is not None:
                text, answer, seen = draft
                questions.setdefault(text, ClipQuestion(kind, text, answer, tuple(sorted(set(seen)))))
    return tuple(questions.values())
