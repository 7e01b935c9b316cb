"""A tiny model by name, of the zoo or of the builds, and the plain model's answer to a prompt that is cut by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import builds
import torch
import zoo
from byhand import Reference, top
from masked import Cut, MaskedReference
from probes import Pick, score
from torch import Tensor, nn

import winnow
from winnow.core.plan import Plan
from winnow.models.supported_versions import trying

SHORT = ("llava_clip", "llava_next", "qwen2_5_vl")  # entered with the shortened sequence
WHOLE = ("gemma3", "qwen2_vl", "internvl", "paligemma", "mistral3", "idefics3")  # called with the whole sequence
HYBRID = ("qwen3_5",)  # the same, with linear layers, whose state takes no mask

BROKEN = ("mistral3",)  # where a picture's run of placeholders is broken by the ends of its rows


def compress(model: nn.Module, plan: Any) -> winnow.Handle:
    """Compress a model of any class, whether or not it has an adapter."""
    with trying():
        return winnow.compress(model, plan)


@dataclass(frozen=True)
class Subject:
    """A tiny model.

    Attributes:
        name: in the zoo, or among the builds.
    """

    name: str

    @property
    def of_zoo(self) -> bool:
        return self.name in zoo.BUILDS

    def model(self, **options: Any) -> nn.Module:
        return zoo.model(self.name, **options) if self.of_zoo else builds.every()[self.name].model(**options)

    def sample(self, row: str, *, seed: int = 0) -> dict[str, Tensor]:
        if self.of_zoo:
            return zoo.sample(self.name, row, seed=seed)
        return builds.every()[self.name].sample(row, seed=seed)

    def content(self, model: nn.Module, sample: dict[str, Tensor]) -> list[Tensor]:
        """For each item, the positions of its content tokens: those of one unbroken run of placeholders."""
        if self.of_zoo:
            return list(Reference(model).entry(sample).content)
        config: Any = model.config
        token = getattr(config, "image_token_id", None)
        token = config.image_token_index if token is None else token
        at = (sample["input_ids"][0] == token).nonzero()[:, 0]
        return [at] if self.name in BROKEN else list(at.tensor_split((at.diff() > 1).nonzero()[:, 0] + 1))


def picked(keep: int, layer: int) -> Cut:
    """By hand, what `Pick(keep)` does before a layer."""
    return Cut(layer, lambda rows, left: [own[top(score(rows[own]), keep)] for own in left])


class Deep:
    """A plan that cuts at the LM's door and again before layer 2, and the same by hand: the masked plain model."""

    plan = Plan((Pick(keep=6), Pick(keep=3, at="layers[2]")))
    cuts = (picked(6, 0), picked(3, 2))

    def __init__(self, subject: Subject, model: nn.Module, sample: dict[str, Tensor]) -> None:
        self.items, self.reference = subject.content(model, sample), MaskedReference(model)

    def generate(self, sample: dict[str, Tensor], **options: Any) -> Any:
        return self.reference.generate(sample, self.items, self.cuts, **options)[0]


class AtTheDoor:
    """A plan that cuts at the LM's door, and the same by hand: the plain model on the rows and positions that are left.

    For classes whose layers take no mask.
    """

    plan = Plan((Pick(keep=6),))

    def __init__(self, subject: Subject, model: nn.Module, sample: dict[str, Tensor]) -> None:
        self.items, self.model = subject.content(model, sample), copy.deepcopy(model)

    @torch.no_grad()
    def generate(self, sample: dict[str, Tensor], **options: Any) -> Any:
        box: dict[str, Tensor] = {}
        hook = self.model.get_decoder().register_forward_pre_hook(lambda m, a, k: box.update(k), with_kwargs=True)
        self.model.generate(**sample, max_new_tokens=1, do_sample=False)
        hook.remove()
        rows = box["inputs_embeds"]
        kept = torch.ones(rows.shape[1], dtype=torch.bool)
        kept[torch.cat(self.items)] = False
        kept[torch.cat([item[top(score(rows[0, item]), 6)] for item in self.items])] = True
        short = {
            "inputs_embeds": rows[:, kept],
            "position_ids": box["position_ids"][..., kept],
            "attention_mask": torch.ones(1, int(kept.sum()), dtype=torch.int64),
        }
        defaults = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        return self.model.generate(**short, **defaults | options)


def by_hand(subject: Subject, model: nn.Module, sample: dict[str, Tensor]) -> Deep | AtTheDoor:
    return (AtTheDoor if subject.name in HYBRID else Deep)(subject, model, sample)


def said(output: Any, count: int) -> Tensor:
    """`[B, count]` the last tokens of each sequence: those that were generated."""
    return output.sequences[:, -count:]


def named(*names: Sequence[str]) -> list[Subject]:
    return [Subject(name) for group in names for name in group]
