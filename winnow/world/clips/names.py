"""What can be seen in a clip, what is asked about it, and how long and large it may be."""

from __future__ import annotations

from winnow.world.names import WORDS

# Few things, and unlike each other: a clip asks for what happens to them, and they are small.
_GLYPHS = """
frog pig penguin butterfly ladybug crab fish octopus elephant cactus tree sunflower rose sun moon rainbow apple banana
strawberry carrot pizza donut guitar bicycle car train rocket house umbrella key heart ghost
"""
CLIP_GLYPHS = tuple(_GLYPHS.split())
CLIP_SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
CLIP_COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
CLIP_WORDS = WORDS[:16]
DIRECTIONS = (("left", "right"), ("up", "down"))  # by axis: against it, along it

TYPES = ("presence", "change", "color", "order", "count", "cuts", "motion", "camera", "cause", "when", "needle")
# What a type asks for; by the protocol accuracies are read level by level.
LEVELS = {
    "presence": "perception",
    "needle": "perception",
    "motion": "event",
    "camera": "event",
    "change": "event",
    "count": "event",
    "cuts": "event",
    "when": "event",
    "color": "relation",
    "order": "relation",
    "cause": "relation",
}
SPLITS = ("train", "test")
SIDES = (84, 112, 168)  # pixels
FPS = 2  # frames of a second; everything begins and ends with a second
FRAMES = (8, 192)  # the fewest and the most; even
MOST_VISITS = 4
MOST_CUTS = 2
