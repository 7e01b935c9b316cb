"""BoundPlan: a plan made ready for one model: which steps run where, and what must be listened to for them."""

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from winnow.core.cross_read import CrossRead
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo
from winnow.core.kv import KVStep
from winnow.core.kv_budget import KVBudget
from winnow.core.kv_method import CacheMethod
from winnow.core.plan import Plan
from winnow.core.signal import Signal, Site, block_index
from winnow.core.step import Step

Steps = tuple[tuple[int, Step], ...]
# Points ahead of the processor, and why no signal can be seen there.
AHEAD = {
    "prompt": "pictures are chosen before any model runs. A step there sees small pixels, sizes, the text of the "
    "question, and features that are handed over",
    "frames": "frames are chosen before any model runs. A step there sees small pixels, times, and features that are "
    "handed over",
    "pixels": "pictures are cut and scaled before any model runs. A step there sees small pixels and the size",
}


@dataclass(frozen=True, eq=False)
class BoundPlan:
    """A checked plan.

    Attributes:
        plan: as the user gave it.
        resolved: with settings that depend on the model made definite.
        blocks, halves: vision block → steps before it, and between its attention and its MLP. Those behind the block
            whose output feeds the projector are left out: nothing would read what they did.
        frames: (number of the method, step) on the frames of a video, which are chosen ahead (`Handle.frames`).
        prompt, pixels: the same on the pictures of a request and on each of them (`Handle.prompt`).
        features, projected: the same at the tower's output, and at the LM's input.
        layers: LM layer → steps before it.
        kv: LM layer → steps at its cache.
        listeners: site → signals that are read there.
        probed: LM layer → signals that a step before this very layer wants of it, or of what is about to enter it.
        modules: number of a method → its parameters, for methods that have some.
        reads_text: whether any step depends on the text.
        reads_question: whether any step depends on where the question is.
        text_signals: signals of the question, which are read where the language model is entered.
        text_encoder: the text tower that was handed over, where a step needs one.
        modalities: of each method, those of the items that it acts on.
        cross_reads: number of a method → what rows read of that which it remembers of items.
        deaf: whether the model reads sounds beside other items, and no method acts on them or looks at them: they are
            no items then.
    """

    plan: Plan
    resolved: Plan
    blocks: Mapping[int, Steps]
    halves: Mapping[int, Steps]
    features: Steps
    projected: Steps
    layers: Mapping[int, Steps]
    listeners: Mapping[Site, tuple[Signal, ...]]
    probed: Mapping[int, tuple[Signal, ...]]
    modules: Mapping[int, nn.Module]
    reads_text: bool
    reads_question: bool
    text_signals: tuple[Signal, ...] = ()
    text_encoder: Any = None
    kv: Mapping[int, Steps] = field(default_factory=dict)
    frames: Steps = ()
    prompt: Steps = ()
    pixels: Steps = ()
    modalities: tuple[tuple[str, ...], ...] = ()
    deaf: bool = False
    cross_reads: Mapping[int, tuple[CrossRead, ...]] = field(default_factory=dict)

    @staticmethod
    def of(
        plan: Plan, info: ModelInfo, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> "BoundPlan":
        """Check the plan for a model; `device` and `dtype` are those of what its methods build.

        Raises:
            UnsupportedError, WinnowError: a method cannot run on this model, or sees something too late.
        """
        _check_of_cache(plan, info)
        resolved, bound = plan.bind(info)
        acted = tuple(
            tuple(m for m in info.modalities if m in method.modalities) or info.modalities for method in plan.methods
        )
        steps = _without_idle(plan, bound, info)
        hears = any("audio" in own for own in acted) or any(s.beside for _, step in steps for s in step.needs)
        at: dict[str, list[tuple[int, Step]]] = {name: [] for name in (*AHEAD, "features", "projected")}
        layers: dict[int, list[tuple[int, Step]]] = defaultdict(list)
        kv: dict[int, list[tuple[int, Step]]] = defaultdict(list)
        blocks: dict[int, list[tuple[int, Step]]] = defaultdict(list)
        halves: dict[int, list[tuple[int, Step]]] = defaultdict(list)
        listeners: dict[Site, set[Signal]] = defaultdict(set)
        probed: dict[int, set[Signal]] = defaultdict(set)
        for number, step in steps:
            if step.at.name == "layers" and step.at.part is None:
                layers[step.at.index or 0].append((number, step))
            elif step.at.name == "projected" and any(s.site(info).stack == "lm" for s in step.needs):
                layers[0].append((number, step))  # the same place, and there the first layer can be probed
            elif step.at.name == "blocks":
                (blocks if step.at.part is None else halves)[step.at.index or 0].append((number, step))
            elif step.at.name == "kv":
                if not isinstance(step, KVStep):
                    raise WinnowError(
                        f"a step at {step.at} reads the cache of a layer and not its tokens: give a KVStep, as a "
                        "CacheMethod does."
                    )
                kv[step.at.index or 0].append((number, step))
            elif step.at.name in at:
                at[step.at.name].append((number, step))
            else:
                raise UnsupportedError(
                    f"steps at {step.at} are not built yet; this version acts at prompt, frames, pixels, blocks[i], "
                    "blocks[i].mlp, features, projected, layers[k] and kv[k]."
                )
            for signal in step.needs:
                _listen(signal, step, plan.methods[number].slug, info, listeners, probed)
        for index in halves:
            if listeners.get(Site("vision", index, "hidden")):
                raise WinnowError(
                    f"a step at blocks[{index}].mlp changes the tokens inside block {index}, so what goes in and what "
                    "comes out of that block cannot be compared; read another block."
                )
        return BoundPlan(
            plan,
            resolved,
            {k: tuple(v) for k, v in blocks.items()},
            {k: tuple(v) for k, v in halves.items()},
            tuple(at["features"]),
            tuple(at["projected"]),
            {k: tuple(v) for k, v in layers.items()},
            {k: tuple(sorted(v, key=repr)) for k, v in listeners.items()},
            {k: tuple(sorted(v, key=repr)) for k, v in probed.items()},
            _built(resolved, info, device, dtype),
            any(signal.reads_text for _, step in steps for signal in step.needs),
            any(signal.reads_question for _, step in steps for signal in step.needs),
            tuple(sorted({s for _, step in steps for s in step.needs if s.site(info).stack == "text"}, key=repr)),
            kv={k: tuple(v) for k, v in kv.items()},
            frames=tuple(at["frames"]),
            prompt=tuple(at["prompt"]),
            pixels=tuple(at["pixels"]),
            modalities=acted,
            deaf=len(info.modalities) > 1 and not hears,
            cross_reads={i: own for i, method in enumerate(resolved.methods) if (own := method.cross_reads(info))},
        )

    def acts_on(self, number: int, modality: str) -> bool:
        """Whether a method acts on items of a modality."""
        return not self.modalities[number] or modality in self.modalities[number]

    def listens(self, modality: str) -> bool:
        """Whether items of a modality are seen at all."""
        return not (self.deaf and modality == "audio")

    @property
    def changes_pictures(self) -> bool:
        """Whether steps say which pictures enter, or how, ahead of the processor."""
        return bool(self.prompt or self.pixels)

    @property
    def needs_text_encoder(self) -> bool:
        """Whether a step needs a text tower that is not part of the model."""
        heard = [signal for own in self.listeners.values() for signal in own]
        return any(signal.needs_text_encoder for signal in (*heard, *self.text_signals))

    @property
    def needs_cache(self) -> bool:
        """Whether a method acts at the cache alone."""
        others = (
            self.prompt,
            self.frames,
            self.pixels,
            self.features,
            self.projected,
            *self.blocks.values(),
            *self.halves.values(),
            *self.layers.values(),
        )
        elsewhere = {number for steps in others for number, _ in steps}
        return any(number not in elsewhere for steps in self.kv.values() for number, _ in steps)

    @property
    def first_layer(self) -> int | None:
        """The first LM layer before which something happens or at which a hidden state is read; None if nowhere."""
        hidden = [site.index for site in self.listeners if site.stack == "lm" and site.shows == "hidden"]
        return min((*self.layers, *hidden), default=None)

    @property
    def first_block(self) -> int | None:
        """The first vision block before or in which something happens; None if none is."""
        return min((*self.blocks, *self.halves), default=None)

    @property
    def acts_in_tower(self) -> bool:
        """Whether the encoder's output depends on the plan."""
        return bool(self.features) or self.first_block is not None

    @functools.cached_property
    def block_signals(self) -> frozenset[Signal]:
        """What steps at blocks look at."""
        steps = [step for own in (*self.blocks.values(), *self.halves.values()) for _, step in own]
        return frozenset(signal for step in steps for signal in step.needs)

    @functools.cached_property
    def asks_kinds(self) -> bool:
        """Whether a step at the cache, or a budget of it, depends on what each token is."""
        if any(getattr(step, "kinds", False) for steps in self.kv.values() for _, step in steps):
            return True
        found = (getattr(method, name) for method in self.plan.methods for name in method.settings())
        return any(isinstance(value, KVBudget) and value.is_kinds for value in found)

    @functools.cached_property
    def asks_places(self) -> bool:
        """Whether a step of the cache wants to know where slots stand."""
        return any(step.places for steps in self.kv.values() for _, step in steps)  # type: ignore[attr-defined]

    @property
    def tower_signals(self) -> tuple[Signal, ...]:
        """What is read of the encoder."""
        return tuple(signal for site, own in self.listeners.items() if site.stack != "lm" for signal in own)


def _check_of_cache(plan: Plan, info: ModelInfo) -> None:
    """A language model has nothing but its cache."""
    other = [method.slug for method in plan.methods if not isinstance(method, CacheMethod)]
    if other and info.points == ("kv",):
        raise UnsupportedError(
            f"{info.model} is not supported: it is a language model, which reads no pictures, and {other[0]} acts on "
            "their tokens; use a method of the cache, such as those that `winnow methods` lists with the stage cache. "
            "`winnow families` lists models with pictures; see the page 'Add a model family' of the documentation."
        )


def _listen(
    signal: Signal,
    step: Step,
    slug: str,
    info: ModelInfo,
    listeners: dict[Site, set[Signal]],
    probed: dict[int, set[Signal]],
) -> None:
    """The layer that is about to run is probed; everything else is read when it runs, which must be earlier."""
    site = signal.site(info)
    if step.at.name in AHEAD:
        raise WinnowError(f"{slug} acts at {step.at} and cannot see {signal}: {AHEAD[step.at.name]}.")
    if site.stack == "text":
        if step.at.name in ("blocks", "features"):
            raise WinnowError(
                f"{slug} acts at {step.at} and cannot see {signal}: pictures are encoded before the question is known; "
                "act at projected or in a layer."
            )
        return  # it is computed where the language model is entered
    if signal.beside and step.at.name not in ("projected", "layers"):
        raise WinnowError(
            f"{slug} acts at {step.at} and cannot see {signal}: which sound belongs to a video is known in the prompt; "
            "act at projected or in a layer."
        )
    if step.at.name == "blocks":
        _check_block(signal, site, step, slug)
        listeners[site].add(signal)
        return
    before = step.at.index or 0 if step.at.name == "layers" else 0
    if site.stack == "projector" and step.at.name == "features":
        raise WinnowError(f"{slug} acts before the projector and cannot see {signal}: it has not run by then.")
    if site.shows == "entry" and site.index < before:
        raise WinnowError(f"{slug} acts at {step.at} and cannot see {signal}: it sees what enters layer {before} only.")
    if site.stack == "lm" and site.index >= before:
        if site.index == before and site.shows != "hidden" and step.at.name != "features":
            probed[before].add(signal)
            return
        raise WinnowError(f"{slug} acts at {step.at} and cannot see {signal}: that layer has not run by then.")
    listeners[site].add(signal)


def _check_block(signal: Signal, site: Site, step: Step, slug: str) -> None:
    """Refuse what has not run: the attention of a block is known between it and the block's MLP."""
    block, part = step.at.index or 0, step.at.part
    known = site.stack == "pixels" or (
        site.stack == "vision"
        and (site.index < block or (site.index == block and part == "mlp" and site.shows == "attention"))
    )
    if not known:
        at = f"; at blocks[{site.index}].mlp it can" if (site.stack, site.shows) == ("vision", "attention") else ""
        raise WinnowError(f"{slug} acts at {step.at} and cannot see {signal}: it has not run by then{at}.")


def _without_idle(plan: Plan, steps: Sequence[tuple[int, Step]], info: ModelInfo) -> list[tuple[int, Step]]:
    """The steps without those at blocks behind the one that feeds the projector."""
    if not any(step.at.name == "blocks" for _, step in steps):
        return list(steps)
    what = f"the vision tower of {info.model}"
    last = block_index(info.feature_layer, info.vision_depth, what)
    kept = []
    for number, step in steps:
        if step.at.name != "blocks" or block_index(step.at.index or 0, info.vision_depth, what) <= last:
            kept.append((number, step))
    for number, step in steps:
        if step.at.name == "blocks" and not any(n == number for n, _ in kept):
            raise WinnowError(
                f"{plan.methods[number].slug} acts at {step.at}, and the projector of {info.model} reads the output "
                f"of block {last}: nothing would change. Act at blocks[{last}] or before."
            )
    return kept


def _built(plan: Plan, info: ModelInfo, device: torch.device | None, dtype: torch.dtype | None) -> dict[int, nn.Module]:
    made = {}
    for number, method in enumerate(plan.methods):
        module = method.build(info)
        if module is None:
            continue
        if not isinstance(module, nn.Module):
            raise WinnowError(f"{method.slug}: build(info) returns an nn.Module or None, got {type(module).__name__}.")
        made[number] = module.to(device=device, dtype=dtype).eval()
    return made
