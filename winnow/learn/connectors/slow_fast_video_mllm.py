"""Slow-Fast: keys and values start as those of the layer in which text reads them; its gates are nearly shut."""

from __future__ import annotations

from typing import Any, ClassVar

from winnow.learn.connectors import recipe
from winnow.learn.connectors.beside import as_the_layer


class Recipe(recipe.Recipe):
    slug = "slow-fast-video-mllm"
    settings: ClassVar = {"stride": 4, "least": 1}
    clips, steps = 900, 450
    rate = 5e-3

    def start(self, module: Any) -> None:
        layers = self.frozen.model.model.language_model.layers
        for name, reader in module.items():
            as_the_layer(reader, layers[int(name)])
