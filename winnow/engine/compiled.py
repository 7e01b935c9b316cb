"""A plan made ready for one model: which steps run where, and what must be heard for them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo
from winnow.core.plan import Plan
from winnow.core.signal import LMAttention, LMAttentionMass, Signal, VisionSignal
from winnow.core.step import Step


@dataclass(frozen=True, eq=False)
class Compiled:
    """A checked plan.

    Attributes:
        features: (method number, step) at the tower's output.
        layers: LM layer → steps before it; `projected` is before layer 0, ahead of `layers[0]`.
        vision: tower block → signals heard there.
        lm: LM layer → signals heard while it runs.
        probed: LM layers that are probed.
        modules: the parameters of each method, None for those without.
    """

    plan: Plan
    info: ModelInfo
    features: tuple[tuple[int, Step], ...] = ()
    layers: dict[int, tuple[tuple[int, Step], ...]] = field(default_factory=dict)
    vision: dict[int, tuple[Signal, ...]] = field(default_factory=dict)
    lm: dict[int, tuple[Signal, ...]] = field(default_factory=dict)
    probed: frozenset[int] = frozenset()
    modules: tuple[Any, ...] = ()

    @staticmethod
    def of(plan: Plan, info: ModelInfo) -> Compiled:
        if plan.positions == "compact" and info.mrope:
            raise UnsupportedError(
                f"positions=compact is defined for 1-D positions; {info.model} has 3-D positions. Use positions=keep."
            )
        features: list[tuple[int, Step]] = []
        layers: dict[int, list[tuple[int, Step]]] = defaultdict(list)
        vision: dict[int, set[Signal]] = defaultdict(set)
        lm: dict[int, set[Signal]] = defaultdict(set)
        probed: set[int] = set()
        for number, step in plan.steps(info):
            at = -1
            if step.at.name == "features":
                features.append((number, step))
            elif step.at.name == "projected" or step.at.name == "layers":
                at = 0 if step.at.index is None else step.at.index
                layers[at].append((number, step))
            else:
                raise UnsupportedError(
                    f"steps at {step.at} are not built yet; this version acts at features, projected and layers[k]."
                )
            slug = plan.methods[number].slug
            for signal in step.needs:
                if isinstance(signal, VisionSignal):
                    vision[signal.block(info)].add(signal)
                elif isinstance(signal, LMAttention | LMAttentionMass):
                    _hear(signal, at, slug, lm, probed)
                else:
                    raise UnsupportedError(f"{slug} needs {type(signal).__name__}, which the engine cannot supply.")
        return Compiled(
            plan,
            info,
            tuple(features),
            {k: tuple(v) for k, v in layers.items()},
            {k: tuple(sorted(v, key=repr)) for k, v in vision.items()},
            {k: tuple(sorted(v, key=repr)) for k, v in lm.items()},
            frozenset(probed),
            tuple(method.build(info) for method in plan.methods),
        )


def _hear(signal: Signal, at: int, slug: str, lm: dict[int, set[Signal]], probed: set[int]) -> None:
    """A layer before the step is tapped while it runs; the layer at the step is probed."""
    layer: int = signal.layer  # type: ignore[attr-defined]
    if layer == at and isinstance(signal, LMAttention):
        probed.add(layer)
    elif 0 <= layer < at:
        lm[layer].add(signal)
    else:
        raise WinnowError(f"{slug} acts before LM layer {at} and cannot see {signal}: that layer has not run by then.")
