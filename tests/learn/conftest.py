from __future__ import annotations

import pytest
import torch

from winnow.reference.build import make_model
from winnow.reference.presets import preset


@pytest.fixture(scope="session")
def micro():
    """An untrained model of the smallest preset, its weights large enough that its answers differ."""
    torch.set_num_threads(1)
    model = make_model(preset("micro"), seed=1).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model
