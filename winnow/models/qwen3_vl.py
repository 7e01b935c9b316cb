"""Qwen3-VL: any resolution, 2 × 2 patches to a token; each frame of a video stands behind the text of its time.

Features of lower vision blocks (deepstack) are added to the first layers of the language model; they follow the tokens
that are kept there.
"""

from winnow.models.patch_grids import PatchGrids


class Qwen3VL(PatchGrids):
    name = "qwen3_vl"
    model_types = ("qwen3_vl", "qwen3_vl_moe")
    side_mergers = ("visual.deepstack_merger_list",)
