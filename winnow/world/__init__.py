"""winnow's reference world: pictures drawn from a seed, with questions whose evidence is known to the pixel."""

from winnow.world.compose import Spec
from winnow.world.export import export, origin, show
from winnow.world.items import Box, Item, Question, Scene
from winnow.world.names import COLORS, GLYPHS, HELD_OUT, PLACES, SHAPES, SPLITS, TYPES, WORDS
from winnow.world.questions import ask
from winnow.world.scenes import VERSION, evidence_mask, fractions, scene

__all__ = [
    "COLORS",
    "GLYPHS",
    "HELD_OUT",
    "PLACES",
    "SHAPES",
    "SPLITS",
    "TYPES",
    "VERSION",
    "WORDS",
    "Box",
    "Item",
    "Question",
    "Scene",
    "Spec",
    "ask",
    "evidence_mask",
    "export",
    "fractions",
    "origin",
    "scene",
    "show",
]
