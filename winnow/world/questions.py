"""Questions about a scene, their answers, and the things an answer depends on.

Answers are balanced within each type: yes and no are drawn before the thing asked about, counts are drawn uniformly
from the counts, and absent things come from the same distribution as present ones (half of them are neighbours
of a present thing in the sheet, which is sorted by subject: the traps).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from winnow.world.items import Item, Question
from winnow.world.names import COLORS, GLYPHS, HELD_OUT, PLACES, SHAPES, TYPES

Draft = tuple[str, str, Sequence[Item]]  # text, answer, evidence

SIDEWAYS, UPRIGHT = ("left of", "right of"), ("above", "below")
APART = 14  # pixels two centres must differ by to be left of, above, …
BIGGER = 1.35  # ratio of extents from which one thing is bigger


@dataclass
class View:
    """A scene as the questioner sees it. `hidden` names may be in the picture but are not spoken of.

    Nothing is hidden where the questions are about held-out glyphs; then only those are asked about in vain.
    """

    items: Sequence[Item]
    size: int
    hidden: frozenset[str]

    def __post_init__(self) -> None:
        things = [i for i in self.items if i.kind in ("glyph", "shape") and i.name not in self.hidden]
        self.shapes = [i for i in things if i.kind == "shape"]
        self.named = _group(things, lambda i: i.name)
        self.colored = _group(self.shapes, lambda i: i.color)
        self.unique = [group[0] for group in self.named.values() if len(group) == 1]
        self.glyphs = tuple(name for name in GLYPHS if name not in self.hidden)
        self.bars = [i for i in self.items if i.kind == "bar"]
        self.lines = [i for i in self.items if i.kind == "text" and i.partner is not None and i.partner.kind == "text"]


def _group(items: Iterable[Item], key: Callable[[Item], str]) -> dict[str, list[Item]]:
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def _absent(view: View, rng: random.Random, kind: str) -> str:
    """A name of this kind that is not in the picture; half of the time one related to something that is."""
    present = [name for name, group in view.named.items() if group[0].kind == kind]
    names: Sequence[str] = view.glyphs if kind == "glyph" else SHAPES
    if kind == "glyph" and present and rng.random() < 0.5:
        at = view.glyphs.index(rng.choice(present))
        names = view.glyphs[max(0, at - 5) : at + 6]
    spoken = names if view.hidden else [name for name in names if name in HELD_OUT]
    rest = [name for name in spoken if name not in view.named]
    return rng.choice(rest) if rest else ""


def _presence(view: View, rng: random.Random) -> Draft | None:
    if rng.random() < 0.2:
        return _presence_of_pair(view, rng)
    kinds = sorted({group[0].kind for group in view.named.values()})
    if not kinds:
        return None
    kind = rng.choice(kinds)
    if rng.random() < 0.5:
        name = rng.choice([n for n, group in view.named.items() if group[0].kind == kind])
        return f"is there a {name}?", "yes", view.named[name]
    name = _absent(view, rng, kind)
    return (f"is there a {name}?", "no", ()) if name else None


def _presence_of_pair(view: View, rng: random.Random) -> Draft | None:
    """A colour with a shape: the trap has both, but not on one thing."""
    if not view.shapes:
        return None
    if rng.random() < 0.5:
        thing = rng.choice(view.shapes)
        alike = [i for i in view.colored[thing.color] if i.name == thing.name]
        return f"is there a {thing.color} {thing.name}?", "yes", alike
    pairs = {(i.color, i.name) for i in view.shapes}
    color, name = rng.choice(view.shapes).color, rng.choice(view.shapes).name
    if (color, name) in pairs:
        color = rng.choice(list(COLORS))
    return (f"is there a {color} {name}?", "no", ()) if (color, name) not in pairs else None


def _count(view: View, rng: random.Random) -> Draft | None:
    """Counts 0 to 5, drawn by count, then by name. Most draws of 0 and 1, the common case, are refused."""
    if not view.named:
        return None
    number = rng.choice(sorted({min(len(g), 6) for g in view.named.values()} | {0}))
    if number <= 1 and rng.random() < (0.86, 0.83)[number]:
        return None
    if number == 0:
        name = _absent(view, rng, rng.choice(("glyph", "shape")))
        return (f"how many {name}?", "0", ()) if name else None
    if number > 5:
        return None
    name = rng.choice([name for name, group in view.named.items() if len(group) == number])
    return f"how many {name}?", str(number), view.named[name]


def _count_if(view: View, rng: random.Random) -> Draft | None:
    """How many of a shape have a colour, where the shape or the colour alone would give another number."""
    pairs = _group(view.shapes, lambda i: f"{i.color} {i.name}")
    shapes = _group(view.shapes, lambda i: i.name)
    choices: dict[int, list[str]] = defaultdict(list)
    for color, same_color in view.colored.items():
        for name, same_shape in shapes.items():
            number = len(pairs.get(f"{color} {name}", ()))
            if max(len(same_color), len(same_shape)) > number and number <= 4:
                choices[number].append(f"{color} {name}")
    if not choices:
        return None
    number = rng.choice(sorted(choices))
    if number <= 1 and rng.random() < (0.86, 0.78)[number]:
        return None
    key = rng.choice(choices[number])
    color, name = key.split()
    evidence = pairs.get(key) or [*view.colored[color], *shapes[name]]
    return f"how many {key}?", str(number), evidence


def _color(view: View, rng: random.Random) -> Draft | None:
    choices = [i for i in view.unique if i.kind == "shape"]
    if not choices:
        return None
    thing = rng.choice(choices)
    return f"what color is the {thing.name}?", thing.color, (thing,)


def _shape(view: View, rng: random.Random) -> Draft | None:
    choices = [group[0] for group in view.colored.values() if len(group) == 1]
    if not choices:
        return None
    thing = rng.choice(choices)
    return f"what shape is {thing.color}?", thing.name, (thing,)


def _relation(view: View, rng: random.Random) -> Draft | None:
    if len(view.unique) < 2:
        return None
    first, second = rng.sample(view.unique, 2)
    axis = rng.randrange(2)
    distance = first.center[axis] - second.center[axis]
    if abs(distance) < APART:
        return None
    word = rng.randrange(2)
    answer = "yes" if (distance < 0) == (word == 0) else "no"
    return f"is the {first.name} {(SIDEWAYS, UPRIGHT)[axis][word]} the {second.name}?", answer, (first, second)


def _place(view: View, rng: random.Random) -> Draft | None:
    """The quarter in which a thing that comes once, or a word, lies."""
    words = [i for i in view.items if i.kind == "text" and not i.text.isdigit()]
    choices = words if words and rng.random() < 0.35 else view.unique
    if not choices:
        return None
    thing = rng.choice(choices)
    (x, y), middle = thing.center, view.size / 2
    if min(abs(x - middle), abs(y - middle)) < view.size / 22:
        return None
    called = f"word {thing.text}" if thing.text else thing.name
    return f"where is the {called}?", PLACES[2 * (y > middle) + (x > middle)], (thing,)


def _reading(view: View, rng: random.Random) -> Draft | None:
    choices = _with_partners(view.unique)
    return _read_label(*rng.choice(choices)) if choices else None


def _read_label(thing: Item, label: Item, called: str = "") -> Draft:
    kind = "number" if label.text.isdigit() else "word"
    return f"what {kind} is near the {called or thing.name}?", label.text, (thing, label)


def _referring(view: View, rng: random.Random) -> Draft | None:
    labels = _word_labels(view)
    if not labels:
        return None
    thing, label = rng.choice(labels)
    return f"what is near the word {label.text}?", thing.name, (label, thing)


def _with_partners(items: Iterable[Item]) -> list[tuple[Item, Item]]:
    """(item, its partner) for those that have one."""
    return [(item, partner) for item in items if (partner := item.partner) is not None]


def _word_labels(view: View) -> list[tuple[Item, Item]]:
    """(thing, label) for every thing that carries a word."""
    things = [thing for group in view.named.values() for thing in group]
    return [(thing, label) for thing, label in _with_partners(things) if not label.text.isdigit()]


def _document(view: View, rng: random.Random) -> Draft | None:
    lines = [(word, number) for word, number in _with_partners(view.lines) if number.text.isdigit()]
    if not lines:
        return None
    word, number = rng.choice(lines)
    return f"what number is after the word {word.text}?", number.text, (word, number)


def _chart(view: View, rng: random.Random) -> Draft | None:
    if not view.bars:
        return None
    rank = rng.choice(("tallest", "shortest"))
    return f"which bar is {rank}?", next(bar.color for bar in view.bars if bar.rank == rank), view.bars


def _comparison(view: View, rng: random.Random) -> Draft | None:
    """Bigger (of two things that come once) or more (of two kinds)."""
    if rng.random() < 0.6:
        if len(view.unique) < 2:
            return None
        first, second = rng.sample(view.unique, 2)
        if max(first.extent, second.extent) < BIGGER * min(first.extent, second.extent):
            return None
        answer = "yes" if first.extent > second.extent else "no"
        return f"is the {first.name} bigger than the {second.name}?", answer, (first, second)
    if len(view.named) < 2:
        return None
    one, other = rng.sample(list(view.named.values()), 2)
    if len(one) == len(other):
        return None
    answer = "yes" if len(one) > len(other) else "no"
    return f"are there more {one[0].name} than {other[0].name}?", answer, (*one, *other)


def _two_hop(view: View, rng: random.Random) -> Draft | None:
    """The colour of what stands near a word, or the label of what has a colour."""
    if rng.random() < 0.5:
        labels = [pair for pair in _word_labels(view) if pair[0].kind == "shape"]
        if not labels:
            return None
        thing, label = rng.choice(labels)
        return f"what color is the shape near the word {label.text}?", thing.color, (label, thing)
    choices = _with_partners(group[0] for group in view.colored.values() if len(group) == 1)
    if not choices:
        return None
    thing, label = rng.choice(choices)
    return _read_label(thing, label, f"{thing.color} shape")


_MAKERS: dict[str, Callable[[View, random.Random], Draft | None]] = {
    "presence": _presence,
    "count": _count,
    "count-if": _count_if,
    "color": _color,
    "shape": _shape,
    "relation": _relation,
    "place": _place,
    "reading": _reading,
    "referring": _referring,
    "document": _document,
    "chart": _chart,
    "comparison": _comparison,
    "two-hop": _two_hop,
}


def ask(
    items: Sequence[Item],
    size: int,
    rng: random.Random,
    per_type: int = 1,
    types: Sequence[str] = TYPES,
    held_out: bool = False,
) -> tuple[Question, ...]:
    """Up to `per_type` different questions of each type; fewer where the scene gives no occasion.

    Held-out glyphs are neither asked about nor answered with; with `held_out` every question names at least one.
    """
    view = View(items, size, frozenset() if held_out else HELD_OUT)
    questions: dict[str, Question] = {}
    for kind in types:
        for _ in range(per_type):
            draft = _MAKERS[kind](view, rng)
            if draft is None:
                continue
            text, answer, evidence = draft
            if held_out and not HELD_OUT & {*text.rstrip("?").split(), answer}:
                continue
            questions.setdefault(text, Question(kind, text, answer, tuple(item.box for item in evidence)))
    return tuple(questions.values())
