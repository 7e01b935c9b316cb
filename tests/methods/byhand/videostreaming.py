"""A small causal model written out: memory of the clip before, time, tokens, summaries; and the clips that fit best."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from byhand import Entry, Hand, Reference, Seen, top
from torch import Tensor
from torch.nn.functional import gelu

from methods.byhand import frames_of, glorot
from methods.byhand.covipal import normed
from methods.byhand.kffocus import parts, sides_of
from methods.byhand.question import question_rows
from methods.byhand.quicksviewer import sines

SETTINGS = {"clip": 2, "per_frame": 3, "chosen": 2, "weights": "untrained"}
BUILDS = ("qwen2_5_vl", "llava_next_video")
# A picture is a clip of one frame.
ROWS = {
    "qwen2_5_vl": ("3 W 6", "9", "2 X 4 W 5", "4 A 2"),
    "llava_next_video": ("3 W 6", "9", "2 W 4 W 5"),
}
EXTRA = {"llava_next_video": (("3 X 6", "2 X 5"),)}
DIM, HEADS = 128, 4
TIME, MEMORY, FRAME, SUMMARY, INDICATOR, QUESTION = range(6)


def ran(x: Tensor, blocks: Sequence[Sequence[Tensor]]) -> Tensor:
    """Rows through layers in which each sees those before it."""
    for down, out, qkv, up in blocks:
        q, k, v = (normed(x) @ qkv.T).split(DIM, 1)
        heads = []
        for head in torch.arange(DIM).chunk(HEADS):
            logits = q[:, head] @ k[:, head].T / (DIM // HEADS) ** 0.5
            hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
            heads.append(logits.masked_fill(hidden, -torch.inf).softmax(1) @ v[:, head])
        x = x + torch.cat(heads, 1) @ out.T
        x = x + gelu(normed(x) @ up.T) @ down.T
    return normed(x)


def by_hand(
    reference: Reference,
    sample: dict[str, Tensor],
    entry: Entry,
    *,
    clip: int,
    per_frame: int,
    chosen: int,
    weights: str,
) -> Hand:
    width, text = entry.embeds.shape[-1], question_rows(reference, sample, entry)
    layer = [(DIM, 2 * DIM), (DIM, DIM), (3 * DIM, DIM), (2 * DIM, DIM)]
    asked, *rest = glorot([(DIM, width), *layer, *layer, (DIM, width), (6, DIM), (width, DIM)])
    blocks, (given, kinds, back) = (rest[:4], rest[4:8]), rest[8:]

    def act(seen: Sequence[Seen]) -> Seen:
        now = seen[-1]
        hidden, stay = now.hidden.clone(), torch.ones(len(now.held), dtype=torch.bool)
        for number, content in enumerate(entry.content):
            t, p = frames_of(sample, entry, number)
            h, w = sides_of(sample, entry, number, p)
            x = now.hidden[0, content].unflatten(0, (t, p))
            each, count = parts(min(per_frame, p), h, w), -(-t // clip)
            ends = [t * i // count for i in range(count + 1)]
            least = min(b - a for a, b in itertools.pairwise(ends))
            memory, kept, indicators, places = torch.zeros(0, DIM), [], [], []
            for start, end in itertools.pairwise(ends):
                rows = [
                    normed(x[f, i]) @ given.T + sines(f - start, *divmod(i, w), DIM)
                    for f in range(start, end)
                    for i in range(p)
                ]
                summaries, at = [], []
                for group in range(least):
                    frames = [f for f in range(end - start) if f * least // (end - start) == group]
                    for own in each:
                        summaries.append(torch.stack([rows[f * p + i] for f in frames for i in own]).mean(0))
                    at += [
                        (start + frames[0]) * p + round(j * (p - 1) / max(1, len(each) - 1)) for j in range(len(each))
                    ]
                inputs = [sines(start, end, 0, DIM)[None] + kinds[TIME], memory + kinds[MEMORY]]
                inputs += [
                    torch.stack(rows) + kinds[FRAME],
                    torch.stack(summaries) + kinds[SUMMARY],
                    kinds[INDICATOR][None],
                ]
                out = ran(torch.cat(inputs), blocks)
                memory = out[-1 - len(summaries) : -1]
                kept.append(memory)
                indicators.append(out[-1])
                places.append(at)
            words = torch.stack([normed(word) @ asked.T + sines(i, 0, 0, DIM) for i, word in enumerate(text)])
            question = ran(torch.cat([memory + kinds[MEMORY], words + kinds[QUESTION]]), blocks)[-1]
            fit = torch.stack([torch.cosine_similarity(own, question, dim=0) for own in indicators])
            stay[content] = False
            for k in top(fit, chosen).tolist():
                for at, row in zip(places[k], kept[k], strict=True):
                    hidden[0, content[at]], stay[content[at]] = row @ back.T, True
        return Seen(hidden[:, stay], now.held[stay])

    return Hand(entry, {0: act})
