"""Routers of DyVTE: from the text in front of a layer, whether the answer would stay the same without the image.

Labels come from the model itself: the image is taken away before each layer in turn, and a layer is a good exit where
all tokens of the answer stay and the loss grows by less than 3 %. One sweep for each question, by the method's own
forced exit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from winnow.learn.fitting import Phase, Record
from winnow.learn.pruners.frozen import Example, Frozen, Recorder, device_of
from winnow.methods.dyvte import DyVTE, Routers, hidden_for
from winnow.signals.entering import TextSummary

AGREEMENT, MORE_LOSS = 0.99, 1.03
LEAST_LOSS = 0.05  # the model is sure of answers with less, and the ratio of such losses says nothing


class Recipe:
    questions = 624
    settings: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, frozen: Frozen, scale: float) -> None:
        self.frozen, self.scale = frozen, scale
        info = frozen.handle.info
        self.depth, self.width = info.depth, info.width
        self.sizes = {"hidden": hidden_for(info.width)}
        looks = tuple((f"layers[{k}]", (TextSummary(k),)) for k in range(1, info.depth))
        self.recorder = Recorder(looks)

    def make(self) -> nn.Module:
        return Routers(self.width, self.depth, **self.sizes)

    @torch.no_grad()
    def record(self, example: Example) -> Record:
        self.frozen.run(example, self.recorder)
        views = self.recorder.seen
        text = torch.stack([views[f"layers[{k}]"][TextSummary(k)][0] for k in range(1, self.depth)])
        full = self.frozen.said(example)
        agree, loss = [], []
        for layer in range(1, self.depth):
            said = self.frozen.said(example, DyVTE(exit=layer))
            agree.append((said.argmax(-1) == full.argmax(-1)).float().mean())
            loss.append(cross_entropy(said, example.answer))
        whole = cross_entropy(full, example.answer)
        right = (full.argmax(-1) == example.answer).all().float()
        return {
            "text": text.half(),
            "agree": torch.stack(agree),
            "loss": torch.stack(loss),
            "full": torch.stack([whole, right]),
        }

    def phases(self, records: Sequence[Record]) -> list[Phase]:
        text = torch.stack([own["text"] for own in records]).float()
        leave = torch.stack([good_exits(own) for own in records]).long()

        def loss(module: nn.Module, batch: list[int]) -> Tensor:
            where = device_of(module)
            logits = routed(module, text[batch].to(where))
            return cross_entropy(logits.flatten(0, 1), leave[batch].flatten().to(where))

        return [Phase("routers", round(800 * self.scale), 64, 1e-3, loss)]

    @torch.no_grad()
    def measure(self, module: nn.Module, records: Sequence[Record]) -> dict[str, float]:
        """The share of answers that stay, and the layer before which images leave in the mean (the depth: never)."""
        text = torch.stack([own["text"] for own in records]).float()
        agree = torch.stack([own["agree"] for own in records])
        found = {}
        exits = first_exit(routed(module, text), self.depth)
        found["same_answer"] = same_answers(agree, exits).mean().item()
        found["mean_exit"] = exits.float().mean().item()
        fixed = torch.full_like(exits, round(found["mean_exit"]))
        found["same_answer_at_a_fixed_layer"] = same_answers(agree, fixed).mean().item()
        return found


def good_exits(own: Record) -> Tensor:
    """`[L − 1]` the layers before which the image can leave, from the first on."""
    least = own["full"][0].clamp_min(LEAST_LOSS)
    return (own["agree"] > AGREEMENT) & (own["loss"] < MORE_LOSS * least)


def routed(module: nn.Module, text: Tensor) -> Tensor:
    """`[b, L − 1, 2]` the logits of all routers."""
    return torch.stack([router(own) for router, own in zip(module.children(), text.unbind(1), strict=True)], 1)


def first_exit(logits: Tensor, depth: int) -> Tensor:
    """`[b]` the first layer whose router fires; the depth, where none does."""
    fires = logits[..., 1] > logits[..., 0]
    return torch.where(fires.any(1), fires.float().argmax(1) + 1, depth)


def same_answers(agree: Tensor, exits: Tensor) -> Tensor:
    """Whether all tokens of the answer stay at each exit; they do where there is none."""
    whole = torch.cat([agree, torch.ones_like(agree[:, :1])], 1)
    return (whole.gather(1, (exits - 1)[:, None])[:, 0] > AGREEMENT).float()
