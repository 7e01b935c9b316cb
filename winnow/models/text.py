"""Text: language models without pictures, whose cache can be compressed and nothing else."""

from typing import Any, ClassVar

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from winnow.models.family import Family, decoder_of


class Text(Family):
    """A causal language model of transformers (`AutoModelForCausalLM`)."""

    name = "text"
    model_types = ()
    tower = blocks = projector = None
    encoders = ()
    points: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def why_not(model: Any) -> str:
        """What keeps a model that says words, and encodes nothing, from being compressed; empty if nothing is seen."""
        return "" if decoder_of(model) is getattr(model, "base_model", None) else "its decoder has no `layers`"

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether a model is a decoder that says words, and encodes nothing. Whether it can run says `why_not`."""
        config = getattr(model, "config", None)
        if getattr(config, "model_type", None) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            return False
        if getattr(config, "is_encoder_decoder", True) or not hasattr(model, "get_decoder"):
            return False
        base = getattr(model, "base_model", model)
        encodes = any(
            hasattr(base, name) for name in ("get_image_features", "get_video_features", "get_audio_features")
        )
        has_head = getattr(model, "get_output_embeddings", lambda: None)() is not None
        return not encodes and has_head and base is not model
