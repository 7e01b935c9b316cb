"""The schedule of DiffRate: how many patches each block of a frozen tower prunes and merges, learned by gradient.

While it is searched nothing is removed: a mask over keys, 0 or 1 going forward, stands for what a count takes away.
What comes back through it says whether the answer wants the patch, and the price of the FLOPs what it costs. The
language model is part of the loss; its layers are shown the mask behind the last block.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from winnow.bench.requests import request
from winnow.core.budget import Budget
from winnow.core.info import ModelInfo
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.select import ranked
from winnow.core.step import Reduce, State, Step
from winnow.core.view import View
from winnow.learn.fitting import Phase, Record
from winnow.learn.pruners.frozen import Example, Frozen, soft_keys
from winnow.methods.diffrate import DiffRate
from winnow.parts.learned_budget import Schedule
from winnow.signals.vision import VisionAttention

TARGET = 0.6  # of the FLOPs of the blocks up to the one that the projector reads
PRICE = 100.0  # the authors' 5 on (GFLOPs − target)², as it is for a DeiT-S and shares of its FLOPs
LEAST = 1e-5  # the weight of a masked key: nothing, but for gradients


@dataclass(frozen=True)
class Search(Method):
    """DiffRate without removal: all patches stay, and those that are gone weigh nothing as keys.

    Args:
        held: the `schedule` that is learned, and `left`, the mask `[tiles, N]` over the patches behind the last block.
        number: of the search; plans of equal settings are the same plan.
    """

    number: int = field(default_factory=itertools.count().__next__)
    held: dict[str, Any] = field(default_factory=dict, compare=False, metadata={"setting": False})

    slug: ClassVar[str] = "diffrate-search"

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        rows = [VisionAttention(block) for block in range(1, VisionAttention().block(info) + 1)]
        run = [partial(self._act, number, row) for number, row in enumerate(rows)]
        return tuple(Step(Point("blocks", n + 1, "mlp"), run[n], (row,)) for n, row in enumerate(rows))

    def _act(self, number: int, row: VisionAttention, view: View, state: State) -> tuple[Reduce, State]:
        prune, merge = (self.held["schedule"][kind][number] for kind in ("prune", "merge"))
        ones = torch.ones_like(view[row])
        mask, size = state.token.get("mask", ones), state.token.get("size", ones)
        score = torch.where(mask.detach() > 0.5, view[row], -1.0)
        score[:, 0] = torch.inf
        order = ranked(score)
        rank = torch.zeros_like(order).scatter_(1, order, torch.arange(view.n).expand_as(order)) - 1  # of patches
        kept = cls_stays(prune.mask(rank))
        after = mask * kept * cls_stays(merge.mask(rank))
        gone = (mask.detach() > 0.5) & (after.detach() < 0.5)
        matrix, gained = merged(view.tokens, gone, kept, after.detach() > 0.5, size)
        size = size + gained
        log_bias = size.log() + (LEAST + (1 - LEAST) * after).log()
        self.held["left"] = after[:, 1:]
        here = torch.arange(view.n).expand(view.b, -1)
        reduction = Reduction.mix(matrix, representative=here)
        return Reduce(reduction, log_bias=log_bias), State({**state.token, "mask": after, "size": size})


def cls_stays(mask: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], 1)


def merged(x: Tensor, gone: Tensor, part: Tensor, kept: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """`[b, N, N]` means of what is merged, with all other tokens as they are, and what targets gain in weight.

    Args:
        gone: what is pruned or merged here.
        part: the mask of what pruning leaves. A mean takes sources by it, so that its gradient says whether merging a
            token is better than dropping it.
        kept: what they can be merged into.
    """
    with torch.no_grad():
        u = normalize(x, dim=-1)
        likeness = (u @ u.mT).masked_fill(~kept[:, None], -torch.inf)
        likeness[..., 0] = -torch.inf
        best, target = likeness.max(-1)
        gone = gone & best.isfinite()
        home = torch.zeros_like(likeness).scatter_(2, target[..., None], gone[..., None].to(best.dtype)).mT
    into = home * part[:, None]
    matrix = into + torch.eye(x.shape[1], device=x.device)
    gained = (into.detach() * torch.where(gone, best * size, 0)[:, None]).sum(-1)
    return matrix / matrix.sum(-1, keepdim=True), gained.clamp_min(1e-3 - size)


def flops(entering: Any, left: Any, width: int, inner: int) -> Any:
    """Multiply-adds of a block: its attention reads what enters it, its MLP what is left; both with [CLS]."""
    return 4 * entering * width**2 + 2 * entering**2 * width + 2 * left * width * inner


def share_of_flops(counts: Sequence[Any], patches: int, width: int, inner: int) -> Any:
    """FLOPs of a tower whose blocks leave so many patches each, as a share of one that keeps all."""
    entering = [patches, *counts[:-1]]
    own = sum(flops(1 + n, 1 + m, width, inner) for n, m in zip(entering, counts, strict=True))
    return own / (len(counts) * flops(1 + patches, 1 + patches, width, inner))


def counts_with_gradient(module: Any) -> list[Tensor]:
    """What each block leaves, for the price."""
    left = [torch.tensor(float(module.patches))]
    for prune, merge in zip(module["prune"], module["merge"], strict=True):
        left.append(torch.stack([left[-1], prune.count(), merge.count()]).min())
    return left


class Recipe:
    questions = 480
    settings: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, frozen: Frozen, scale: float) -> None:
        self.frozen, self.scale = frozen, scale
        info = frozen.handle.info
        self.search = Search()
        self.config = frozen.handle.model.config.vision_config
        side = self.config.image_size // self.config.patch_size
        self.sizes = {"patches": side**2, "blocks": VisionAttention().block(info) + 1, "step": 4}
        self.shape = (self.sizes["patches"], self.config.hidden_size, self.config.intermediate_size)

    def make(self) -> nn.Module:
        return Schedule(**self.sizes)

    @torch.no_grad()
    def record(self, example: Example) -> Record:
        """Whether the model answers without compression. What the tower makes is not kept: it is what is searched."""
        return {"right": (self.frozen.said(example).argmax(-1) == example.answer).all().float()}

    def phases(self, records: Sequence[Record]) -> list[Phase]:
        return [Phase("schedule", max(8, round(100 * self.scale)), 6, 0.15, self._loss)]

    def _loss(self, module: Any, batch: list[int]) -> Tensor:
        answers = torch.stack([self.masked(module, number) for number in batch]).mean()
        spent = share_of_flops(counts_with_gradient(module), *self.shape)
        return answers + PRICE * (spent - TARGET) ** 2

    def masked(self, module: Schedule, number: int) -> Tensor:
        """The loss of an answer, with the masks in the tower and in the language model."""
        frozen = self.frozen
        ask = frozen.task.questions[number]
        model, tokenizer = frozen.handle.model, frozen.processor.tokenizer
        inputs = request(model, frozen.processor, frozen.task, ask).inputs
        answer = torch.tensor([*tokenizer(ask.truth, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
        example = Example(ask, inputs, answer.to(model.device), None)  # type: ignore[arg-type]
        visual, _ = frozen.slots(example)
        self.search.held["schedule"] = module

        def gate(layer: int, hidden: Tensor) -> Tensor | None:
            if layer:
                return None
            weights = (LEAST + (1 - LEAST) * self.search.held["left"].flatten()).log()
            return weights.new_zeros(1, hidden.shape[1]).scatter(1, visual[None], weights[None])

        layers = frozen.handle.bound.layers
        with frozen.handle.train().using(Plan((self.search,))), soft_keys(layers, gate):
            logits = model(**example.answered, use_cache=False).logits
        return cross_entropy(logits[0, -len(example.answer) :].float(), example.answer)

    def describe(self, module: Any) -> dict[str, Any]:
        """The schedule that was learned, as the method's settings take it."""
        prune, merge = module.counts()
        return {"settings": {"prune": list(prune), "merge": list(merge)}}

    @torch.no_grad()
    def measure(self, module: Any, records: Sequence[Record]) -> dict[str, float]:
        """Answers that are right with the schedule, and with the uniform one of as many FLOPs."""
        prune, merge = module.counts()
        spent = float(share_of_flops(merge, *self.shape))
        left, others = uniform(spent, self.sizes["blocks"], *self.shape)
        first = len(self.frozen.task.questions) - len(records)
        plans = {"right": DiffRate(prune=prune, merge=merge), "right_uniform": DiffRate(left=Budget(left))}
        found = {"flops": spent, "flops_uniform": float(share_of_flops(others, *self.shape)), "uniform_left": left}
        for name, plan in plans.items():
            said = [
                (self.frozen.said(example, plan).argmax(-1) == example.answer).all().float()
                for example in self.frozen.examples(first, first + len(records))
            ]
            found[name] = torch.stack(said).mean().item()
        found["right_whole"] = torch.stack([own["right"] for own in records]).mean().item()
        return found


def uniform(share: float, blocks: int, patches: int, width: int, inner: int) -> tuple[int, list[int]]:
    """The uniform schedule whose FLOPs come nearest: patches behind the last block, and behind each."""

    def counts(left: int) -> list[int]:
        return [patches - (patches - left) * block // max(1, blocks - 1) for block in range(blocks)]

    best = min(range(1, patches + 1), key=lambda left: abs(share_of_flops(counts(left), patches, width, inner) - share))
    return best, counts(best)
