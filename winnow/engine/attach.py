"""attach: a plan on a model whose adapter is known."""

from typing import Any

from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.engine.engine import Engine
from winnow.engine.handle import Handle
from winnow.engine.saving import SaveMethod, savers
from winnow.engine.turns import Turns
from winnow.models.families import family_of, unwrap

FIRST_TURN = Turns()


def attach(
    model: Any,
    plan: str | Plan | Method,
    *,
    suffix: tuple[int, ...] | None = None,
    turns: Turns = FIRST_TURN,
    processor: Any = None,
    text_encoder: Any = None,
) -> Handle:
    """Attach a plan; see `compress`.

    Args:
        suffix: token ids that the chat template puts behind the question; None: unknown.
        turns: what a later turn does with pictures that were selected for an earlier question.
        processor: whose tokenizer tells words apart.
        text_encoder: CLIP's, for methods that compare pictures with text in its space.
    """
    inner = unwrap(model)
    family = family_of(inner)
    engine = Engine(inner, family, Plan.of(plan), suffix, turns, processor, text_encoder)
    engine.attach()
    handle = Handle(engine)
    for owner in savers(model, inner):
        engine.stand_in(owner, SaveMethod(handle, owner))
    return handle
