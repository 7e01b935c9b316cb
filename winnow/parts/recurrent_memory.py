"""A small causal model that reads a video clip by clip and hands a few memory tokens on (VideoStreaming)."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize, scaled_dot_product_attention

from winnow.core.select import comparable, ranked
from winnow.parts.cubes import sincos

SCALE = 10.0  # of cosines of clips, before a softmax over them
TRUNCATED = 4  # clips through which gradients flow back
TIME, MEMORY, FRAME, SUMMARY, INDICATOR, QUESTION = range(6)  # kinds of rows


def clips_of(frames: int, each: int) -> list[tuple[int, int]]:
    """From which frame to which each clip lasts: as few clips as there can be of at most `each`, about equally long."""
    count = -(-frames // each)
    return [(frames * i // count, frames * (i + 1) // count) for i in range(count)]


def groups_of(frames: int, groups: int) -> Float[Tensor, "g l"]:
    """The share of each frame of a clip in so many means over frames that follow each other."""
    part = torch.arange(frames) * groups // frames
    own = (part == torch.arange(groups)[:, None]).float()
    return own / own.sum(1, keepdim=True)


class Block(nn.Module):
    """A pre-norm layer in which rows see themselves and those before them."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def attended(self, x: Float[Tensor, "b n d"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[b, h, n, c]`."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        mixed = scaled_dot_product_attention(*self.attended(x), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norms[1](x))))


class RecurrentMemory(nn.Module):
    """Memory tokens and an indicator of each clip, and how well each indicator fits a question.

    Args:
        each: frames of a clip at most.
    """

    def __init__(self, width: int, dim: int, heads: int, depth: int, each: int) -> None:
        super().__init__()
        self.each = each
        self.given, self.norm_given, self.asked = nn.Linear(width, dim), nn.LayerNorm(width), nn.Linear(width, dim)
        self.kinds, self.blocks = (
            nn.Parameter(torch.zeros(6, dim)),
            nn.ModuleList(Block(dim, heads) for _ in range(depth)),
        )
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, width)

    def encoded(self, parts: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
        """What comes out for rows `[b, n, d]` of several kinds in a row, and what enters the last block."""
        x = torch.cat([rows + self.kinds[kind] for kind, rows in parts], 1)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.norm(self.blocks[-1](x)), x

    def clip(
        self,
        x: Float[Tensor, "b l p d"],
        memory: Float[Tensor, "b m e"],
        start: int,
        share: Float[Tensor, "s n"],
        place: Float[Tensor, "b p 2"],
    ) -> tuple[Float[Tensor, "b s e"], Float[Tensor, "b e"], Float[Tensor, "b s n"]]:
        """The memory behind a clip, its indicator, and how the memory attended to the clip's n tokens.

        Args:
            memory: behind the clip before it; no rows for the first.
            start: its first frame.
            share: of each token of the clip in what each memory token begins as.
        """
        b, frames, p, _ = x.shape
        e = self.kinds.shape[1]
        frame = torch.arange(frames, device=x.device, dtype=x.dtype)[:, None, None]
        at = torch.cat([frame.expand(b, frames, p, 1), place[:, None].expand(-1, frames, -1, -1)], -1)
        rows = (self.given(self.norm_given(x)) + sincos(at, e)).flatten(1, 2)
        ends = torch.tensor([start, start + frames, 0], device=x.device, dtype=x.dtype)
        time = sincos(ends.expand(b, 1, 3), e)
        summary = share @ rows
        nothing = rows.new_zeros(b, 1, e)
        out, last = self.encoded(
            [(TIME, time), (MEMORY, memory), (FRAME, rows), (SUMMARY, summary), (INDICATOR, nothing)]
        )
        s, first = summary.shape[1], 1 + memory.shape[1]
        top: Any = self.blocks[-1]
        q, k, _ = top.attended(last)
        seen = q[:, :, -1 - s : -1] @ k[:, :, first : first + rows.shape[1]].transpose(2, 3) / q.shape[-1] ** 0.5
        return out[:, -1 - s : -1], out[:, -1], seen.softmax(-1).mean(1)

    def asks(self, memory: Float[Tensor, "b m e"], question: Float[Tensor, "b q d"]) -> Float[Tensor, "b e"]:
        """The indicator of a question, with the memory of the whole video before it."""
        asked = self.asked(self.norm_given(question))
        at = torch.arange(asked.shape[1], device=asked.device, dtype=asked.dtype)
        where = sincos(torch.stack([at, at * 0, at * 0], 1), asked.shape[2])
        return self.encoded([(MEMORY, memory), (QUESTION, asked + where)])[0][:, -1]

    def memories(
        self, x: Float[Tensor, "b t p d"], share: Float[Tensor, "g p"], place: Float[Tensor, "b p 2"]
    ) -> tuple[Float[Tensor, "b k s e"], Float[Tensor, "b k e"], list[Tensor]]:
        """The memory behind each clip, its indicator, and for each clip how the memory attended to its tokens."""
        clips = clips_of(x.shape[1], self.each)
        least = min(end - start for start, end in clips)
        memory = x.new_zeros(len(x), 0, self.kinds.shape[1])
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for number, (start, end) in enumerate(clips):
            over = groups_of(end - start, least).to(x)
            both = torch.einsum("gl,sp->gslp", over, share).flatten(2).flatten(0, 1)
            memory = memory.detach() if number % TRUNCATED == 0 else memory
            found.append(self.clip(x[:, start:end], memory, start, both, place))
            memory = found[-1][0]
        kept, indicators, seen = zip(*found, strict=True)
        return torch.stack(kept, 1), torch.stack(indicators, 1), list(seen)

    def forward(
        self,
        x: Float[Tensor, "b t p d"],
        question: Float[Tensor, "b q d"],
        share: Float[Tensor, "g p"],
        place: Float[Tensor, "b p 2"],
    ) -> tuple[Float[Tensor, "b k s d"], Float[Tensor, "b k"], list[Tensor]]:
        """Tokens of the language model from the memory behind each clip, the cosine of each clip with the question, and
        for each clip how its memory attended to its tokens.

        Args:
            share: of each place of a frame in what each memory token of the frame begins as.
        """
        memory, indicators, seen = self.memories(x, share, place)
        asked = self.asks(memory[:, -1], question)
        scores = (normalize(indicators, dim=-1) * normalize(asked, dim=-1)[:, None]).sum(-1)
        return self.out(memory), scores, seen


def best_clips(scores: Float[Tensor, "b k"], count: int, last: bool) -> Int[Tensor, "b v"]:
    """The clips with the best scores, in order of time; the first among equals.

    Args:
        last: whether the last clip, whose memory has seen all others, is always one of them.
    """
    scores = comparable(scores)
    if last:
        scores = scores.index_fill(1, torch.tensor([scores.shape[1] - 1], device=scores.device), torch.inf)
    return ranked(scores)[:, :count].sort(1).values
