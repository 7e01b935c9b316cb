"""Qwen2.5-VL: any resolution, 2 × 2 patches to a token, 3-D positions, windows in most blocks, no [CLS]."""

from winnow.models.patch_grids import WindowedPatchGrids


class Qwen25VL(WindowedPatchGrids):
    name = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)
    short = True
    streams = True
