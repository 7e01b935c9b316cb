"""BoundPlan: a plan made ready for one model: which steps run where, and what must be listened to for them."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo
from winnow.core.plan import Plan
from winnow.core.signal import Signal, Site
from winnow.core.step import Step

Steps = tuple[tuple[int, Step], ...]


@dataclass(frozen=True, eq=False)
class BoundPlan:
    """A checked plan.

    Attributes:
        plan: as the user gave it.
        resolved: with settings that depend on the model made definite.
        features, projected: (number of the method, step) at the tower's output, and at the LM's input.
        layers: LM layer → steps before it.
        listeners: site → signals that are read there.
        probed: LM layer → signals that a step before this very layer wants of it.
        modules: number of a method → its parameters, for methods that have some.
        reads_text: whether any step depends on the text.
        reads_question: whether any step depends on where the question is.
    """

    plan: Plan
    resolved: Plan
    features: Steps
    projected: Steps
    layers: Mapping[int, Steps]
    listeners: Mapping[Site, tuple[Signal, ...]]
    probed: Mapping[int, tuple[Signal, ...]]
    modules: Mapping[int, nn.Module]
    reads_text: bool
    reads_question: bool

    @staticmethod
    def of(
        plan: Plan, info: ModelInfo, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> "BoundPlan":
        """Check the plan for a model; `device` and `dtype` are those of what its methods build.

        Raises:
            UnsupportedError, WinnowError: a method cannot run on this model, or sees something too late.
        """
        resolved, steps = plan.bind(info)
        at: dict[str, list[tuple[int, Step]]] = {"features": [], "projected": []}
        layers: dict[int, list[tuple[int, Step]]] = defaultdict(list)
        listeners: dict[Site, set[Signal]] = defaultdict(set)
        probed: dict[int, set[Signal]] = defaultdict(set)
        for number, step in steps:
            if step.at.name == "layers" and step.at.part is None:
                layers[step.at.index or 0].append((number, step))
            elif step.at.name == "projected" and any(s.site(info).stack == "lm" for s in step.needs):
                layers[0].append((number, step))  # the same place, and there the first layer can be probed
            elif step.at.name in at:
                at[step.at.name].append((number, step))
            else:
                raise UnsupportedError(
                    f"steps at {step.at} are not built yet; this version acts at features, projected and layers[k]."
                )
            for signal in step.needs:
                _listen(signal, step, plan.methods[number].slug, info, listeners, probed)
        return BoundPlan(
            plan,
            resolved,
            tuple(at["features"]),
            tuple(at["projected"]),
            {k: tuple(v) for k, v in layers.items()},
            {k: tuple(sorted(v, key=repr)) for k, v in listeners.items()},
            {k: tuple(sorted(v, key=repr)) for k, v in probed.items()},
            _built(resolved, info, device, dtype),
            any(signal.reads_text for _, step in steps for signal in step.needs),
            any(signal.reads_question for _, step in steps for signal in step.needs),
        )

    @property
    def first_layer(self) -> int | None:
        """The first LM layer before which something happens or at which a hidden state is read; None if nowhere."""
        hidden = [site.index for site in self.listeners if site.stack == "lm" and site.shows == "hidden"]
        return min((*self.layers, *hidden), default=None)

    @property
    def tower_signals(self) -> tuple[Signal, ...]:
        """What is read of the encoder."""
        return tuple(signal for site, own in self.listeners.items() if site.stack != "lm" for signal in own)


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
    before = step.at.index or 0 if step.at.name == "layers" else 0
    if site.stack == "projector" and step.at.name == "features":
        raise WinnowError(f"{slug} acts before the projector and cannot see {signal}: it has not run by then.")
    if site.stack == "lm" and site.index >= before:
        if site.index == before and site.shows == "attention" and step.at.name != "features":
            probed[before].add(signal)
            return
        raise WinnowError(f"{slug} acts at {step.at} and cannot see {signal}: that layer has not run by then.")
    listeners[site].add(signal)


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
