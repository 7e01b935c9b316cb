"""The video reference model: a small Qwen2.5-VL that reads winnow's clips, and how to ask it.

A measuring instrument like the reference models for pictures: it understands the clips and questions of
`winnow.world.clips` and nothing else. It is a plain `Qwen2_5_VLForConditionalGeneration`; only its inputs are made
here, because the processor of that class needs torchvision for videos.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from winnow.core.errors import WinnowError
from winnow.reference import vocabulary
from winnow.reference.build import MATCH_GAIN, ROPE_THETA
from winnow.reference.vocabulary import ASSISTANT, BOS, EOS, PAD, USER, ids_from
from winnow.world.clips.names import FPS

FOLDER = Path(__file__).parent / "video"
VIDEO, START, END = "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
_NEW_WORDS = "before change changes cuts does down enter enters first going last leaves times up view when"
SPECIAL = (*vocabulary.SPECIAL, VIDEO, START, END)
VOCABULARY = (
    *vocabulary.VOCABULARY,
    VIDEO,
    START,
    END,
    *(word for word in _NEW_WORDS.split() if word not in vocabulary.TOKEN_ID),
)
TOKEN_ID = {token: index for index, token in enumerate(VOCABULARY)}
CHAT_TEMPLATE = vocabulary.CHAT_TEMPLATE.replace("'image'", "'video'").replace("<image>\n", f"{START}{VIDEO}{END}")

PATCH, MERGE, FRAMES_OF_PATCH = 14, 2, 2
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_NEW_TOKENS = 4
BEFORE = tuple(TOKEN_ID[token] for token in (BOS, USER, START))  # then the tokens of the video, then END


@cache
def token_ids(text: str) -> tuple[int, ...]:
    """Token ids of a question or an answer, without special tokens; the same as the tokenizer gives."""
    return ids_from(TOKEN_ID, text)


def knows(word: str) -> bool:
    """Whether the model has a token for a word of a question, or two for a number of two digits."""
    return (word in TOKEN_ID and word not in SPECIAL) or (len(word) == 2 and word.isdigit())


def make_tokenizer() -> PreTrainedTokenizerFast:
    return vocabulary.make_tokenizer(TOKEN_ID, SPECIAL, CHAT_TEMPLATE, {"video_token": VIDEO})


def config(
    width: int = 192, depth: int = 3, tower_heads: int = 4, layers: int = 8, heads: int = 4, inner: int = 512
) -> Qwen2_5_VLConfig:
    """28 × 28 pixels and one second are a token; windows of 112 pixels in every other block of the tower."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": -(-len(VOCABULARY) // 16) * 16,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": ROPE_THETA,
                "mrope_section": _sections(width // heads),
            },
            "bos_token_id": TOKEN_ID[BOS],
            "eos_token_id": TOKEN_ID[EOS],
            "pad_token_id": TOKEN_ID[PAD],
        },
        vision_config={
            "depth": depth,
            "hidden_size": width,
            "out_hidden_size": width,
            "intermediate_size": inner,
            "num_heads": tower_heads,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES_OF_PATCH,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": list(range(1, depth, 2)),
        },
        image_token_id=TOKEN_ID[vocabulary.IMAGE],
        video_token_id=TOKEN_ID[VIDEO],
        vision_start_token_id=TOKEN_ID[START],
        vision_end_token_id=TOKEN_ID[END],
        tie_word_embeddings=True,
    )


def _sections(head: int) -> list[int]:
    """Three about equal shares of half a head."""
    third = head // 6
    return [head // 2 - 2 * third, third, third]


def make_model(sizes: Qwen2_5_VLConfig | None = None, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A fresh model whose language model starts by attending to what is alike, as the reference models for pictures."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(sizes or config())
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            attention.q_proj.weight.mul_(MATCH_GAIN)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
    return model


@torch.no_grad()
def take_language(model: Qwen2_5_VLForConditionalGeneration, pictures: LlavaForConditionalGeneration) -> None:
    """Begin with the language model of a reference model for pictures: its layers and the words that both know."""
    source = pictures.model.language_model
    own = model.model.language_model
    if source.config.hidden_size != own.config.hidden_size or len(source.layers) != len(own.layers):
        raise WinnowError(
            f"the model for pictures has {len(source.layers)} layers of width {source.config.hidden_size}, this one "
            f"{len(own.layers)} of {own.config.hidden_size}; take a preset of the same sizes"
        )
    known = len(vocabulary.VOCABULARY)
    words = source.embed_tokens.weight
    own.embed_tokens.weight[:known] = words[:known]
    new = own.embed_tokens.weight[known:]
    new.mul_(words[:known].norm(dim=-1).mean() / new.norm(dim=-1, keepdim=True).clamp_min(1e-6))
    own.norm.load_state_dict(source.norm.state_dict())
    for layer, given in zip(own.layers, source.layers, strict=True):
        layer.load_state_dict(given.state_dict(), strict=False)  # its attention has no biases; here they stay 0
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            part.bias.zero_()


def patches(frames: Tensor) -> Tensor:
    """uint8 [B, T, S, S, 3] → normalised float [B, T/2, P, K]: the P patches of a second, unit by unit."""
    batch, count, side = frames.shape[:3]
    mean, std = (torch.tensor(values, device=frames.device) * 255 for values in (MEAN, STD))
    x = (frames.float() - mean) / std
    grid = side // (PATCH * MERGE)
    x = x.view(batch, count // FRAMES_OF_PATCH, FRAMES_OF_PATCH, grid, MERGE, PATCH, grid, MERGE, PATCH, 3)
    # batch, second, row, column of the unit, then of the patch in it, then channel, frame, pixels
    x = x.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)
    return x.reshape(batch, count // FRAMES_OF_PATCH, (grid * MERGE) ** 2, -1)


def places(model: Qwen2_5_VLForConditionalGeneration, seconds: int, cells: int, after: int) -> Tensor:
    """Positions [3, BEFORE + V + after] of the prefix, the tokens of a clip and `after` tokens behind it.

    They are asked of the model, since versions of transformers differ in where text goes on behind a video.
    """
    grid = round(cells**0.5) * MERGE
    ids = [*BEFORE, *[TOKEN_ID[VIDEO]] * (seconds * cells), *[TOKEN_ID[END]] * after]
    row = torch.tensor([ids])
    found, _ = model.model.get_rope_index(
        row,
        mm_token_type_ids=torch.where(row == TOKEN_ID[VIDEO], 2, 0),
        video_grid_thw=torch.tensor([[seconds, grid, grid]]),
        second_per_grid_ts=torch.ones(1),
        attention_mask=torch.ones_like(row),
    )
    return found[:, 0]


@dataclass(frozen=True)
class ClipProcessor:
    """What a processor is for the video reference model: clips and questions to what `model.generate` takes."""

    tokenizer: PreTrainedTokenizerFast

    def __call__(self, frames: np.ndarray | Tensor, question: str) -> dict[str, Tensor]:
        """One clip and one question.

        Args:
            frames: uint8 [T, S, S, 3], two a second, T even, S a multiple of 28.

        Raises:
            WinnowError: the frames are of another kind, or the question has words that the model does not know.
        """
        clip = _checked(torch.as_tensor(frames))
        asked = self.tokenizer(question, add_special_tokens=False).input_ids
        if not asked or any(token in self.tokenizer.all_special_ids for token in asked):
            raise WinnowError(
                f"the question {question!r} is empty or has words that the video reference model does not know; ask as "
                "`winnow.world.clips` does"
            )
        flat = patches(clip[None])[0]
        grid = clip.shape[1] // PATCH
        tokens = flat.shape[0] * flat.shape[1] // MERGE**2
        ids = torch.tensor([[*BEFORE, *[TOKEN_ID[VIDEO]] * tokens, TOKEN_ID[END], *asked, TOKEN_ID[ASSISTANT]]])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": torch.where(ids == TOKEN_ID[VIDEO], 2, 0),
            "pixel_values_videos": flat.flatten(0, 1),
            "video_grid_thw": torch.tensor([[len(flat), grid, grid]]),
            "second_per_grid_ts": torch.tensor([FRAMES_OF_PATCH / FPS]),
        }


def _checked(clip: Tensor) -> Tensor:
    unit = PATCH * MERGE
    if clip.dtype != torch.uint8 or clip.ndim != 4 or clip.shape[1] != clip.shape[2] or clip.shape[3] != 3:
        raise WinnowError(f"a clip of {clip.dtype} {tuple(clip.shape)} was given; give uint8 [frames, side, side, 3]")
    if not len(clip) or len(clip) % FRAMES_OF_PATCH or not clip.shape[1] or clip.shape[1] % unit:
        raise WinnowError(
            f"a clip of {len(clip)} frames of {clip.shape[1]} pixels was given; give an even number of frames and a "
            f"side that is a multiple of {unit}"
        )
    return clip


def path() -> Path:
    """The folder of the shipped model, for `from_pretrained`."""
    if not (FOLDER / "config.json").exists():
        raise WinnowError("the video reference model is not in this installation. Train it with `winnow train video`.")
    return FOLDER


def load(folder: str | Path | None = None) -> tuple[Qwen2_5_VLForConditionalGeneration, ClipProcessor]:
    """The model of a folder (default: the shipped one) in float32, ready to answer, and what makes its inputs."""
    folder = path() if folder is None else Path(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), ClipProcessor(PreTrainedTokenizerFast.from_pretrained(folder))


@torch.no_grad()
def answer(
    model: Qwen2_5_VLForConditionalGeneration, processor: ClipProcessor, frames: np.ndarray, question: str
) -> str:
    """Greedy decoding of one answer."""
    given: dict[str, Any] = {name: value.to(model.device) for name, value in processor(frames, question).items()}
    ids = model.generate(**given, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)  # type: ignore[misc]
    return str(processor.tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
