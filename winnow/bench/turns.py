"""Two questions about one picture, asked in turns on one cache: the first selection kept, or made again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from winnow.bench.intervals import Paired, Rate, paired, rate
from winnow.bench.meters import evidence_recall, judge, read_by_layer
from winnow.bench.requests import request
from winnow.bench.tasks import Ask, Task, open_world
from winnow.core.errors import WinnowError
from winnow.core.plan import FULL, Plan
from winnow.engine.compress import compress
from winnow.engine.handle import Handle
from winnow.engine.turns import TURNS
from winnow.models.inputs import placeholder

ANSWER = "winnowanswer"


@dataclass(frozen=True)
class Turned:
    """One way of asking the second question.

    Attributes:
        plan, turns: under which both were asked; turns is empty for the full model.
        first, second: accuracy of each turn.
        change: of the second turn, against the full model's in the same conversation.
        recall: evidence recall of the second question, mean.
        read: tokens that the second turn put through the language model's first layer, mean.
        right: whether each second question was answered right.
    """

    plan: str
    turns: str
    first: Rate
    second: Rate
    change: Paired | None
    recall: float
    read: float
    right: tuple[bool, ...]


def ask_in_turns(
    model: Any,
    processor: Any,
    plans: Sequence[str],
    pairs: Sequence[tuple[Ask, Ask]],
    *,
    max_new_tokens: int = 16,
    step: Callable[[], None] = lambda: None,
) -> list[Turned]:
    """Ask pairs of questions in turns: with the full model, and with each plan in both ways.

    Raises:
        WinnowError: the chat template has no second turn.
    """
    found: list[Turned] = []
    for plan, turns in [("", ""), *((plan, turns) for plan in plans for turns in TURNS)]:
        with compress(model, plan or Plan.of(FULL), processor=processor, turns=turns or "first") as handle:
            asked = []
            for pair in pairs:
                asked.append(_ask(handle, processor, pair, max_new_tokens))
                step()
        firsts, seconds, recalls, reads = zip(*asked, strict=True)
        change = paired(found[0].right, seconds) if found else None
        known = [recall for recall in recalls if recall is not None]
        found.append(
            Turned(
                plan, turns, rate(sum(firsts), len(pairs)), rate(sum(seconds), len(pairs)), change,
                sum(known) / len(known), sum(reads) / len(reads), tuple(seconds),
            )
        )  # fmt: skip
    return found


def _ask(
    handle: Handle, processor: Any, pair: tuple[Ask, Ask], max_new_tokens: int
) -> tuple[bool, bool, float | None, int]:
    task = Task({}, pair, open_world)
    first, second = (request(handle.model, processor, task, ask) for ask in pair)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "return_dict_in_generate": True}
    said = handle.model.generate(**first.inputs, **options)
    at = first.inputs["input_ids"].shape[1]
    one = _right(processor, said.sequences[0, at:], pair[0])
    ids = _continued(processor, said.sequences, pair)
    cache, past = said.past_key_values, said.past_key_values.get_seq_length()
    answer = handle.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
    two = _right(processor, answer.sequences[0, ids.shape[1] :], pair[1])
    ledger = handle.last
    if ledger is None or not ledger.items:
        raise WinnowError("the model read no picture in this conversation, so there is nothing to measure.")
    item = ledger.items[0]
    recall = evidence_recall(read_by_layer(item, len(ledger.layer_tokens)), item.layout, second.evidence)
    return one, two, recall, ids.shape[1] - (0 if "read_again" in ledger.notes else past)


def _right(processor: Any, ids: Tensor, ask: Ask) -> bool:
    return judge(processor.tokenizer.decode(ids, skip_special_tokens=True).strip(), ask.truth)[0]


def _continued(processor: Any, said: Tensor, pair: tuple[Ask, Ask]) -> Tensor:
    """`[1, S]` the conversation so far and the second question, as the chat template writes it behind an answer."""
    ids = processor.tokenizer(_second_turn(processor, pair), add_special_tokens=False)["input_ids"]
    if ids[:1] == [int(said[0, -1])]:  # the answer has ended already
        ids = ids[1:]
    return torch.cat([said, torch.tensor([ids], device=said.device)], 1)


def _second_turn(processor: Any, pair: tuple[Ask, Ask]) -> str:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": pair[0].text}]},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        {"role": "user", "content": [{"type": "text", "text": pair[1].text}]},
    ]
    try:
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except MemoryError:
        raise
    except Exception:  # a template is a program that comes with the checkpoint: it can fail in any way
        text = ""
    tail = text.partition(ANSWER)[2]
    if text.count(ANSWER) != 1 or pair[1].text not in tail or text.count(placeholder(processor)) != 1:
        raise WinnowError(
            f"The chat template of {type(processor).__name__} does not write a second question behind an answer; "
            "use a checkpoint whose template takes a conversation."
        )
    return str(tail)
