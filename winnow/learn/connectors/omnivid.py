"""OmniVid's connector: it learns to name things, moments and boxes with a writer of its own, then to answer questions.

Two phases: words of `winnow.learn.grounding` with any number of queries; then these and the answers of the frozen
language model together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from winnow.bench.grounding import overlap
from winnow.core.view import View
from winnow.learn.connectors import recipe
from winnow.learn.connectors.output import Output
from winnow.learn.fitting import Phase, Record
from winnow.learn.grounding.tasks import (
    BOXES,
    MOST,
    PAD,
    SECONDS,
    SIDE,
    START,
    TASKS,
    TIMES,
    WORD_ID,
    WORDS,
    clip_record,
    clips_of,
)
from winnow.learn.grounding.writer import Writer
from winnow.methods.omnivid import OmniVid
from winnow.parts.chunks import chunks_of
from winnow.parts.transformer import Attention
from winnow.reference.video import TOKEN_ID
from winnow.world.clips import CLIP_GLYPHS, CLIP_SHAPES, Clip

FEWER = (1, 2, 4, 8)  # queries of a clip that it is trained and measured with


class Recipe(recipe.Recipe):
    slug = "omnivid"
    settings: ClassVar = {"queries": 4, "every": 2}
    sizes: ClassVar = {"width": 96, "queries": 8, "depth": 2, "fusion": 1, "heads": 4}
    clips, steps, batch, rate = 400, 200, 12, 3e-3
    named = 700  # steps of the first phase

    def make(self) -> nn.Module:
        return nn.ModuleDict({"connect": super().make(), "generate": Writer(len(WORDS), self.sizes["width"])})

    @torch.no_grad()
    def start(self, module: nn.Module) -> None:
        """What is alike is attended to and carried on as it is; names are words as the language model embeds them.

        So short a training would not find this from random matrices.
        """
        parts: Any = module
        for own in module.modules():
            if isinstance(own, Attention):
                same = torch.eye(own.q.in_features)
                own.q.weight.copy_(same)
                own.kv.weight.copy_(torch.cat([same, same]))
                own.out.weight.copy_(same / 2)
        parts["connect"].leave.weight.zero_()
        table: Any = self.frozen.model.get_input_embeddings().weight
        width = self.sizes["width"]
        most = torch.linalg.svd(table, full_matrices=False).Vh[:width]
        parts["connect"].enter.weight.zero_()[: len(most)] = most
        words = parts["generate"].words.weight
        for name in (*CLIP_GLYPHS, *CLIP_SHAPES):
            own = parts["connect"].enter.weight @ table[TOKEN_ID[name]]
            words[WORD_ID[name]] = own / own.norm() * words[0].norm()

    def record(self, seen: Clip) -> Record:
        return super().record(seen) | {f"long.{k}": x for k, x in clip_record(self.frozen.model, seen.seed).items()}

    def output(self, module: Any, view: View) -> Output:
        """All rows at once, where the method takes one after the other."""
        method = cast(OmniVid, self.method)
        connect = module["connect"] if isinstance(module, nn.ModuleDict) else module
        chunks = chunks_of(view, method.every, self.slug)
        return Output.of(method.laid(view, chunks, *connect(*chunks[:3], method.counts(chunks))), view)

    def phases(self, records: Sequence[Record]) -> list[Phase]:
        (answers,) = super().phases(records)

        def both(module: nn.Module, batch: list[int]) -> Tensor:
            return answers.loss(module, batch) + 0.5 * self._written(module, batch[:4])

        named = max(8, round(self.named * self.scale))
        return [
            Phase("words", named, 16, 2e-3, self._written),
            Phase("answers", answers.steps, answers.batch, answers.rate, both),
        ]

    def _written(self, module: Any, batch: list[int]) -> Tensor:
        """The loss of the words of one answer about each clip."""
        g = torch.Generator().manual_seed(batch[0] * len(self.records) + batch[1])
        own = [self.records[i] for i in batch]
        at = [int(torch.randint(int(r["long.asked"]), (1,), generator=g)) for r in own]
        queries = FEWER[int(torch.randint(len(FEWER), (1,), generator=g))]
        prompt, answer = (torch.stack([r[f"long.{k}"][i] for r, i in zip(own, at, strict=True)]) for k in PAIR)
        tokens = torch.stack([r["long.tokens"] for r in own]).float()
        given = torch.cat([torch.full_like(answer[:, :1], START), answer[:, :-1]], 1)
        said = module["generate"](memory_of(module, tokens, prompt, queries), given)
        return cross_entropy(said.flatten(0, 1), answer.flatten(), ignore_index=PAD)

    @torch.no_grad()
    def measure(self, module: nn.Module, records: Sequence[Record]) -> dict[str, float]:
        """Beside the accuracy of answers, what is written about held-out clips, by queries of a clip."""
        found = super().measure(module, records)
        for queries in FEWER:
            for name, values in written(module, records, queries).items():
                found[f"{name}_{queries}"] = sum(values) / len(values)
        return found


PAIR = ("prompt", "answer")


def memory_of(module: Any, tokens: Tensor, prompt: Tensor, queries: int) -> Tensor:
    """What the writer reads of long clips."""
    clips, place, there = clips_of(tokens, Recipe.settings["every"])
    read, _ = module["connect"].read(clips, place, there, [queries] * clips.shape[1])
    memory: Tensor = module["generate"].encode(read, prompt)
    return memory


@torch.no_grad()
def written(module: Any, records: Sequence[Record], queries: int) -> dict[str, list[float]]:
    """For each question of a kind: whether all names are right, or how much of the moment or box is (IoU)."""
    found: dict[str, list[float]] = {"names": [], "near": [], "moment": [], "box": []}
    for number in range(max(int(r["long.asked"]) for r in records)):
        own = [r for r in records if int(r["long.asked"]) > number]
        prompt, answer = (torch.stack([r[f"long.{k}"][number] for r in own]) for k in PAIR)
        tokens = torch.stack([r["long.tokens"] for r in own]).float()
        said = module["generate"].write(memory_of(module, tokens, prompt, queries), START, MOST)
        for task, got, want in zip(prompt[:, 0].tolist(), said.tolist(), answer.tolist(), strict=True):
            score(found, task, [WORDS[i] for i in got], [WORDS[i] for i in want if i != PAD])
    return found


def score(found: dict[str, list[float]], task: int, got: list[str], want: list[str]) -> None:
    """Add what one answer is worth."""
    if task == WORD_ID[TASKS[0]]:
        found["names"].append(float(got[: len(want)] == want))
    elif task == WORD_ID[TASKS[1]]:
        one, own = TIMES.decode(got[:2], SECONDS), TIMES.decode(want, SECONDS)
        bin_ = SECONDS / (TIMES.bins - 1)
        pairs = zip(one, own, strict=True) if one is not None and own is not None else [(bin_ * 9, 0.0)]
        found["near"].append(float(all(abs(a - b) <= bin_ + 1e-9 for a, b in pairs)))
        found["moment"].append(overlap(one, own) if own is not None else 0.0)
    else:
        one_box, own_box = BOXES.decode(got[:4], SIDE, SIDE), BOXES.decode(want, SIDE, SIDE)
        found["box"].append(shared(one_box, own_box) if one_box and own_box else 0.0)


def shared(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two boxes."""
    both = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / either if either > 0 else 0.0
