"""Questions by hand: which tokens they have, and how similar tokens of pictures are to them."""

from __future__ import annotations

from typing import Any

from byhand import Entry, Reference
from torch import Tensor
from torch.nn.functional import normalize


def question_rows(reference: Reference, sample: dict[str, Tensor], entry: Entry) -> Tensor:
    """`[m, D]` the embeddings of what stands behind the last picture, less the special tokens of the configuration."""
    ids = sample["input_ids"][0].tolist()
    start = int(entry.items[-1][-1]) + 1 if entry.items else 0
    behind = list(range(start, len(ids))) or [len(ids) - 1]
    named = [i for i in behind if ids[i] not in special(reference.model.config.to_dict())]
    return entry.embeds[0, named or behind]


def special(config: dict[str, Any]) -> set[int]:
    found: set[int] = set()
    for name, value in config.items():
        if isinstance(value, dict):
            found |= special(value)
        elif "token_id" in str(name) or "token_index" in str(name):
            found |= set(value) if isinstance(value, list) else {value}
    return found


def similarity(rows: Tensor, question: Tensor) -> Tensor:
    """`[N, m]`."""
    return normalize(rows, dim=-1) @ normalize(question, dim=-1).T
