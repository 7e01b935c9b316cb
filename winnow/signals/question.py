"""Signals of the question: its tokens as they enter the language model, and how similar a picture is to them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from winnow.core.info import ModelInfo
from winnow.core.signal import Signal, Site

Words = Literal["all", "question", "content"]


@dataclass(frozen=True, eq=False)
class Question:
    """What a signal of the question is shown, for one item.

    Attributes:
        tokens: `[m, D]` LM input embeddings of the question's tokens; m ≥ 1.
        rows: `[N, D]` the item's content tokens, behind the projector.
        text: gives these tokens of the question in words.
        text_encoder: the text tower that was handed over, if one was.
    """

    tokens: Float[Tensor, "m d"]
    rows: Float[Tensor, "n d"]
    text: Callable[[], str] = str
    text_encoder: Any = None


@dataclass(frozen=True)
class QuestionSignal(Signal):
    """A signal of the question of the item's sample.

    Args:
        words: which tokens of the question count: `"all"` but special tokens; `"question"`, also without the usual
            instructions of benchmarks on how to answer; `"content"`, also without words that name nothing to be seen
            (articles, auxiliaries, pronouns, question words, some prepositions). Words are told apart by the
            tokenizer of the processor that `winnow.compress` was given; without one, all tokens but special ones
            count. Where nothing would be left, nothing is left out.
    """

    words: Words = "all"

    reads_text: ClassVar[bool] = True

    @property
    def reads_question(self) -> bool:
        return True

    def site(self, info: ModelInfo) -> Site:
        return Site("text")


@dataclass(frozen=True)
class QuestionTokens(QuestionSignal):
    """LM input embeddings of the question's tokens: `[b, m, D]`.

    Items whose questions differ in length are not in one view.
    """

    per: ClassVar[Literal["token", "item"]] = "item"

    def read(self, seen: Question) -> Float[Tensor, "m d"]:
        return seen.tokens

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        return torch.randn(b, 12, 32, generator=generator)


@dataclass(frozen=True)
class QuestionCosine(QuestionSignal):
    """Cosine of each token, as it is behind the projector, with the question's tokens: `[b, N, m]`, fp32.

    Args:
        words: see `QuestionSignal`.
        pool: `"tokens"` compares with each token of the question; `"mean"` with their mean, and m is 1.

    Items whose questions differ in length are not in one view.
    """

    pool: Literal["tokens", "mean"] = "tokens"

    def read(self, seen: Question) -> Float[Tensor, "n m"]:
        wide = torch.promote_types(seen.rows.dtype, torch.float32)
        tokens = seen.tokens.to(seen.rows.device, wide)
        if self.pool == "mean":
            tokens = tokens.mean(0, keepdim=True)
        return normalize(seen.rows.to(wide), dim=-1) @ normalize(tokens, dim=-1).T

    def sample(self, generator: torch.Generator, b: int, n: int) -> Tensor:
        m = 1 if self.pool == "mean" else 5
        return torch.rand(b, n, m, generator=generator) * 2 - 1
