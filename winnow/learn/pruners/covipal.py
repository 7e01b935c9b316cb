"""Scorers of CoViPAL, in two phases, with the model frozen.

Guided: a scorer learns which tokens the last token of the prompt attends to in a layer at two thirds of the depth (what
the rows of the question attend to there depends little on it). Soft: its gate lets the model read less of the tokens
that it finds useless, by the logarithm of the gate on their keys; it learns to leave the answer as it was, and to keep
as many tokens as the cut will.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div, logsigmoid

from winnow.learn.fitting import Phase, Record
from winnow.learn.pruners.frozen import Example, Frozen, Recorder, device_of, soft_keys
from winnow.methods.covipal import CoViPAL, Scorer, sizes_for
from winnow.signals.entering import QuestionRows
from winnow.signals.language import LMAttention

KEPT = 0.25  # the share at which it is measured


class Recipe:
    questions = 728

    def __init__(self, frozen: Frozen, scale: float) -> None:
        self.frozen, self.scale = frozen, scale
        info = frozen.handle.info
        self.method = CoViPAL().resolve(info)
        self.layers: tuple[int, ...] = self.method.layers or ()
        self.shares = [float(budget.share(100)) for budget in self.method.ratios]
        self.width = info.width
        self.sizes = sizes_for(info.width)
        self.settings = {"layers": list(self.layers), "ratios": [str(budget) for budget in self.method.ratios]}
        self.guide = max(info.at_depth(2 / 3), max(self.layers) + 1)
        looks = tuple((f"layers[{k}]", (QuestionRows(k),)) for k in self.layers)
        self.recorder = Recorder((*looks, (f"layers[{self.guide}]", (LMAttention(self.guide),))))

    def make(self) -> nn.Module:
        return nn.ModuleDict({str(layer): Scorer(self.width, **self.sizes) for layer in self.layers})

    @torch.no_grad()
    def record(self, example: Example) -> Record:
        self.frozen.run(example, self.recorder)
        views = self.recorder.seen
        found = {"guide": views[f"layers[{self.guide}]"][LMAttention(self.guide)][0]}
        for layer in self.layers:
            view = views[f"layers[{layer}]"]
            found |= {f"v{layer}": view.tokens[0].half(), f"t{layer}": view[QuestionRows(layer)][0].half()}
        return found | {"full": self.frozen.said(example).log_softmax(-1)}

    def phases(self, records: Sequence[Record]) -> list[Phase]:
        self.records = records
        guided = Phase("guided", round(600 * self.scale), 12, 1e-3, self._guided)
        return [guided, Phase("soft", round(80 * self.scale), 4, 3e-4, self._soft)]

    def _guided(self, module: nn.Module, batch: list[int]) -> Tensor:
        """Whether a token is among the best of the guide."""
        own = [self.records[i] for i in batch]
        losses = []
        for layer, share in zip(self.layers, self.shares, strict=True):
            for logits, record in zip(self.scores(module, layer, own), own, strict=True):
                best = record["guide"].topk(max(1, round(share * len(logits)))).indices
                wanted = torch.zeros_like(logits).index_fill(0, best.to(logits.device), 1.0)
                losses.append(binary_cross_entropy_with_logits(logits, wanted))
        return torch.stack(losses).mean()

    def _soft(self, module: nn.Module, batch: list[int]) -> Tensor:
        """Answers through the gates: the truth, what the full model says, and the share of what is kept."""
        losses = []
        for number in batch:
            (example,) = self.frozen.examples(number, number + 1)
            said, kept = self.gated(module, example)
            full = self.records[number]["full"].to(said)
            loss = cross_entropy(said, example.answer)
            loss = loss + kl_div(said.log_softmax(-1), full, log_target=True, reduction="batchmean")
            losses.append(loss + sum((k - share) ** 2 for k, share in zip(kept, self.shares, strict=True)))
        return torch.stack(losses).mean()

    def gated(self, module: nn.Module, example: Example) -> tuple[Tensor, list[Tensor]]:
        """The logits of the answer's tokens with all gates in place, and the mean of the gates so far at each."""
        visual, question = self.frozen.slots(example)
        question = question[-QuestionRows().count :]
        gates: list[Tensor] = []

        def gate(layer: int, hidden: Tensor) -> Tensor | None:
            if layer not in self.layers:
                return None
            scorer = module[str(layer)]  # type: ignore[index]
            logits = scorer(hidden[:, visual].float(), hidden[:, question].float())[0]
            gates.append(logsigmoid(logits))
            return hidden.new_zeros(1, hidden.shape[1]).index_add(1, visual, gates[-1][None].to(hidden.dtype))

        with soft_keys(self.frozen.handle.bound.layers, gate):
            said = self.frozen.said(example)
        return said, [torch.stack(gates[: i + 1]).sum(0).exp().mean() for i in range(len(gates))]

    def scores(self, module: nn.Module, layer: int, own: Sequence[Record]) -> list[Tensor]:
        """`[V]` logits of each record; those with as many tokens go through the scorer together."""
        scorer = module[str(layer)]  # type: ignore[index]
        found: dict[int, Tensor] = {}
        groups: dict[int, list[int]] = {}
        for i, record in enumerate(own):
            groups.setdefault(len(record["guide"]), []).append(i)
        for members in groups.values():
            rows = (torch.stack([own[i][f"{name}{layer}"] for i in members]) for name in "vt")
            v, t = (x.to(device_of(module)).float() for x in rows)
            longest = int(t.ne(0).any(-1).sum(1).max())
            found |= dict(zip(members, scorer(v, t[:, t.shape[1] - longest :]), strict=True))
        return [found[i] for i in range(len(own))]

    @torch.no_grad()
    def measure(self, module: nn.Module, records: Sequence[Record]) -> dict[str, float]:
        """The share of the guide's attention that lies on a quarter of the tokens, by each scorer."""
        found = {"attention_held_by_the_best_quarter": self._held(records, [own["guide"] for own in records])}
        for layer in self.layers:
            held = self._held(records, self.scores(module, layer, records))
            found[f"attention_held_by_a_quarter_at_layer_{layer}"] = held
        return found

    @staticmethod
    def _held(records: Sequence[Record], scores: Sequence[Tensor]) -> float:
        shares = []
        for own, score in zip(records, scores, strict=True):
            best = score.topk(max(1, round(KEPT * len(score)))).indices
            shares.append(own["guide"][best].sum() / own["guide"].sum())
        return torch.stack(shares).mean().item()
