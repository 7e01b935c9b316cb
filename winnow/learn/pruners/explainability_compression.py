"""The net of explainability compression: from the first layer's attention, what an explanation of the answer says.

The explanation takes a forward and a backward pass through all layers (see `relevance`); it is made once for each
question. The net learns its distribution over the visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from winnow.learn.fitting import Phase, Record
from winnow.learn.pruners.frozen import Example, Frozen, Recorder, device_of
from winnow.learn.pruners.relevance import relevance
from winnow.methods.explainability_compression import CHANNELS, HeadsOfQuestion, Net, shown_to_net
from winnow.parts.planes import planes

KEPT = 0.25  # the share at which it is measured


class Recipe:
    questions = 728
    settings: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, frozen: Frozen, scale: float) -> None:
        self.frozen, self.scale = frozen, scale
        self.heads = frozen.handle.info.heads
        self.sizes = {"channels": CHANNELS}
        self.recorder = Recorder((("projected", (HeadsOfQuestion(0),)),))

    def make(self) -> nn.Module:
        return Net(self.heads, **self.sizes)

    def record(self, example: Example) -> Record:
        """The attention of the question, what explains the answer, and the planes on which the tokens lie."""
        with torch.no_grad():
            self.frozen.run(example, self.recorder)
        view = self.recorder.seen["projected"]
        visual, _ = self.frozen.slots(example)
        visual = visual[torch.as_tensor(view.layout.content, device=visual.device)]
        why = relevance(self.frozen.handle.model, visual, lambda: self.frozen.run(example, output_attentions=True))
        found = {"seen": view[HeadsOfQuestion(0)][0], "why": why}
        for number, plane in enumerate(planes(view.layout, why.device)):
            found[f"plane{number}"] = plane.clone()
        return found

    def phases(self, records: Sequence[Record]) -> list[Phase]:
        def loss(module: nn.Module, batch: list[int]) -> Tensor:
            own = [records[i] for i in batch]
            pairs = zip(own, scored(module, own), strict=True)
            return torch.stack([divergence(record["why"], scores) for record, scores in pairs]).mean()

        return [Phase("net", round(1000 * self.scale), 32, 2e-3, loss)]

    @torch.no_grad()
    def measure(self, module: nn.Module, records: Sequence[Record]) -> dict[str, float]:
        """The share of the explanation that lies on a quarter of the tokens."""
        net = scored(module, records)
        raw = [own["seen"].mean(-1) for own in records]
        return {
            "explained_by_a_quarter": held(records, net),
            "explained_by_a_quarter_of_raw_attention": held(records, raw),
            "explained_by_the_best_quarter": held(records, [own["why"] for own in records]),
        }


def scored(module: nn.Module, records: Sequence[Record]) -> list[Tensor]:
    """`[V]` scores for each record; records with equal planes go through the net together."""
    found: dict[int, Tensor] = {}
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault(tuple(tuple(plane.shape) for plane in planes_of(record)), []).append(i)
    for members in groups.values():
        scores = torch.zeros(len(members), len(records[members[0]]["why"]) + 1)
        for number, _ in enumerate(planes_of(records[members[0]])):
            own = [records[i] for i in members]
            table = torch.stack([one[f"plane{number}"] for one in own])  # m t h w
            seen = torch.stack([nn.functional.pad(one["seen"], (0, 0, 0, 1)) for one in own])
            maps = seen[torch.arange(len(own))[:, None, None, None], table]  # m t h w heads
            shown = shown_to_net(maps.flatten(0, 1).permute(0, 3, 1, 2), scores.shape[1] - 1)
            made = module(shown.to(device_of(module))).cpu()
            scores = scores.scatter(1, table.flatten(1), made.reshape(len(own), -1))
        found |= dict(zip(members, scores[:, :-1], strict=True))
    return [found[i] for i in range(len(records))]


def planes_of(own: Record) -> list[Tensor]:
    return [own[name] for name in sorted(own) if name.startswith("plane")]


def divergence(why: Tensor, scores: Tensor) -> Tensor:
    """KL of the explanation from the scores' distribution."""
    return nn.functional.kl_div(scores.log_softmax(0), why, reduction="sum")


def held(records: Sequence[Record], scores: Sequence[Tensor]) -> float:
    """The share of the explanation on the best tokens, mean over records."""
    shares = []
    for own, score in zip(records, scores, strict=True):
        best = score.topk(max(1, round(KEPT * len(score)))).indices
        shares.append(own["why"][best].sum())
    return torch.stack(shares).mean().item()
