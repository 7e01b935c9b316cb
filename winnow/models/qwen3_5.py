"""Qwen3.5: the tower of Qwen3-VL without deepstack; most layers of its language model keep a state, not keys.

A cut is right before any layer: the states of the layers before it have read all tokens, those behind it only what is
left. But only layers of full attention (every fourth as published: 3, 7, 11, …) have attention to look at, so methods
that read it must act at such a layer or behind it, as in `fastv:layer=4`; others are refused with the layers that can.
"""

from winnow.models.patch_grids import PatchGrids


class Qwen35(PatchGrids):
    name = "qwen3_5"
    model_types = ("qwen3_5", "qwen3_5_moe")
