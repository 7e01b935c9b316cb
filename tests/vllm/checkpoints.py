"""Tiny checkpoints of the classes that the plug-in serves, with tokenizer and processor, for vLLM to read from disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = (
    *("what", "is", "in", "the", "picture", "?", "a", "red", "dog", "left", "right", "of", "user", "assistant", ":"),
    *("<0.2", "<0.8", "<1.5", "seconds>"),  # before frames of Qwen3-VL
    *(f"Frame{number}:" for number in range(1, 7)),  # before those of InternVL
)
VOCABULARY = 128
CHAT = (
    "{{% for m in messages %}}{{{{ m['role'] }}}} {{% for c in m['content'] %}}{{% if c['type'] == 'image' %}}{image} "
    "{{% elif c['type'] == 'video' %}}{video} {{% else %}}{{{{ c['text'] }}}} {{% endif %}}{{% endfor %}}{{% endfor %}}"
    "assistant :"
)
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 32,
    "tie_word_embeddings": False,
}
QWEN_TEXT = {name: value for name, value in TEXT.items() if name != "head_dim"}
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
PINPOINTS = [[56, 112], [112, 56], [112, 112]]
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_IMAGE = "<|vision_start|> <|image_pad|> <|vision_end|>"
QWEN_VIDEO = QWEN_IMAGE.replace("image", "video")


@dataclass(frozen=True)
class Checkpoint:
    """A class and how it is made.

    Attributes:
        make: the model and its processor.
        image, video: what stands for a picture or a video in a prompt.
        embedding: the scale of its random token embeddings.
        nested: whether its processor takes a list of pictures for each prompt.
    """

    make: Callable[[], tuple[Any, Any]]
    image: str = "<image>"
    video: str = "<video>"
    embedding: float = 1.0
    nested: bool = False


def tokenizer(special: Sequence[str], **named: str) -> Any:
    """A tokenizer of whole words."""
    base = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    words = [*base.values(), *special, *WORDS]
    table = {word: number for number, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(table, unk_token=words[0]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    extra = {"extra_special_tokens": named} if named else {"additional_special_tokens": list(special)}
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, **base, **extra)


def _llava(tower: Any, cls: bool) -> tuple[Any, Any]:
    config = hf.LlavaConfig(
        vision_config=tower,
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if cls else "full",
        tie_word_embeddings=False,
    )
    size = {"height": 112, "width": 112}
    image = hf.CLIPImageProcessor(size={"shortest_edge": 112}, crop_size=size)
    processor = hf.LlavaProcessor(
        image_processor=image,
        tokenizer=tokenizer(["<image>"]),
        patch_size=14,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(cls),
    )
    return hf.LlavaForConditionalGeneration(config), processor


def llava() -> tuple[Any, Any]:
    return _llava(hf.CLIPVisionConfig(**TOWER | {"image_size": 112}, projection_dim=64), True)


def llava_siglip() -> tuple[Any, Any]:
    return _llava(hf.SiglipVisionConfig(**TOWER | {"image_size": 112}, vision_use_head=False), False)


def llava_next() -> tuple[Any, Any]:
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER, projection_dim=64),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=4,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    image = hf.LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS
    )
    processor = hf.LlavaNextProcessor(
        image_processor=image,
        tokenizer=tokenizer(["<image>"]),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return hf.LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER),
        text_config=hf.Qwen2Config(**QWEN_TEXT),
        image_token_index=4,
        video_token_index=5,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    size = {"height": 56, "width": 56}
    processor = hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        video_processor=hf.LlavaOnevisionVideoProcessor(size=size),
        tokenizer=tokenizer(["<image>", "<video>"]),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def _qwen(config: Any, model: Any, processor: Any, video: Any, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    words = tokenizer(QWEN_TOKENS)
    start, end, image, video_pad = (words.convert_tokens_to_ids(token) for token in QWEN_TOKENS)
    made = config(
        text_config=QWEN_TEXT | {"rope_parameters": MROPE} | text,
        vision_config={
            "depth": 4,
            "num_heads": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **vision,
        },
        image_token_id=image,
        video_token_id=video_pad,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    pixels = hf.Qwen2VLImageProcessor(patch_size=14, min_pixels=56 * 56, max_pixels=28 * 28 * 400)
    return model(made), processor(
        image_processor=pixels,
        tokenizer=words,
        video_processor=video(
            patch_size=14,
            size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 400},
            image_mean=pixels.image_mean,  # vLLM normalises pictures and videos alike
            image_std=pixels.image_std,
        ),
        chat_template=CHAT.format(image=QWEN_IMAGE, video=QWEN_VIDEO),
    )


def qwen2_vl() -> tuple[Any, Any]:
    vision = {"embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2}
    return _qwen(
        hf.Qwen2VLConfig,
        hf.Qwen2VLForConditionalGeneration,
        hf.Qwen2VLProcessor,
        hf.Qwen2VLVideoProcessor,
        {},
        vision,
    )


def qwen2_5_vl() -> tuple[Any, Any]:
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "window_size": 56,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": 128,
    }
    return _qwen(
        hf.Qwen2_5_VLConfig,
        hf.Qwen2_5_VLForConditionalGeneration,
        hf.Qwen2_5_VLProcessor,
        hf.Qwen2VLVideoProcessor,
        {},
        vision,
    )


def qwen3_vl() -> tuple[Any, Any]:
    vision = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "out_hidden_size": 128,
        "deepstack_visual_indexes": [1, 2],
        "num_position_embeddings": 64,
    }
    text = TEXT | {"rope_parameters": MROPE | {"mrope_interleaved": True}}
    return _qwen(
        hf.Qwen3VLConfig,
        hf.Qwen3VLForConditionalGeneration,
        hf.Qwen3VLProcessor,
        hf.Qwen3VLVideoProcessor,
        text,
        vision,
    )


def internvl() -> tuple[Any, Any]:
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer(list(names.values()), **names)
    config = hf.InternVLConfig(
        vision_config=TOWER | {"image_size": [56, 56], "patch_size": [14, 14]},
        text_config=hf.Qwen2Config(**QWEN_TEXT),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    size = {"height": 56, "width": 56}
    processor = hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer=words,
        video_processor=hf.InternVLVideoProcessor(size=size),
        image_seq_length=4,
    )
    return hf.InternVLForConditionalGeneration(config), processor


def _idefics(config: Any, model: Any, processor: Any, image: Any, **more: Any) -> tuple[Any, Any]:
    marks = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    words = tokenizer(["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *marks])
    made = config(
        vision_config=dict(TOWER),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=3,
    )
    pixels = image(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    return model(made), processor(image_processor=pixels, tokenizer=words, image_seq_len=4, **more)


def idefics3() -> tuple[Any, Any]:
    return _idefics(
        hf.Idefics3Config, hf.Idefics3ForConditionalGeneration, hf.Idefics3Processor, hf.Idefics3ImageProcessor
    )


def smolvlm() -> tuple[Any, Any]:
    size = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
    return _idefics(
        hf.SmolVLMConfig,
        hf.SmolVLMForConditionalGeneration,
        hf.SmolVLMProcessor,
        hf.SmolVLMImageProcessor,
        video_processor=hf.SmolVLMVideoProcessor(**size, num_frames=4, fps=1),
    )


def gemma3() -> tuple[Any, Any]:
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = tokenizer([*names.values(), "\n", "\n\n", "\n\n\n", "\n\n\n\n"], **names)
    ids = {name: words.convert_tokens_to_ids(token) for name, token in names.items()}
    config = hf.Gemma3Config(
        vision_config=TOWER | {"image_size": 112, "vision_use_head": False},
        text_config=TEXT | {"tie_word_embeddings": True, "sliding_window": 512},
        mm_tokens_per_image=16,
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        image_token_index=ids["image_token"],
    )
    image = hf.Gemma3ImageProcessor(size={"height": 112, "width": 112})
    processor = hf.Gemma3Processor(image_processor=image, tokenizer=words, image_seq_length=16)
    return hf.Gemma3ForConditionalGeneration(config), processor


CHECKPOINTS = {
    "llava": Checkpoint(llava),
    "llava_siglip": Checkpoint(llava_siglip),
    "llava_next": Checkpoint(llava_next),
    "llava_onevision": Checkpoint(llava_onevision),
    "qwen2_vl": Checkpoint(qwen2_vl, QWEN_IMAGE, QWEN_VIDEO),
    "qwen2_5_vl": Checkpoint(qwen2_5_vl, QWEN_IMAGE, QWEN_VIDEO),
    "qwen3_vl": Checkpoint(qwen3_vl, QWEN_IMAGE, QWEN_VIDEO),
    "internvl": Checkpoint(internvl, "<IMG_CONTEXT>"),
    "idefics3": Checkpoint(idefics3, nested=True),
    "smolvlm": Checkpoint(smolvlm, nested=True),
    "gemma3": Checkpoint(gemma3, "<start_of_image>", embedding=0.01, nested=True),
}


def model_and_processor(name: str) -> tuple[Any, Any]:
    """A model with weights that make what is said depend on the picture, the same each time, and its processor."""
    made = CHECKPOINTS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = made.make()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, own in model.named_parameters():
            if "newline" in key:
                own.normal_(0, 1, generator=generator)
            elif own.ndim >= 2 and "norm" not in key:
                scale = 0.05 if own.ndim > 2 else 1.5 / own.shape[-1] ** 0.5
                own.normal_(0, made.embedding if "embed_tokens" in key else scale, generator=generator)
    processor.chat_template = CHAT.format(image=made.image, video=made.video)
    return model.float().eval(), processor


def write(name: str, folder: Path) -> Path:
    """Write a checkpoint; where it lies."""
    path = folder / name
    model, processor = model_and_processor(name)
    model.save_pretrained(path)
    if name != "internvl":
        _rename_tower(path / "model.safetensors")
    processor.save_pretrained(path)
    processor.tokenizer.save_pretrained(path)
    return path


def _rename_tower(path: Path) -> None:
    """Give CLIP and SigLIP towers the names that published checkpoints have, and that vLLM reads."""
    parts = "embeddings|encoder|pre_layrnorm|post_layernorm|head"
    tensors = {
        re.sub(rf"vision_tower\.(?=(?:{parts})\.)", "vision_tower.vision_model.", name): x
        for name, x in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
