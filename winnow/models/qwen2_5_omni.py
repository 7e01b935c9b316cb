"""The thinker of Qwen2.5-Omni: pictures and videos as Qwen2.5-VL has them.

Sounds are read in full: they are no items, and stand in the sequence as text does.
"""

from winnow.models.patch_grids import WindowedPatchGrids


class Qwen25Omni(WindowedPatchGrids):
    name = "qwen2_5_omni"
    model_types = ("qwen2_5_omni_thinker",)
