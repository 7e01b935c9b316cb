"""Which tokens of a question count, and what signals of the question are shown."""

import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.core.errors import UnsupportedError, WinnowWarning
from winnow.core.signal import Signal
from winnow.engine.bound_model import BoundModel
from winnow.signals.question import Question

# How benchmarks tell models to answer, which asks for nothing in the picture.
INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
# Words that name nothing to be seen; the list of MMTok's code.
_ARTICLES_AND_LINKS = "a an the and or but so if then to for with by from at into onto upon"
_AUXILIARIES = "is are was were be been being have has had do does did"
_PRONOUNS = "it they he she we you i what where when why how who which question answer"
STOP_WORDS = frozenset(f"{_ARTICLES_AND_LINKS} {_AUXILIARIES} {_PRONOUNS}".split())


def warn_of_the_template(plan: Any) -> None:
    """Say what a plan that reads the question cannot know without a processor."""
    warnings.warn(
        f"{plan.plan} reads the question, and without a processor the words that a chat template puts behind it (as in "
        "'ASSISTANT:') count as part of it, and words that say nothing of the picture cannot be told from others. Pass "
        "processor= to winnow.compress, or spans= to handle.using.",
        WinnowWarning,
        stacklevel=5,
    )


class QuestionReader:
    """Tells which tokens of a question count.

    Args:
        special: token ids that never do.
        tokenizer: of the processor; without it, words cannot be told apart.
    """

    def __init__(self, special: Iterable[int] = (), tokenizer: Any = None) -> None:
        self.special = frozenset(special) | frozenset(getattr(tokenizer, "all_special_ids", ()))
        self.tokenizer = tokenizer

    @staticmethod
    def of(bound: BoundModel, processor: Any = None) -> "QuestionReader":
        """Special tokens are those that the model's configuration names, and those of the tokenizer."""
        tokenizer = getattr(processor, "tokenizer", processor)
        return QuestionReader(special_ids(bound.model.config), tokenizer if hasattr(tokenizer, "decode") else None)

    def kept(self, ids: Sequence[int], words: str) -> list[int]:
        """Places of the tokens that count; all of them where none would, and where ids are unknown (negative)."""
        places = [i for i, token in enumerate(ids) if token not in self.special]
        if not places or min(ids) < 0:
            return list(range(len(ids)))
        if words == "all" or self.tokenizer is None:
            return places
        named = self._named(ids, places, words)
        return named or places

    def _named(self, ids: Sequence[int], places: list[int], words: str) -> list[int]:
        """Those that are part of a word that counts."""
        shown = [len(self._text([ids[p] for p in places[: i + 1]])) for i in range(len(places))]
        ends = list(accumulate(shown, max))  # half a character may be shown as several
        text = self._text([ids[p] for p in places])
        out = [found.span() for line in INSTRUCTIONS for found in re.finditer(re.escape(line), text)]
        spans = [found.span() for found in re.finditer(r"\w+" if words == "content" else r"\S+", text)]
        left = [
            (start, end)
            for start, end in spans
            if not any(a <= start and end <= b for a, b in out)
            and (words != "content" or text[start:end].lower() not in STOP_WORDS)
        ]
        chosen = set()
        for start, end in left:
            first, last = bisect_right(ends, start), bisect_right(ends, end - 1)
            chosen.update(places[first : last + 1])
        return sorted(chosen)

    def text(self, ids: Sequence[int]) -> str:
        """Tokens in words.

        Raises:
            UnsupportedError: ids or the tokenizer are not known.
        """
        if self.tokenizer is None or min(ids) < 0:
            raise UnsupportedError(
                "the text tower reads the question in words; pass processor= to winnow.compress, and input_ids."
            )
        return self._text(ids).strip()

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


class Questions:
    """The questions of a forward.

    Args:
        reader: tells which tokens count.
        ids: `[B, S]` token ids, on the host; None where they are not known.
        spans: (start, end) of each row.
        embeds: gives `[m, D]` LM input embeddings of some tokens of a row.
        text_encoder: that was handed over, if one was.
    """

    def __init__(
        self,
        reader: QuestionReader,
        ids: Int[Tensor, "b s"] | None,
        spans: Sequence[tuple[int, int]],
        embeds: Callable[[int, Int[Tensor, " m"]], Float[Tensor, "m d"]],
        text_encoder: Any = None,
    ) -> None:
        self.reader, self.ids, self.spans, self.embeds = reader, ids, spans, embeds
        self.text_encoder = text_encoder
        self._found: dict[tuple[int, str], tuple[Tensor, list[int]]] = {}

    def tokens(self, row: int, words: str) -> tuple[Float[Tensor, "m d"], list[int]]:
        """Embeddings of the tokens that count, and their ids (−1 where they are not known)."""
        if (row, words) not in self._found:
            start, end = self.spans[row]
            ids = [-1] * (end - start) if self.ids is None else self.ids[row, start:end].tolist()
            kept = self.reader.kept(ids, words)
            places = torch.tensor(kept, dtype=torch.int64) + start
            self._found[row, words] = self.embeds(row, places), [ids[i] for i in kept]
        return self._found[row, words]

    def read(self, signal: Signal, row: int, rows: Float[Tensor, "n d"]) -> Tensor:
        """A signal of the question for an item of a row."""
        tokens, ids = self.tokens(row, signal.words)  # type: ignore[attr-defined]
        value = signal.read(Question(tokens, rows, lambda: self.reader.text(ids), self.text_encoder))
        return value.to(rows.device)


def special_ids(config: Any) -> set[int]:
    """The token ids that a configuration and its parts name."""
    found: set[int] = set()
    values = config.to_dict() if hasattr(config, "to_dict") else config
    for name, value in values.items():
        if isinstance(value, dict):
            found |= special_ids(value)
        elif str(name).endswith(("token_id", "token_index")):
            found.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    return found
