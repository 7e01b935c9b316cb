"""Salient tokens, tokens like the question, and the rest merged into centres and one token, counted by outliers."""

from __future__ import annotations

import torch
from byhand import Entry, Hand, Reference, Seen, top
from torch import Tensor, nn
from torch.nn.functional import normalize

from methods.byhand.question import question_rows, similarity

SETTINGS = {"neighbours": (3, 2), "merged": 4}  # pictures of 25 patches, few of which are outliers among 20
BUILDS = ("llava_clip", "llava_next")  # with [CLS], and queries and keys that can be read by hand


def outliers(scores: list[float], k: int) -> int:
    """Local Outlier Factor above 1.5."""
    n = len(scores)
    near = [sorted((j for j in range(n) if j != i), key=lambda j: abs(scores[i] - scores[j]))[:k] for i in range(n)]
    last = [abs(scores[i] - scores[own[-1]]) for i, own in enumerate(near)]
    reach = [sum(max(last[j], abs(scores[i] - scores[j])) for j in own) / k + 1e-10 for i, own in enumerate(near)]
    return sum(sum(reach[i] / reach[j] for j in own) / k > 1.5 for i, own in enumerate(near))


@torch.no_grad()
def last_block(reference: Reference, sample: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """`[tiles, cells]` attention of [CLS], all heads as one, and `[tiles, cells, C]` keys, of all pictures."""
    model, seen = reference.eager.model, {}
    attention = model.vision_tower.encoder.layers[-1].self_attn

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            seen[name] = output

        return hook

    hooks = [getattr(attention, name).register_forward_hook(keep(name)) for name in ("q_proj", "k_proj")]
    model.get_image_features(**{k: v for k, v in sample.items() if k in ("pixel_values", "image_sizes")})
    for hook in hooks:
        hook.remove()
    q, k = seen["q_proj"], seen["k_proj"]
    row = (q[:, :1] @ k.transpose(1, 2) / k.shape[-1] ** 0.5).softmax(-1)[:, 0, 1:]
    return row, k[:, 1:]


@torch.no_grad()
def by_hand(
    reference: Reference, sample: dict[str, Tensor], entry: Entry, *, neighbours: tuple[int, int], merged: int
) -> Hand:
    question = question_rows(reference, sample, entry)
    rows, keys = last_block(reference, sample) if entry.items else (torch.empty(0), torch.empty(0))
    embeds, stay = entry.embeds.clone(), torch.ones(entry.embeds.shape[1], dtype=torch.bool)
    held = entry.held.clone()
    tile = 0
    for number, (item, content, cells) in enumerate(zip(entry.items, entry.content, entry.cells, strict=True)):
        tiles = len(reference.vision(sample).features[number])
        a = rows[tile : tile + tiles].flatten()[cells]
        k = normalize(keys[tile : tile + tiles].flatten(0, 1)[cells], dim=-1)
        tile += tiles
        x, n = entry.embeds[0, content], len(content)
        s = similarity(x, question.mean(0, keepdim=True))[:, 0] / 768**0.5
        salient = top(a, int(n * (outliers(a.tolist(), neighbours[0]) / n)))
        hidden = s.clone()
        hidden[salient] = s.min()
        asked = int((n - len(salient)) * (outliers(hidden.tolist(), neighbours[0]) / n))
        hidden[salient] = -9
        main = sorted({*salient.tolist(), *top(hidden, asked).tolist()})
        rest = [j for j in range(n) if j not in main]
        count = int(len(main) * (outliers(a[rest].tolist(), neighbours[1]) / len(rest)))
        centres = sorted(rest, key=lambda j: -float(a[j]))[: min(count, len(rest))]
        made = [x[j] for j in main]
        for c in centres:
            others = [j for j in rest if j != c]
            others = sorted(others, key=lambda j: -float(k[c] @ k[j] + 50 * s[j]))[:merged]
            made.append(x[c] + sum(a[j] * x[j] for j in others))
        last = [j for j in rest if j not in centres]
        stands = [*main, *centres]
        if last:
            made.append(sum(a[j] * x[j] for j in last))
            stands.append(max(last, key=lambda j: float(a[j])))
        # The first places of the picture, each row at the position of the token that it stands for.
        stay[item] = False
        places = content[: len(made)]
        stay[places] = True
        embeds[0, places] = torch.stack(made)
        held[places] = content[torch.tensor(stands)]
    return Hand(entry, {0: lambda seen: Seen(embeds[:, stay], held[stay])})
