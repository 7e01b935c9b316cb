"""BoundModel: what is static about a model that is compressed."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from winnow.core.errors import UnsupportedError
from winnow.core.info import ModelInfo
from winnow.engine.devices import device_of
from winnow.engine.flops import LINEAR
from winnow.engine.versions import cache_keyword
from winnow.models.family import Family, decoder_of, seam
from winnow.models.fingerprint import fingerprint

WINDOWED = ("sliding_attention", "chunked_attention", "hybrid_sliding")
ATTENTIONS = ("self_attn", "attention", "attn", "self_attention")


@dataclass(frozen=True, eq=False)
class BoundModel:
    """A model and its seams.

    Attributes:
        model: the model that the user calls, without PEFT's wrapper.
        base: what its head stands on; it encodes pictures and calls the language model.
        lm: the language model.
        family: the adapter.
        info: what methods may know.
        tower, blocks, projector: of the encoder; None where the family does not name them.
        layers: of the language model.
        kinds: how each layer attends, in transformers' words (`full_attention`, `sliding_attention`, …).
        kv_of: the layer whose keys and values each layer reads: its own, or those of one before it.
        short: whether the language model is called with the shortened sequence.
        device: of its token embeddings. All steps of a plan run there, wherever the other parts are.
        cache_name: the keyword under which this version of transformers passes the cache.
    """

    model: Any
    base: Any
    lm: Any
    family: Family
    info: ModelInfo
    tower: nn.Module | None
    blocks: Any
    projector: nn.Module | None
    layers: Any
    kinds: tuple[str, ...]
    kv_of: tuple[int, ...]
    short: bool
    device: torch.device
    cache_name: str

    @staticmethod
    def of(model: Any, family: Family) -> "BoundModel":
        """Find the seams; a missing one, or attention of a kind that is not understood, is refused."""
        base, lm = model.base_model, decoder_of(model) or model.get_decoder()
        for path in ("layers", "norm", "rotary_emb") if family.short else ("layers",):
            seam(lm, path, model)
        layers = lm.layers
        parts = [_part(base, path, model) for path in (family.tower, family.blocks, family.projector)]
        if not getattr(lm.config, "is_causal", True):
            raise UnsupportedError(f"the language model of {type(model).__name__} is not causal.")
        for module in (model, base, lm, *layers):
            if getattr(module, "_compiled_call_impl", None) is not None:
                raise UnsupportedError(
                    f"{type(module).__name__} was compiled in place (module.compile()) before it was compressed, and "
                    "compiled code does not see what is attached later. Load the model anew, compress it, and leave it "
                    "uncompiled: compression runs eagerly."
                )
        kinds = layer_kinds(lm)
        for module in (base, *layers) if family.short else (base, lm):
            cache_keyword(module)  # refused here where it is not known
        family.check(model)
        # Where layers differ, the first stands for all: learned methods that need heads are trained for a model anyway.
        own = lm.config.per_layer_config[0] if getattr(lm.config, "is_heterogeneous", False) else lm.config
        heads = getattr(own, "num_attention_heads", 1)
        groups = getattr(own, "num_key_value_heads", None) or heads
        width = getattr(own, "head_dim", None) or getattr(own, "hidden_size", heads) // heads
        sizes: dict[str, Any] = {"heads": heads, "kv_heads": groups, "head_dim": width}
        ears = _part(base, family.ear, model)
        sizes["sound_depth"] = 0 if ears is None else len(ears)
        info = replace(family.info(model), **sizes, fingerprint=partial(fingerprint, model))
        modalities = tuple(modality for _, modality, _ in family.encoders)
        modalities += ("video",) * (family.frames_apart and "video" not in modalities)
        videos = ("frames",) if "video" in modalities else ()
        pictures = "image" in modalities and not family.cross
        ahead = (*("prompt",) * pictures, *videos, *("pixels",) * pictures)
        info = replace(info, points=(*ahead, *info.points, "kv"), modalities=modalities)
        tower, blocks, projector = parts
        device = device_of(model.get_input_embeddings())
        short = family.short and set(kinds) == {"full_attention"}
        found = (model, base, lm, family, info, tower, blocks, projector, layers)
        return BoundModel(*found, kinds, _kv_of(layers, kinds), short, device, cache_keyword(lm))

    @property
    def token_ids(self) -> dict[str, int]:
        """The placeholder of each modality."""
        return {modality: getattr(self.model.config, name) for _, modality, name in self.family.encoders}

    @property
    def windowed(self) -> bool:
        """Whether some layer attends to a window or a chunk."""
        return any(kind in WINDOWED for kind in self.kinds)

    @property
    def compactable(self) -> bool:
        """Whether positions can be numbered anew in every layer: one rotary embedding, and no windows."""
        return self.short and not self.info.mrope

    @property
    def last_cut(self) -> int:
        """The last layer before which tokens can be dropped: later ones read keys from before the cut."""
        return min((own for i, own in enumerate(self.kv_of) if own != i), default=len(self.kv_of) - 1)

    def is_linear(self, layer: int) -> bool:
        """Whether a layer keeps a state instead of keys and values."""
        return self.kinds[layer] in LINEAR

    def check_seams(self) -> None:
        """Refuse a model whose parts were exchanged after it was compressed: hooks would be left on the old ones."""
        family = self.family
        found = [_part(self.base, path, self.model) for path in (family.tower, family.blocks, family.projector)]
        now = (*found, decoder_of(self.model), self.lm.layers)
        for was, new in zip((self.tower, self.blocks, self.projector, self.lm, self.layers), now, strict=True):
            if was is not new:
                raise UnsupportedError(
                    f"a part of {type(self.model).__name__} ({type(new).__name__}) was replaced while the model was "
                    "compressed; call detach() on its handle, replace the part, and compress again."
                )

    def blocks_at(self, index: int) -> list[Any]:
        """Block `index` of the tower, and of each further tower."""
        others = [seam(self.base, path, self.model) for path in self.family.other_blocks]
        return [blocks[index] for blocks in (self.blocks, *others)]

    def hearing_of(self, layer: int) -> Any:
        """The attention module of a layer of the encoder of sounds."""
        return seam(seam(self.base, self.family.ear, self.model)[layer], "self_attn", self.model)

    def attention_of(self, layer: int) -> Any:
        """The attention module of an LM layer."""
        for name in ATTENTIONS:
            if (found := getattr(self.layers[layer], name, None)) is not None and not self.is_linear(layer):
                return found
        attending = [str(i) for i, kind in enumerate(self.kinds) if kind not in LINEAR]
        raise UnsupportedError(
            f"layer {layer} of {type(self.model).__name__} is of the kind {self.kinds[layer]} and has no attention to "
            f"look at; layers with attention are {', '.join(attending)}."
        )


def _part(base: Any, path: str | None, model: Any) -> Any:
    return None if path is None else seam(base, path, model)


def _kv_of(layers: Any, kinds: tuple[str, ...]) -> tuple[int, ...]:
    shares = [getattr(getattr(layer, "self_attn", None), "is_kv_shared_layer", False) for layer in layers]
    own = [i for i, shared in enumerate(shares) if not shared]
    last = {kinds[i]: i for i in own}  # the last layer of a kind that has keys of its own lends them
    return tuple(last[kinds[i]] if shared else i for i, shared in enumerate(shares))


def layer_kinds(lm: Any) -> tuple[str, ...]:
    """How each layer of a language model attends, as its configuration says."""
    config, depth = lm.config, len(lm.layers)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        return ("sliding_attention" if windowed else "full_attention",) * depth
    if len(kinds) < depth:
        raise UnsupportedError(
            f"the configuration of {type(lm).__name__} names {len(kinds)} layer_types for {depth} layers; "
            "use a complete checkpoint."
        )
    return tuple(kinds[:depth])
