"""LangDC's captioner and its projector: first what chunks show in words, then answers from the states of these words.

In the second phase the captioner is frozen and given the true words, as in the paper; answers are measured with the
words that it says itself. The projector is also drawn to the language model's own embedding of each word, as large as
tokens of a clip are: so short a training would not find them through answers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from winnow.core.view import View
from winnow.learn.captioning import WORDS, captions
from winnow.learn.connectors import recipe
from winnow.learn.connectors.clips import GRID, rows_of
from winnow.learn.connectors.output import Output
from winnow.learn.fitting import Phase, Record
from winnow.methods.langdc import LangDC
from winnow.parts.captioner import START, STOP, Captioner, Said
from winnow.parts.chunks import Chunks, chunks_of
from winnow.reference.video import TOKEN_ID
from winnow.world.clips import Clip


class Recipe(recipe.Recipe):
    slug = "langdc"
    settings: ClassVar = {"most": 12, "every": 2}
    sizes: ClassVar = {"words": 66, "width": 96, "depth": 3, "heads": 4}
    clips, steps, batch, rate = 640, 200, 12, 3e-3
    described = 600  # steps of the first phase
    given: Tensor | None = None  # the true words of the rows at hand

    def record(self, seen: Clip) -> Record:
        return super().record(seen) | {"said": captions(seen.tracks, GRID[0], self.settings["every"], 12)}

    def output(self, module: Any, view: View) -> Output:
        method, chunks = cast(LangDC, self.method), chunks_of(view, self.settings["every"], self.slug)
        if self.given is None:
            return super().output(module, view)
        flat = self.given.flatten(0, 1)
        own = chunks.tokens.flatten(0, 1)
        soft, weights = module.told(*behind(chunks), pad(flat, (1, 0), value=START))
        counts = (flat != STOP).sum(1)
        each = (x.unflatten(0, (view.b, -1)) for x in (flat, counts, soft + weights @ own, weights))
        found = Output.of(method.laid(view, chunks, [Said(*one) for one in zip(*each, strict=True)]), view)
        return replace(found, losses={"words": self.named(soft, flat, view.tokens)})

    def named(self, tokens: Tensor, words: Tensor, seen: Tensor) -> Tensor:
        """How far tokens are from the language model's embeddings of their words, in sizes of tokens of a clip."""
        ids = torch.tensor([TOKEN_ID.get(word, 0) for word in WORDS])
        size = seen.pow(2).mean().sqrt()
        own = self.frozen.model.get_input_embeddings()(ids[words])
        wanted = own / own.pow(2).mean(-1, keepdim=True).sqrt() * size
        return ((tokens - wanted) / size).pow(2).mean(-1)[words != STOP].mean()

    def phases(self, records: Sequence[Record]) -> list[Phase]:
        (answers,) = super().phases(records)
        described = max(8, round(self.described * self.scale))
        return [
            Phase("words", described, 16, 2e-3, self._described),
            Phase("answers", answers.steps, answers.batch, answers.rate, self._told),
        ]

    def _described(self, module: Any, batch: list[int]) -> Tensor:
        return caption_loss(module, *self.spoken([self.records[i] for i in batch]))

    def _told(self, module: nn.Module, batch: list[int]) -> Tensor:
        """The loss of answers behind the true words."""
        own = [self.records[i] for i in batch if len(self.records[i]["asked"]) > 2]
        self.given = torch.stack([record["said"] for record in own])
        try:
            return self.answers(module, rows_of(own, self.asks, self.each, batch))
        finally:
            self.given = None

    def spoken(self, records: Sequence[Record]) -> tuple[Chunks, Tensor]:
        """The chunks of clips, and the true words of each."""
        tokens = torch.stack([record["tokens"] for record in records]).float()
        view = View.of(tokens, layout=self.frozen.layout)
        return chunks_of(view, self.settings["every"], self.slug), torch.cat([record["said"] for record in records])

    @torch.no_grad()
    def measure(self, module: Any, records: Sequence[Record]) -> dict[str, float]:
        """Beside the accuracy of answers, how many descriptions are right word for word."""
        chunks, true = self.spoken(records)
        said = module(*behind(chunks), self.settings["most"])
        right = (said.words == true).all(1).double().mean()
        words = said.counts.double().mean()
        return super().measure(module, records) | {"described": float(right), "words": float(words)}


def behind(chunks: Chunks) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks of all clips as one batch: tokens, places, and which there are."""
    return chunks.tokens.flatten(0, 1), chunks.place.flatten(0, 1), chunks.there.flatten(0, 1)


def caption_loss(module: Captioner, chunks: Chunks, words: Tensor) -> Tensor:
    """Cross-entropy of words and of the first stop behind them."""
    given = pad(words, (1, 0), value=START)
    states, _ = module.states(*behind(chunks), given)
    wanted = pad(words, (0, 1), value=STOP)
    ended = (wanted == STOP).cumsum(1) > 1
    return cross_entropy(module.logits(states).flatten(0, 1), wanted.masked_fill(ended, -100).flatten())
