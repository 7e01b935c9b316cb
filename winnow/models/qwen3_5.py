"""Qwen3.5: the tower of Qwen3-VL without deepstack; most layers of its language model keep a state, not keys.

A layer that keeps a state has read the tokens that came before a cut into it, so a cut is right at any layer: from
there on neither states nor keys hold what was dropped. But only a layer of full attention (every fourth as published)
has attention to look at: methods that read it must name such a layer.
"""

from winnow.models.patch_grids import PatchGrids


class Qwen35(PatchGrids):
    name = "qwen3_5"
    model_types = ("qwen3_5", "qwen3_5_moe")
