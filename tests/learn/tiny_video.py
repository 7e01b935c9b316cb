"""A video model that knows nothing, for runs of training that are over at once."""

from __future__ import annotations

from pathlib import Path

import torch

from winnow.reference import video

SIZES = {"width": 48, "depth": 2, "tower_heads": 2, "layers": 3, "heads": 2, "inner": 64}


def tiny(target: Path) -> Path:
    """The folder of one whose answers depend on what is seen."""
    model = video.make_model(video.config(**SIZES), 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(target)
    video.make_tokenizer().save_pretrained(target)
    return target
