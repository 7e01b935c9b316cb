"""Encoder–decoders: a picture stands in an encoder's sequence or is all of it, and the decoder reads it by attention.

With words and pictures in one encoder (their prompt is `input_ids`; the decoder begins with a token of its own):
Florence-2 (BART, whose positions do not know of padding; an average over the patches and the patches take the places of
placeholders), BLIP-2 with T5
(queries in the places of placeholders), UDOP (no placeholders: each patch is added to the words whose boxes lie in it,
and the patches that hold no word follow the words, padded to the number of all; the boxes also bias the attention).

With a picture alone in the encoder (their prompt is the decoder's, `decoder_input_ids`, so only single rows with one
picture are made): Pix2Struct (patches with their row and column), vision-encoder-decoder (ViT and a BERT with
cross-attention), PP-FormulaNet (a SAM encoder of windows and a convolution).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    BartConfig,
    BertConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Pix2StructConfig,
    Pix2StructForConditionalGeneration,
    PPFormulaNetConfig,
    PPFormulaNetForConditionalGeneration,
    T5Config,
    UdopConfig,
    UdopForConditionalGeneration,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from builds.build import BOS, PAD, Build, Inputs, Picture
from builds.terms import in_terms

IMAGE = 250
SIDE, PATCH, QUERIES = 56, 14, 16
FLORENCE = 64  # pixels of a side: 8 × 8 patches after two halvings and a stride of two, 4 × 4 after the last
CELLS, CELL = 40, 4  # patches with padding and pixels of a patch's side, of Pix2Struct
_GRIDS = {"A": (5, 6), "B": (3, 9), "C": (4, 4)}  # patches of Pix2Struct, height and width
TOWER = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
SQUARE = {"image_size": SIDE, "patch_size": PATCH}
UNTIED = {"tie_word_embeddings": False}  # a tied head echoes the last token

IN_ENCODER = "pictures stand in the sequence of an encoder, which a decoder reads through cross-attention"
ALONE = "a picture is all that the encoder reads; the decoder's words read it through cross-attention"


def _both(text: dict[str, Any]) -> dict[str, Any]:
    """In BART's terms: an encoder and a decoder of one depth."""
    return in_terms(
        text,
        d_model="hidden_size",
        encoder_layers="num_hidden_layers",
        decoder_layers="num_hidden_layers",
        encoder_ffn_dim="intermediate_size",
        decoder_ffn_dim="intermediate_size",
        encoder_attention_heads="num_attention_heads",
        decoder_attention_heads="num_attention_heads",
        without=("num_key_value_heads",),
    )


def _t5(text: dict[str, Any], **names: str) -> dict[str, Any]:
    """In T5's terms, where positions are biases of the attention."""
    without = ("num_key_value_heads", "max_position_embeddings", "bos_token_id")
    settings = in_terms(
        text,
        d_ff="intermediate_size",
        num_layers="num_hidden_layers",
        num_heads="num_attention_heads",
        without=without,
        **names,
    )
    return settings | {"d_kv": text["hidden_size"] // text["num_attention_heads"], "decoder_start_token_id": PAD}


def _florence2(text: dict[str, Any]) -> nn.Module:
    config = Florence2Config(
        text_config=BartConfig(**_both(text) | {"decoder_start_token_id": BOS, "forced_eos_token_id": None} | UNTIED),
        vision_config={
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [8, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "embed_dim": [32, 48],
            "num_heads": [2, 4],
            "num_groups": [2, 4],
            "window_size": 3,
            "projection_dim": text["hidden_size"],
        },
        image_token_id=IMAGE,
        **UNTIED,
    )
    return Florence2ForConditionalGeneration(config)


def _blip_2_t5(text: dict[str, Any]) -> nn.Module:
    config = Blip2Config(
        vision_config=TOWER | SQUARE,
        qformer_config=TOWER | {"vocab_size": 64, "max_position_embeddings": 32},
        text_config=T5Config(**_t5(text, d_model="hidden_size")),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    model = Blip2ForConditionalGeneration(config)
    model.language_model.generation_config.eos_token_id = None  # it is the one whose `generate` runs
    return model


def _udop(text: dict[str, Any]) -> nn.Module:
    return UdopForConditionalGeneration(UdopConfig(**_t5(text, d_model="hidden_size"), **SQUARE))


def _pix2struct(text: dict[str, Any]) -> nn.Module:
    vision = {
        "hidden_size": text["hidden_size"],  # the decoder's attention reads it without a projection
        "d_ff": 96,
        "d_kv": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_embed_hidden_size": 3 * CELL**2,
        "seq_len": 64,
    }
    config = Pix2StructConfig(text_config=_t5(text), vision_config=vision)
    return Pix2StructForConditionalGeneration(config)


def _vision_encoder_decoder(text: dict[str, Any]) -> nn.Module:
    decoder = in_terms(text, without=("num_key_value_heads",)) | {"is_decoder": True, "add_cross_attention": True}
    config = VisionEncoderDecoderConfig(
        encoder=ViTConfig(**TOWER, **SQUARE).to_dict(),
        decoder=BertConfig(**decoder, **UNTIED).to_dict(),
        decoder_start_token_id=BOS,
        pad_token_id=PAD,
        **UNTIED,
    )
    return VisionEncoderDecoderModel(config)


def _pp_formulanet(text: dict[str, Any]) -> nn.Module:
    without = ("encoder_ffn_dim",)
    config = PPFormulaNetConfig(
        text_config=in_terms(_both(text), without=without) | {"decoder_start_token_id": BOS},
        vision_config={
            "hidden_size": 32,
            "output_channels": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 128,
            "window_size": 3,
            "global_attn_indexes": [1],
            "mlp_dim": 64,
            "post_conv_in_channels": 32,
            "post_conv_mid_channels": 32,
            "post_conv_out_channels": 48,
            "decoder_hidden_size": text["hidden_size"],
        },
    )
    return PPFormulaNetForConditionalGeneration(config)


def _pixels(side: int, generator: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(1, 3, side, side, generator=generator)}


def _florence2_picture(letter: str, generator: torch.Generator) -> Picture:
    return [IMAGE] * (1 + (FLORENCE // 16) ** 2), _pixels(FLORENCE, generator)


def _queries(letter: str, generator: torch.Generator) -> Picture:
    return [IMAGE] * QUERIES, _pixels(SIDE, generator)


def _small(letter: str, generator: torch.Generator) -> Picture:
    return [], _pixels(SIDE, generator)


def _large(letter: str, generator: torch.Generator) -> Picture:
    return [], _pixels(128, generator)


def _patches(letter: str, generator: torch.Generator) -> Picture:
    """Patches with their places, and the encoder's mask, which the class calls `attention_mask`."""
    height, width = _GRIDS[letter]
    patches = torch.zeros(1, CELLS, 2 + 3 * CELL**2)
    patches[0, : height * width, :2] = torch.cartesian_prod(
        torch.arange(1, height + 1), torch.arange(1, width + 1)
    ).float()
    patches[0, : height * width, 2:].normal_(generator=generator)
    return [], {"flattened_patches": patches, "attention_mask": (patches[..., 0] > 0).long()}


def _decoder_starts(inputs: Inputs) -> Inputs:
    return inputs | {"decoder_input_ids": torch.full((1, 1), PAD)}


def _boxed(inputs: Inputs) -> Inputs:
    """A box for each word, one after the other along the lines of a page; the sides are fractions of the page."""
    places = torch.arange(inputs["input_ids"].shape[1])
    left, top = places % 4 / 4 + 0.05, places // 4 / 8 + 0.05
    return _decoder_starts(inputs) | {"bbox": torch.stack([left, top, left + 0.15, top + 0.05], dim=-1)[None]}


def _decoders(inputs: Inputs) -> Inputs:
    return {"decoder_input_ids": inputs["input_ids"]}


BUILDS = (
    Build("florence2", "florence2", _florence2, _florence2_picture, padding="right", cannot=IN_ENCODER),
    Build("blip_2_t5", "blip-2", _blip_2_t5, _queries, completed=_decoder_starts, cannot=IN_ENCODER),
    Build("udop", "udop", _udop, _small, completed=_boxed, padding=None, cannot=IN_ENCODER),
    Build("pix2struct", "pix2struct", _pix2struct, _patches, completed=_decoders, padding=None, cannot=ALONE),
    Build(
        "vision_encoder_decoder",
        "vision-encoder-decoder",
        _vision_encoder_decoder,
        _small,
        completed=_decoders,
        padding=None,
        cannot=ALONE,
    ),
    Build("pp_formulanet", "pp_formulanet", _pp_formulanet, _large, completed=_decoders, padding=None, cannot=ALONE),
)
