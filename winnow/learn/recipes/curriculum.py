"""The stages of the reference recipe: what is drawn, what is asked, which tokens are kept, when to go on.

Binding one thing to another (relation, referring, reading) does not start from full scenes; it starts within minutes on
two things and carries over. Hence the order, and the gates on accuracy instead of fixed lengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from winnow.learn.language import Keep, Mix
from winnow.world import TYPES, Spec


@dataclass(frozen=True)
class TowerStage:
    """Pretraining steps; `keep` is the share of patches that enter the encoder (None: all)."""

    name: str
    steps: int
    keep: float | None
    decay: bool = False


@dataclass(frozen=True)
class LanguageStage:
    """Up to `steps` steps, ended early when every type of `gate` reaches its accuracy (after `least` steps).

    `keep` None means alignment only. With `decay` the learning rate falls over the second half and no gate applies.
    """

    name: str
    steps: int
    mix: Mix
    keep: Keep | None
    gate: Mapping[str, float] = field(default_factory=dict)
    least: int = 60
    batch: int = 32  # scenes, shared among the processes
    decay: bool = False


PLAIN = Spec(things=(1, 3), group=0.3, labelled=(0.0, 0.5), chart=0.3, document=0.15, clutter=(0, 2), blobs=(0, 1))
TWO = Spec(things=(2, 2), group=0.0, labelled=(0.0,), chart=0.0, document=0.0, clutter=(0, 1), blobs=(0, 1))
TWO_LABELLED = replace(TWO, labelled=(1.0,))
ONE_DOCUMENT = Spec(things=(0, 1), labelled=(0.5,), chart=0.0, document=1.0, clutter=(0, 1), blobs=(0, 1))
TWO_LINES = replace(ONE_DOCUMENT, lines=(2, 3))
FEW = Spec(things=(2, 4), group=0.4, labelled=(0.6, 1.0), chart=0.2, document=0.25, clutter=(0, 2))
FULL = Spec()
GROUPS = Spec(group=1.0, things=(3, 8))
FULL_LABELLED = Spec(labelled=(0.7, 1.0), document=0.4)

SIMPLE = {"presence": 2, "color": 2, "shape": 2, "place": 3, "count": 4, "chart": 1, "comparison": 2}
EVERY = dict.fromkeys(TYPES, 2) | {"presence": 3, "count": 6, "count-if": 8}
PAIRS = {"referring": 6, "reading": 6, "relation": 3, "comparison": 5, "document": 4}
# Where words are must be learned before what is near them.
REFERRING = {"place": 6, "referring": 6, "reading": 2, "relation": 1, "document": 4}
BINDING = {"relation": 3, "reading": 3, "referring": 3, "document": 5, "two-hop": 3, "comparison": 8}

CHEAP = Keep(full=0.1, shown=0.7, counts=(0.3, 0.4))
MIXED = Keep(full=0.45, shown=0.2, counts=(0.2, 0.3, 0.4, 0.6), compact=0.3)
MILD = Keep(full=0.65, shown=0.05, counts=(0.15, 0.25, 0.4, 0.6, 0.75), compact=0.3)


def tower_stages(scale: float) -> list[TowerStage]:
    """About three quarters of the steps on the patches that show something, the rest on all."""
    return [
        TowerStage("tower-shown", round(1200 * scale), keep=0.44),
        TowerStage("tower-full", round(300 * scale), keep=None, decay=True),
    ]


def language_stages(scale: float) -> list[LanguageStage]:
    """Alignment, simple types, then the binding types from two things to full scenes, then everything."""

    def steps(count: int) -> int:
        return max(8, round(count * scale))

    return [
        LanguageStage("align", steps(200), Mix(((1, FEW),)), None, batch=64),
        LanguageStage(
            "simple",
            steps(350),
            Mix(((1, PLAIN),), SIMPLE),
            CHEAP,
            {"place": 0.85, "color": 0.85},
            least=steps(150),
            batch=64,
        ),
        LanguageStage(
            "relation",
            steps(450),
            Mix(((1, TWO),), {"relation": 14, "place": 2, "color": 1, "presence": 1, "comparison": 1}),
            CHEAP,
            {"relation": 0.88},
            least=steps(75),
            batch=64,
        ),
        LanguageStage(
            "pairs",
            steps(500),
            Mix(((5, TWO_LABELLED), (1, ONE_DOCUMENT)), PAIRS),
            CHEAP,
            {"reading": 0.82},
            least=steps(75),
            batch=64,
        ),
        LanguageStage(
            "referring",
            steps(500),
            Mix(((5, TWO_LABELLED), (1, ONE_DOCUMENT)), REFERRING),
            CHEAP,
            {"referring": 0.82},
            least=steps(75),
            batch=64,
        ),
        LanguageStage(
            "few",
            steps(300),
            Mix(((4, FEW), (1, TWO_LABELLED)), SIMPLE | BINDING | {"count-if": 4}),
            CHEAP,
            {"reading": 0.8, "referring": 0.8, "relation": 0.88},
            least=steps(100),
            batch=48,
        ),
        LanguageStage(
            "all",
            steps(800),
            Mix(((4, FULL), (3, FULL_LABELLED), (2, FEW), (1, TWO_LABELLED), (2, TWO_LINES)), EVERY | BINDING),
            MIXED,
        ),
        LanguageStage(
            "finish",
            steps(1000),
            Mix(
                ((4, FULL), (3, GROUPS), (2, FULL_LABELLED), (1, FEW)), EVERY | BINDING | {"count": 10, "count-if": 10}
            ),
            MILD,
            decay=True,
        ),
    ]
