"""Build a reference model and its processor from a preset: plain transformers classes without any winnow code."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from winnow.reference.presets import Preset
from winnow.reference.vocabulary import BOS, CHAT_TEMPLATE, EOS, IMAGE, PAD, TOKEN_ID, VOCABULARY, make_tokenizer

ROPE_THETA = 1e6  # slow turns: a name in a question must match a token hundreds of positions before it
MATCH_GAIN = 4.0  # of queries and keys that start equal; see `_start_matching`
POSITION_NORM = 7.0  # length of a position embedding at initialisation; a patch embedding has about 18


def config(preset: Preset) -> LlavaConfig:
    """The configuration of a preset: [CLS], features of the last layer but one, MLP projector."""
    vision = CLIPVisionConfig(
        hidden_size=preset.width,
        intermediate_size=4 * preset.width,
        num_hidden_layers=preset.tower_layers,
        num_attention_heads=preset.tower_heads,
        image_size=preset.image,
        patch_size=preset.patch,
        projection_dim=preset.width,
        hidden_act="gelu_pytorch_tanh",
    )
    text = LlamaConfig(
        vocab_size=-(-len(VOCABULARY) // 16) * 16,
        hidden_size=preset.width,
        intermediate_size=preset.inner,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.heads,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=TOKEN_ID[BOS],
        eos_token_id=TOKEN_ID[EOS],
        pad_token_id=TOKEN_ID[PAD],
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=TOKEN_ID[IMAGE],
        image_seq_length=preset.visual_tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )


def make_model(preset: Preset, seed: int = 0) -> LlavaForConditionalGeneration:
    """A freshly initialised model with two starts that are not random.

    The tower's position embedding is 2-D sines and cosines: random positions are lost next to the patch embedding, and
    with them every question about place. And the language model starts by attending to what is alike.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config(preset))
    embedding = model.model.vision_tower.embeddings.position_embedding
    with torch.no_grad():
        embedding.weight[1:] = _sines(preset.grid, preset.width)
        embedding.weight[0] = 0
    _start_matching(model)
    return model


@torch.no_grad()
def _start_matching(model: LlavaForConditionalGeneration) -> None:
    """Set keys equal to queries, so that each token attends to those that resemble it.

    Once alignment has put visual tokens near the words that name them, a name in a question finds its thing in the
    picture. From random weights this look-up takes several times as many steps to form.
    """
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        attention.q_proj.weight.mul_(MATCH_GAIN)
        attention.k_proj.weight.copy_(attention.q_proj.weight)


def _sines(grid: int, width: int) -> torch.Tensor:
    """[grid², width]: rows in the first half of the channels, columns in the second, each of norm POSITION_NORM."""
    quarter = width // 4
    place = torch.arange(grid, dtype=torch.float32)
    angles = place[:, None] * (1 / 100 ** (torch.arange(quarter) / quarter))  # [grid, quarter]
    waves = torch.cat([angles.sin(), angles.cos()], -1)  # [grid, width / 2]
    rows = waves[:, None].expand(grid, grid, -1)
    columns = waves[None].expand(grid, grid, -1)
    table = torch.cat([rows, columns], -1).reshape(grid * grid, width)
    return table * (POSITION_NORM / table.norm(dim=-1, keepdim=True))


def make_processor(preset: Preset) -> LlavaProcessor:
    """CLIP's image processing (Pillow) with the reference tokenizer."""
    size = {"height": preset.image, "width": preset.image}
    images = CLIPImageProcessorPil(size={"shortest_edge": preset.image}, crop_size=size)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=make_tokenizer(),
        patch_size=preset.patch,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
