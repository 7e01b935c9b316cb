"""winnow's world in motion: clips drawn from a seed, with questions whose evidence is known in space and time."""

from winnow.world.clips.clip import VERSION, clip, staged, stretches
from winnow.world.clips.names import CLIP_GLYPHS, CLIP_SHAPES, CLIP_WORDS, FPS, LEVELS, SIDES, SPLITS, TYPES
from winnow.world.clips.records import Clip, ClipQuestion, Sight, Track
from winnow.world.clips.story import ClipSpec

__all__ = [
    "CLIP_GLYPHS",
    "CLIP_SHAPES",
    "CLIP_WORDS",
    "FPS",
    "LEVELS",
    "SIDES",
    "SPLITS",
    "TYPES",
    "VERSION",
    "Clip",
    "ClipQuestion",
    "ClipSpec",
    "Sight",
    "Track",
    "clip",
    "staged",
    "stretches",
]
