"""CrossLMM: what reads starts as the layer that it reads in; its gates are nearly shut."""

from __future__ import annotations

from typing import Any, ClassVar

from winnow.learn.connectors import recipe
from winnow.learn.connectors.beside import as_the_layer


class Recipe(recipe.Recipe):
    slug = "crosslmm"
    settings: ClassVar = {"grid": 1}
    clips = 900
    rate = 2e-3

    def start(self, module: Any) -> None:
        layers = self.frozen.model.model.language_model.layers
        for name, reader in module.items():
            layer = layers[int(name.removeprefix("text").removeprefix("visual"))]
            as_the_layer(reader, layer)
