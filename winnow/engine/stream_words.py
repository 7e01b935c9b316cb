"""The words around the frames of a stream: what a chat template writes for a message of pictures and a question."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.models.inputs import check_question, placeholder, prompt

MARK = "winnowquestion"


@dataclass(frozen=True, eq=False)
class Words:
    """The text before the first frame, between two frames, and behind the last one.

    Attributes:
        before, between: token ids.
        placeholder: of a picture.
    """

    processor: Any
    before: tuple[int, ...]
    between: tuple[int, ...]
    placeholder: int

    @staticmethod
    def of(processor: Any, placeholder: int) -> "Words":
        """The words of a processor.

        Raises:
            WinnowError: its template writes no message of two pictures.
        """
        before, between, _ = _parts(processor, placeholder, MARK, 2)
        return Words(processor, before, between, placeholder)

    def question(self, text: str) -> tuple[int, ...]:
        """What stands behind the last frame."""
        check_question(self.processor, text)
        return _parts(self.processor, self.placeholder, text, 1)[-1]

    def plain(self, text: str) -> tuple[int, ...]:
        """Words between frames."""
        check_question(self.processor, text)
        return tuple(self.processor.tokenizer(text, add_special_tokens=False).input_ids)

    def frame(self, picture: Any) -> tuple[Int[Tensor, " n"], dict[str, Tensor]]:
        """The tokens of a frame, separators included, and what else the model is given of it."""
        made = dict(self.processor(images=picture, text=placeholder(self.processor, "image"), return_tensors="pt"))
        ids = made.pop("input_ids")[0]
        at = (ids == self.placeholder).nonzero()[:, 0]
        if not len(at):
            raise WinnowError(
                f"{type(self.processor).__name__} wrote no placeholder for a picture; use the processor of this model."
            )
        rest = {name: value for name, value in made.items() if isinstance(value, Tensor)}
        for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
            rest.pop(name, None)
        return ids[int(at[0]) : int(at[-1]) + 1], rest

    def text(self, ids: Tensor) -> str:
        """What an answer says."""
        found: str = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return found.strip()


def _parts(processor: Any, placeholder: int, question: str, pictures: int) -> tuple[tuple[int, ...], ...]:
    """The text of a message, cut at its pictures."""
    ids = torch.tensor(processor.tokenizer(prompt(processor, question, count=pictures)).input_ids)
    cuts = (ids == placeholder).nonzero()[:, 0].tolist()
    if len(cuts) != pictures:
        raise WinnowError(
            f"the prompt of {type(processor).__name__} for {pictures} pictures has {len(cuts)} placeholders; use the "
            "processor of this model, or feed what it makes (input_ids and pixels) without processor=."
        )
    edges = [-1, *cuts, len(ids)]
    return tuple(tuple(ids[a + 1 : b].tolist()) for a, b in itertools.pairwise(edges))
