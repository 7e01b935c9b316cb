"""Training of a text model on the recall tasks: packed rows, and the loss of a step.

A row is a context with many questions behind it, `question answer question answer …`, so that one context gives many
answers to learn from. A model that answers them has read the context before it knew the question.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from winnow.learn.packing import IGNORED
from winnow.world.recall import COPIED, COUNTS, CUE, SPAN, TASKS, Asked, Recall, draw
from winnow.world.recall_words import BOS, FILLER_IDS, NAME_IDS, PAD, VALUE_IDS, WORD_ID, ids

ECHO = "echo"  # a task of training only
ECHOED = 8  # different words in it
FILLER_WEIGHT = 0.3  # of the mean loss of filler words, next to that of answers
_FIRST_FILLER = FILLER_IDS[0]
_LONGEST = {"needle": 8, "several": 8, "pairs": 4, "copy": SPAN + 2}  # tokens of one fact
_QUESTION = {"needle": 8, "several": 8, "pairs": 4, "copy": COPIED + 4}  # tokens of a question with its answer


@dataclass(frozen=True)
class Texts:
    """What rows a stage draws: tasks with weights, lengths of contexts, and how densely they are written.

    Attributes:
        lengths: tokens of a context; one for each batch.
        full: the most of a context, as a share, that facts may take.
        room: tokens behind the context, for questions.
    """

    tasks: Mapping[str, float]
    lengths: tuple[int, ...]
    full: float = 0.5
    room: int = 96

    def sample(self, seed: int, length: int, rng: random.Random) -> Recall:
        """One context, with as many questions as there is room for."""
        task = rng.choices(list(self.tasks), list(self.tasks.values()))[0]
        if task == ECHO:
            return echo(rng, min(length, self.room - 2))
        if task == "filler":
            return draw(task, seed, length)
        most = 1 if task == "needle" else max(1, int(self.full * length / _LONGEST[task]))
        facts = rng.randint(1, min(most, 2 * COUNTS[task][0]))
        return draw(task, seed, length, facts=facts, asks=min(facts, self.room // _QUESTION[task]))


def echo(rng: random.Random, length: int) -> Recall:
    """A few random words in random order, and the question to say all again: nearly every token teaches to look up.

    As the words come back, the last one does not say what followed; the last two or three do. The answer is cut into
    pieces, so that the accuracy of "copy" counts some right before all are.
    """
    said = tuple(rng.choices(rng.sample(NAME_IDS + VALUE_IDS, ECHOED), k=length - 1))
    asked = [Asked((*ids("?", "repeat"), *said[:CUE]), said[CUE : CUE + COPIED], ())]
    asked += [Asked((), said[at : at + COPIED], ()) for at in range(CUE + COPIED, len(said), COPIED)]
    return Recall("copy", (*ids(BOS), *said), tuple(asked))


@dataclass
class Rows:
    """Packed rows, all [B, T]: `labels` holds the next token where there is something to learn.

    `kind` is the index of the task where a label is part of an answer (-1 elsewhere), `number` that of the question.
    """

    ids: Tensor
    labels: Tensor
    kind: Tensor
    number: Tensor


def make_rows(texts: Texts, first_seed: int, tokens: int) -> Rows:
    """As many rows as fit into `tokens`, of consecutive training seeds."""
    rng = random.Random(first_seed)
    length = rng.choice(texts.lengths)
    count = max(1, tokens // (length + texts.room))
    return pack([texts.sample(first_seed + i, length, rng) for i in range(count)])


def pack(samples: list[Recall]) -> Rows:
    """Each sample as one row, filled up with `<pad>` on the right."""
    made = [_row(sample) for sample in samples]
    longest = max(len(row[0]) for row in made)
    fills = (WORD_ID[PAD], IGNORED, -1, -1)
    columns = [
        torch.tensor([row[part] + [fill] * (longest - len(row[part])) for row in made])
        for part, fill in enumerate(fills)
    ]
    return Rows(*columns)


def _row(sample: Recall) -> tuple[list[int], list[int], list[int], list[int]]:
    read = list(sample.context)
    # What facts say cannot be predicted where it is said first; filler can.
    labels = [word if word >= _FIRST_FILLER else IGNORED for word in read[1:]]
    kind, number = [-1] * len(labels), [-1] * len(labels)
    for place, asked in enumerate(sample.asked):
        read += asked.question + asked.answer
        silent, said = len(asked.question), len(asked.answer)
        labels += [IGNORED] * silent + list(asked.answer)
        kind += [-1] * silent + [TASKS.index(sample.task)] * said
        number += [-1] * silent + [place] * said
    return read, [*labels, IGNORED], [*kind, -1], [*number, -1]


def causal_mask(tokens: int, device: torch.device) -> Tensor:
    """Additive mask [1, 1, N, N] in bfloat16."""
    return torch.full((tokens, tokens), -1e4, dtype=torch.bfloat16, device=device).triu(1)[None, None]


def step(model: LlamaForCausalLM, rows: Rows) -> tuple[Tensor, dict[str, float], Tensor]:
    """The loss of a batch, its parts, and questions right and asked by task [tasks, 2].

    Each task counts as much as the others in the loss of answers: most answer tokens are copies.
    """
    device = model.device
    with torch.autocast(device.type, torch.bfloat16):
        hidden = model.model(
            rows.ids.to(device), attention_mask=causal_mask(rows.ids.shape[1], device), use_cache=False
        ).last_hidden_state
    learned = rows.labels != IGNORED
    logits = hidden[learned.to(device)].float() @ model.model.embed_tokens.weight.float().t()
    losses = F.cross_entropy(logits, rows.labels[learned].to(device), reduction="none")
    answers = (rows.kind[learned] >= 0).to(device)
    parts: dict[str, float] = {}
    loss = logits.sum() * 0
    for name, chosen, weight in (("answer", answers, 1.0), ("filler", ~answers, FILLER_WEIGHT)):
        if chosen.any():
            mean = losses[chosen].mean() if name == "filler" else _even(losses, rows.kind[learned])
            loss = loss + weight * mean
            parts[name] = mean.item()
    predicted = torch.full_like(rows.labels, IGNORED)
    predicted[learned] = logits.argmax(-1).cpu()
    return loss, parts, right_by_task(predicted, rows)


def _even(losses: Tensor, kind: Tensor) -> Tensor:
    """The mean over tasks of the mean loss of their tokens, from losses and kinds [N] of what is learned."""
    means = [losses[(kind == task).to(losses.device)].mean() for task in kind[kind >= 0].unique().tolist()]
    return torch.stack(means).mean()


def right_by_task(predicted: Tensor, rows: Rows) -> Tensor:
    """[tasks, 2]: questions with all tokens of the answer right, and questions asked, from next-token ids [B, T]."""
    counted = rows.kind >= 0
    row = torch.arange(len(rows.ids))[:, None].expand_as(rows.ids)
    key = (row * (int(rows.number.max()) + 1) + rows.number)[counted]
    questions, inverse = key.unique(return_inverse=True)
    misses = torch.zeros(len(questions)).index_add_(0, inverse, (predicted != rows.labels)[counted].float())
    kinds = torch.zeros(len(questions), dtype=torch.long).index_copy_(0, inverse, rows.kind[counted])
    out = torch.zeros(len(TASKS), 2)
    out[:, 0].index_add_(0, kinds, (misses == 0).float())
    out[:, 1].index_add_(0, kinds, torch.ones(len(questions)))
    return out
