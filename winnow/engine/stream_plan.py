"""Which plans and models a stream can have, and what bounds its cache."""

from dataclasses import replace
from typing import Any

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.kv_budget import KVBudget
from winnow.core.kv_method import CacheMethod
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.engine.bound_model import BoundModel
from winnow.engine.bound_plan import BoundPlan
from winnow.models.families import streaming

_BOUND = (
    "give a method of the cache a number of slots that a head holds after each frame (keep=1024), or bytes of the "
    "whole cache (keep=2GB)"
)


def check_family(bound: BoundModel) -> None:
    """Refuse models on which streams are not tested."""
    if not bound.family.streams or not bound.short:
        raise UnsupportedError(
            f"a stream on {bound.info.model} is not supported: streams run on {', '.join(streaming())}, where all "
            "layers attend to everything before. Use winnow.compress with all frames in one prompt."
        )


def plan_of_stream(plan: Plan, bounded: bool) -> Plan:
    """The plan as each frame is read under it: a cache method's `limit` holds after a frame as after a decoded token.

    Raises:
        WinnowError: nothing bounds the cache, unless `bounded` is off; or a budget would remember every token.
    """
    methods = tuple(_by_frame(method) for method in plan.methods)
    for method in methods:
        keep = getattr(method, "keep", None)
        if isinstance(method, CacheMethod) and not method.takes_budgets():
            raise UnsupportedError(
                f"{method.slug} has no number of slots to keep, to which a stream could hold it; {_BOUND}."
            )
        if isinstance(keep, KVBudget) and keep.is_kinds:
            raise UnsupportedError(
                f"{method.slug}: keep={keep} asks what each token was, and a stream does not remember all of them; "
                "give one number of slots."
            )
    if bounded and not any(_is_bound(method) for method in methods):
        raise WinnowError(
            f"nothing in the plan {plan} bounds what the cache of a stream holds: {_BOUND}; or pass bounded=False, "
            "and memory grows with each frame."
        )
    return replace(plan, methods=methods)


def _by_frame(method: Method) -> Method:
    limit = getattr(method, "limit", None)
    if not isinstance(method, CacheMethod) or limit is None or _is_bound(method):
        return method
    keep: KVBudget = method.keep  # type: ignore[attr-defined]
    if not keep.is_all:
        raise WinnowError(
            f"{method.slug}: in a stream keep={keep} holds of each frame, and limit={limit} of all of them, which is "
            f"one choice too many; write keep={limit}, or keep=100%,limit={limit}."
        )
    return method.replace(keep=KVBudget(limit))


def _is_bound(method: Method) -> bool:
    keep = getattr(method, "keep", None)
    if not isinstance(method, CacheMethod) or not isinstance(keep, KVBudget):
        return False
    return isinstance(keep.value, int) or keep.is_bytes or keep.is_layers


def most_slots(plan: Plan, bound: BoundModel) -> int | None:
    """Slots of all layers and heads that a stream may ever hold: twice what its budgets say; None where nothing does.

    Layers may share slots out unequally, and some hold a few more than they are told.
    """
    config, depth = bound.lm.config, len(bound.layers)
    heads = getattr(config, "num_key_value_heads", None) or bound.info.heads
    found = []
    for method in plan.methods:
        if not _is_bound(method):
            continue
        keep: Any = method.keep  # type: ignore[attr-defined]
        slot = 2 * bound.info.head_dim * next(bound.lm.parameters()).element_size()
        if keep.is_layers:
            found.append(heads * sum(keep.value))
        else:
            found.append(keep.bytes // slot if keep.is_bytes else heads * depth * keep.value)
    return 2 * min(found) if found else None


def check_steps(plan: BoundPlan) -> None:
    """Refuse what a stream cannot give a step: the question, or the layers of the language model."""
    if plan.changes_pictures:
        raise UnsupportedError(
            f"{plan.plan} chooses, cuts or scales the pictures of a request, and a stream has frames; use methods that "
            "act on their tokens, and methods of the cache."
        )
    if plan.reads_text:
        raise UnsupportedError(
            f"{plan.plan} looks at the text, and frames of a stream are read before any question is known; use methods "
            "that look at pictures alone, and methods of the cache."
        )
    if plan.layers:
        raise UnsupportedError(
            f"{plan.plan} drops tokens at layers[{min(plan.layers)}]; a stream is reduced at features or projected, "
            "and in the cache."
        )
    if plan.cross_reads:
        raise UnsupportedError(
            f"{plan.plan} reads tokens beside the sequence, which would grow with each frame; use methods that leave "
            "all that is read in the sequence."
        )
    inside = (*plan.blocks.values(), *plan.halves.values())
    for number, _ in (pair for steps in inside for pair in steps):
        if plan.resolved.methods[number].streaming:
            raise UnsupportedError(
                f"{plan.resolved.methods[number].slug} remembers a stream inside the vision tower, which is not built."
            )


def keeps_distances(plan: Plan) -> bool:
    """Whether no token ever reads one that is further away than the slots that are held."""
    return any(getattr(method, "shift", False) is True for method in plan.methods)
