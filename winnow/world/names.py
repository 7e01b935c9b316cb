"""What can be seen in winnow's world, and what it is called: glyphs, shapes, colours, words, places, question types."""

from __future__ import annotations

import json
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"

_SHEET: list[dict[str, str]] = json.loads((ASSETS / "glyphs.json").read_text())
SHEET_ORDER = {row["name"]: index for index, row in enumerate(_SHEET)}
GLYPHS = tuple(row["name"] for row in _SHEET if row["group"] == "named")
# Pictures that no question ever asks about: what is salient need not be relevant.
CLUTTER = tuple(row["name"] for row in _SHEET if row["group"] == "clutter")
# Drawn in every split, but asked about only in the split "heldout_glyphs".
HELD_OUT = frozenset(GLYPHS[5::10])

SHAPES = ("circle", "square", "triangle", "diamond", "pentagon", "cross", "ring", "semicircle")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 220),
    "yellow": (245, 220, 40),
    "purple": (140, 40, 170),
    "orange": (245, 135, 20),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
    "pink": (250, 140, 190),
    "cyan": (40, 210, 220),
}
_WORDS = """
ACE ADD AIR ARM ART ASK BAR BED BIG BOX BUY CUP CUT DAY DRY EAR END EYE FAN FAR FLY FUN GAS GUM HOP ICE INK JAM JOB JOY
KIT LAB LAW LEG LOW MAP MIX MUD NET NEW OIL OLD PAY PEN POT RAW RUN SAD SEA SKY TEN TOP TOY VAN WAR WAX WEB WIN YES ZIP
"""
WORDS = tuple(_WORDS.split())
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")

TYPES = (
    "presence",
    "count",
    "count-if",
    "color",
    "shape",
    "relation",
    "place",
    "reading",
    "referring",
    "document",
    "chart",
    "comparison",
    "two-hop",
)
SIZES = (224, 336)
SPLITS = ("train", "test", "heldout_glyphs")
