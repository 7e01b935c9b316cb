"""BoundModel: what is static about a model that is compressed."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from winnow.core.errors import UnsupportedError
from winnow.core.info import ModelInfo
from winnow.engine.devices import device_of
from winnow.engine.versions import cache_keyword
from winnow.models.family import Family, seam


@dataclass(frozen=True, eq=False)
class BoundModel:
    """A model and its seams.

    Attributes:
        model: the model that the user calls, without PEFT's wrapper.
        base: what its head stands on; it encodes pictures and calls the language model.
        lm: the language model.
        family: the adapter.
        info: what methods may know.
        tower, blocks, projector: of the encoder.
        layers: of the language model.
        device: of its token embeddings. All steps of a plan run there, wherever the other parts are.
        cache_name: the keyword under which this version of transformers passes the cache.
    """

    model: Any
    base: Any
    lm: Any
    family: Family
    info: ModelInfo
    tower: nn.Module
    blocks: Any
    projector: nn.Module
    layers: Any
    device: torch.device
    cache_name: str

    @staticmethod
    def of(model: Any, family: Family) -> "BoundModel":
        """Find the seams; a missing one, or attention of a kind that is not understood, is refused."""
        base, lm = model.base_model, model.get_decoder()
        for path in ("layers", "norm", "rotary_emb"):
            seam(lm, path, model)
        parts = [seam(base, path, model) for path in (family.tower, family.blocks, family.projector)]
        other = set(getattr(lm.config, "layer_types", None) or ()) - {"full_attention"}
        if other or getattr(lm.config, "sliding_window", None):
            raise UnsupportedError(
                f"{type(model).__name__} has sliding-window or other special attention "
                f"({', '.join(sorted(other)) or 'sliding_window'}); this version compresses full attention only."
            )
        if not getattr(lm.config, "is_causal", True):
            raise UnsupportedError(f"the language model of {type(model).__name__} is not causal.")
        for module in (model, base, lm, *lm.layers):
            if getattr(module, "_compiled_call_impl", None) is not None:
                raise UnsupportedError(
                    f"{type(module).__name__} was compiled in place (module.compile()) before it was compressed, and "
                    "compiled code does not see what is attached later. Load the model anew, compress it, and leave it "
                    "uncompiled: compression runs eagerly."
                )
        for module in (base, *lm.layers):
            cache_keyword(module)  # refused here where it is not known
        info = family.info(model)
        tower, blocks, projector = parts
        device = device_of(model.get_input_embeddings())
        return BoundModel(model, base, lm, family, info, tower, blocks, projector, lm.layers, device, cache_keyword(lm))

    @property
    def token_ids(self) -> dict[str, int]:
        """The placeholder of each modality."""
        return {modality: getattr(self.model.config, name) for _, modality, name in self.family.encoders}

    def check_seams(self) -> None:
        """Refuse a model whose parts were exchanged after it was compressed: hooks would be left on the old ones."""
        found = [
            seam(self.base, path, self.model) for path in (self.family.tower, self.family.blocks, self.family.projector)
        ]
        now = (*found, self.model.get_decoder(), self.lm.layers)
        for was, new in zip((self.tower, self.blocks, self.projector, self.lm, self.layers), now, strict=True):
            if was is not new:
                raise UnsupportedError(
                    f"a part of {type(self.model).__name__} ({type(new).__name__}) was replaced while the model was "
                    "compressed; call detach() on its handle, replace the part, and compress again."
                )

    def attention_of(self, layer: int) -> nn.Module:
        """The attention module of an LM layer."""
        return seam(self.layers[layer], "self_attn", self.model)
