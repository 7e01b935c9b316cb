"""HICom: both branches on the answers; what it pools by starts as plain similarity to the question."""

from __future__ import annotations

from torch import nn

from winnow.learn.connectors import recipe
from winnow.parts.guided_pooling import Connector


class Recipe(recipe.Recipe):
    slug = "hicom"
    settings = {"frames": 4, "side": 2}  # noqa: RUF012
    sizes = {"queries": 10}  # noqa: RUF012
    steps, rate = 400, 2e-3

    def make(self) -> nn.Module:
        return Connector(self.frozen.info.width, coarse=False, **self.sizes)
