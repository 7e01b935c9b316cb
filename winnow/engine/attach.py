"""attach: a plan on a model whose adapter is known."""

from typing import Any

from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.engine.engine import Engine
from winnow.engine.forward import check_training
from winnow.engine.handle import Handle
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
    check_training(inner)
    engine = Engine(inner, family, Plan.of(plan, positions=positions), suffix)
    engine.attach()
    return Handle(engine)
