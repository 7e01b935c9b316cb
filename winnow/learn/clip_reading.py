"""The language model of the video reference model on packed questions behind a clip, with positions of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from winnow.learn.packing import Pack, additive_mask
from winnow.reference.video import BOS, END, MERGE, START, TOKEN_ID, USER, VIDEO

BEFORE = tuple(TOKEN_ID[token] for token in (BOS, USER, START))  # the video's tokens, then END, then questions


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


def language(
    model: Qwen2_5_VLForConditionalGeneration,
    tokens: Tensor,
    index: Tensor,
    seconds: int,
    packed: Pack,
    look: int = 0,
) -> tuple[Tensor, Tensor]:
    """Hidden states [B, T, D] of packed questions behind a clip, and those of its tokens before layer `look`.

    Args:
        tokens: [B, V, D] of the whole clip.
        index: [B, M] ascending places of those that the language model gets, at their own positions.
    """
    seen = tokens.gather(1, index.to(tokens.device)[..., None].expand(-1, -1, tokens.shape[-1]))
    return read(model, seen, index, (seconds, tokens.shape[1] // seconds), packed, look=look)


def read(
    model: Qwen2_5_VLForConditionalGeneration,
    seen: Tensor,
    at: Tensor,
    grid: tuple[int, int],
    packed: Pack,
    *,
    there: Tensor | None = None,
    look: int = 0,
) -> tuple[Tensor, Tensor]:
    """Hidden states [B, T, D] of packed questions behind visual tokens, and those of the tokens before layer `look`.

    Args:
        seen: [B, M, D] what the language model gets for a clip, in the order in which it reads.
        at: [B, M] the tokens of the clip at whose positions these stand.
        grid: seconds of the clip, and tokens of one.
        there: [B, M] False for rows that pad; None: none does.
    """
    inner, device = model.model.language_model, seen.device
    batch, visual = at.shape
    before = len(BEFORE)
    table = places(model, *grid, 1 + int(packed.position.max()) + 1).to(device)
    end = before + grid[0] * grid[1]
    text = table[:, end + 1 + packed.position.to(device)]
    positions = torch.cat(
        [
            table[:, None, :before].expand(-1, batch, -1),
            table[:, before + at.to(device)],
            table[:, None, end : end + 1].expand(-1, batch, -1),
            text,
        ],
        2,
    )
    embed = inner.embed_tokens
    given = torch.tensor([*BEFORE, TOKEN_ID[END]], device=device).expand(batch, -1)
    around = embed(given)
    seen = seen.to(around.dtype)
    hidden = torch.cat([around[:, :before], seen, around[:, before:], embed(packed.ids.to(device))], 1)
    dtype = torch.bfloat16 if torch.is_autocast_enabled(device.type) else hidden.dtype
    mask = additive_mask(packed.segment.to(device), visual + before - 1, dtype)
    if there is not None:
        gone = torch.zeros(mask.shape[0], mask.shape[-1], dtype=torch.bool, device=device)
        gone[:, before : before + visual] = ~there.to(device)
        mask = mask.masked_fill(gone[:, None, None], -1e4)
    turns = inner.rotary_emb(hidden, positions)
    looked = seen
    for number, layer in enumerate(inner.layers):
        if number == look:
            looked = hidden[:, before : before + visual]
        hidden = layer(hidden, attention_mask=mask, position_ids=None, position_embeddings=turns)
    return inner.norm(hidden[:, before + visual + 1 :]), looked
