"""attach: a plan on a model whose adapter is known."""

from typing import Any

from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.engine.engine import Engine
from winnow.engine.handle import Handle
from winnow.engine.saving import SaveMethod, savers
from winnow.models.families import family_of, unwrap


def attach(
    model: Any, plan: str | Plan | Method, *, positions: str | None = None, suffix: tuple[int, ...] | None = None
) -> Handle:
    """Attach a plan; see `compress`.

    Args:
        suffix: token ids that the chat template puts behind the question; None: unknown.
    """
    inner = unwrap(model)
    family = family_of(inner)
    engine = Engine(inner, family, Plan.of(plan, positions=positions), suffix)
    engine.attach()
    handle = Handle(engine)
    for owner in savers(model, inner):
        engine.stand_in(owner, SaveMethod(handle, owner))
    return handle
