"""Clips for connectors, each encoded once by the frozen video reference model, with questions that it can answer."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from winnow.bench.clips import FRAMES, SIDE
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.step import Step
from winnow.core.view import View
from winnow.engine.compress import compress
from winnow.engine.question import QuestionReader, special_ids
from winnow.engine.spans import question_span, template_suffix
from winnow.learn import attention
from winnow.learn.fitting import Record
from winnow.learn.video import tower_tokens
from winnow.reference import video
from winnow.reference.video import ASSISTANT, END, EOS, MERGE, PATCH, START, TOKEN_ID, VIDEO, patches, token_ids
from winnow.signals.question import Question, QuestionSignal
from winnow.world.clips import FPS, Clip, ClipQuestion, clip

# By the card of the video reference model; of the others a method could not show what it is worth.
LEARNED = ("presence", "color", "order", "motion", "cause", "when", "needle")
FIRST = 1 << 44  # clips of the train split from this seed on: the shipped model has seen none of them
APART = 1 << 32  # seeds of clips between two seeds of a run
PER_TYPE = 2  # questions of one type about a clip, at most
GRID = (FRAMES // FPS, (SIDE // (PATCH * MERGE)) ** 2)  # seconds, and tokens of one


class Asked(NamedTuple):
    """A question about a clip.

    Attributes:
        seconds: of the clip, in which its evidence lies; none where the answer is that there is none.
    """

    type: str
    text: str
    answer: str
    seconds: Sequence[int] = ()


@dataclass(frozen=True, eq=False)
class Row:
    """A clip and what is asked behind it."""

    tokens: Float[Tensor, "v d"]
    asked: tuple[Asked, ...]


def drawn(start: int, end: int, seed: int = 0) -> Iterator[Clip]:
    """Clips of the training split, from a number to another."""
    first = FIRST + seed * APART
    for number in range(first + start, first + end):
        yield clip(number, FRAMES, SIDE, per_type=PER_TYPE, types=LEARNED)


class Frozen:
    """The video reference model, or another of `winnow train video`, without gradients of its own.

    Attributes:
        info: of the model, as methods see it.
        layout: of a clip's tokens.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        if folder is not None:
            check_model(Path(folder))
        self.model, self.processor = video.load(folder)
        self.model.requires_grad_(False)
        with compress(self.model, Plan(()), processor=self.processor) as handle:
            self.info = handle.info
        attention.use(self.model)  # in training faster than the fused kernel
        side = round(GRID[1] ** 0.5)
        self.layout = Layout.grid(side, side, GRID[0])
        self.suffix = template_suffix(self.processor)
        self.reader = QuestionReader(special_ids(self.model.config), self.processor.tokenizer)

    @torch.no_grad()
    def record(self, seen: Clip, questions: Iterable[ClipQuestion] | None = None) -> Record:
        """The tokens of a clip in half precision, and its questions (default: all) as JSON in bytes."""
        tokens = tower_tokens(self.model, patches(torch.from_numpy(seen.pixels)[None])[0]).flatten(0, 1)
        asked = [asked_of(q) for q in (seen.questions if questions is None else questions)]
        said = torch.frombuffer(bytearray(json.dumps(asked), "utf-8"), dtype=torch.uint8)
        return {"tokens": tokens.half(), "asked": said}

    def views(self, rows: Sequence[Row], step: Step, module: Any = None) -> Iterator[tuple[list[int], View]]:
        """What a step at `projected` is shown of these rows, those with signals of equal shapes together.

        Gives the numbers of the rows of a view, and the view.
        """
        shown = [step.signals(lambda signal, row=row: self._signal(signal, row)) for row in rows]  # type: ignore[misc]
        groups: dict[Any, list[int]] = {}
        for number, signals in enumerate(shown):
            groups.setdefault(tuple(x.shape for x in signals.values()), []).append(number)
        for own in groups.values():
            tokens = torch.stack([rows[i].tokens for i in own])
            ids = torch.arange(tokens.shape[1]).expand(len(own), -1)
            signals = {name: torch.stack([shown[i][name] for i in own]) for name in shown[own[0]]}
            yield own, View(tokens, self.layout, ids, tokens.shape[1], signals, module=module)

    def _signal(self, signal: Any, row: Row) -> Tensor:
        if not isinstance(signal, QuestionSignal) or signal.needs_text_encoder:
            raise UnsupportedError(
                f"{signal} is not recorded of clips; a connector is shown the projected tokens and signals of the "
                "question. Override `output` of its recipe."
            )
        behind = [TOKEN_ID[END], *token_ids(row.asked[0].text), TOKEN_ID[ASSISTANT]]
        start, end = question_span(behind, 0, len(behind), self.suffix)
        words = [behind[start + place] for place in self.reader.kept(behind[start:end], signal.words)]
        value: Tensor = signal.read(Question(self.model.get_input_embeddings()(torch.tensor(words)), row.tokens))
        return value


def rows_of(records: Sequence[Record], asks: bool, each: int | None = None, seed: Any = None) -> list[Row]:
    """The questions of clips behind their tokens.

    Args:
        asks: whether tokens depend on the question, so that it has a row of its own.
        each: so many questions of each clip at most, drawn at random.
        seed: of that choice.
    """
    rng, rows = random.Random(repr(seed)), []
    for record in records:
        tokens, asked = record["tokens"].float(), questions_of(record)
        if each is not None and len(asked) > each:
            asked = rng.sample(asked, each)
        rows += [Row(tokens, (one,)) for one in asked] if asks else [Row(tokens, tuple(asked))]
    return [row for row in rows if row.asked]


def asked_of(question: ClipQuestion) -> Asked:
    seconds = sorted({frame // FPS for frame, _ in question.evidence})
    return Asked(question.type, question.text, question.answer, seconds)


def evidence_of(rows: Sequence[Row]) -> Float[Tensor, "b t"]:
    """Shares of the seconds in which the evidence of each row's question lies; of all, where there is none."""
    seconds = [row.asked[0].seconds or range(GRID[0]) for row in rows]
    shown = torch.stack([torch.zeros(GRID[0]).index_fill(0, torch.tensor([*own]), 1) for own in seconds])
    return shown / shown.sum(1, keepdim=True)


def questions_of(record: Record) -> list[Asked]:
    return [Asked(*one) for one in json.loads(record["asked"].numpy().tobytes())]


def check_model(folder: Path) -> None:
    """Raise a WinnowError where this is not the folder of a model of winnow's clips."""
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        said = {}
    own = {"video_token_id": TOKEN_ID[VIDEO], "vision_start_token_id": TOKEN_ID[START], "eos_token_id": TOKEN_ID[EOS]}
    said = {**said, **said.get("text_config", {})}
    if any(said.get(name) != token for name, token in own.items()):
        raise WinnowError(
            f"{folder} holds no model that reads winnow's clips; give a folder of `winnow train video`, or none for "
            "the shipped model. Other checkpoints are not asked about clips yet."
        )
