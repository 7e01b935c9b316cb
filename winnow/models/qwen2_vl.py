"""Qwen2-VL: as Qwen2.5-VL, with full attention in every block of its tower."""

from winnow.models.patch_grids import PatchGrids


class Qwen2VL(PatchGrids):
    name = "qwen2_vl"
    model_types = ("qwen2_vl",)
    tower_width = "embed_dim"  # `hidden_size` is what its merger gives
