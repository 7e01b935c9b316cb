"""compress: the one line."""

from typing import Any

from winnow.core.errors import WinnowError
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.registry import method_class
from winnow.engine.engine import Engine
from winnow.engine.forward import check_training
from winnow.engine.handle import Handle
from winnow.engine.spans import template_suffix
from winnow.models.families import family_of, unwrap

DEFAULT = "hiprune"


def compress(
    model: Any,
    plan: str | Plan | Method | None = None,
    *,
    keep: int | float | str | None = None,
    processor: Any = None,
    positions: str | None = None,
) -> Handle:
    """Make a vision-language model read fewer tokens; call `model(**inputs)` and `model.generate(**inputs)` as usual.

    Args:
        model: a ForConditionalGeneration model of a supported family, wrapped by PEFT or torch.compile or not. Compiled
            callers stay right, and what is compressed runs eagerly inside them.
        plan: `"slug:key=value,… + slug:… | positions=keep"`, a Method or a Plan.
        keep: content tokens to keep of each item (64) or their share (0.25), with the default method: HiPrune. It
            runs on every supported family, reads no question, costs about 1 % of a prefill, and is best at 25 and
            12.5 % on the shipped model and its twin (`make measured` holds it to that rule).
        processor: its chat template shows where the question ends. Without it, what the template adds behind the
            question counts as part of it, and plans that read the question warn.
        positions: `keep` or `compact`; overrides the plan's.

    Raises:
        UnsupportedError: the model, the method on this model, or the version; with what does work.
        WinnowError: the plan cannot be read, or the model is compressed already.
    """
    inner = unwrap(model)
    family = family_of(inner)
    chosen = chosen_plan(plan, keep, positions)
    check_training(inner)
    suffix = None if processor is None else template_suffix(processor)
    engine = Engine(inner, family, chosen, suffix)
    engine.attach()
    return Handle(engine)


def chosen_plan(plan: str | Plan | Method | None, keep: int | float | str | None, positions: str | None) -> Plan:
    """The plan that a user asks for: as it is given, or the default method."""
    if plan is not None and keep is not None:
        raise WinnowError(f"give a plan or keep=, not both: write keep into the plan, as in '{DEFAULT}:keep={keep}'.")
    if plan is None:
        plan = method_class(DEFAULT).configured(**({} if keep is None else {"keep": keep}))
    return Plan.of(plan, positions=positions)
