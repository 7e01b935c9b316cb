"""compress: the one line."""

from typing import Any

from winnow.core.errors import WinnowError
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.registry import method_class
from winnow.engine.attach import attach
from winnow.engine.doctor import diagnose
from winnow.engine.handle import Handle
from winnow.engine.spans import template_suffix
from winnow.engine.turns import Turns
from winnow.models.families import is_unchecked, unwrap

DEFAULT = "hiprune"


def compress(
    model: Any,
    plan: str | Plan | Method | None = None,
    *,
    keep: int | float | str | None = None,
    processor: Any = None,
    positions: str | None = None,
    text_encoder: Any = None,
    turns: str = "first",
    keep_features: str = "device",
) -> Handle:
    """Make a vision-language model read fewer tokens; call `model(**inputs)` and `model.generate(**inputs)` as usual.

    Args:
        model: a vision-language model of transformers, or a language model (for plans that compress the cache),
            wrapped by PEFT or torch.compile or not. Compiled callers stay right, and what is compressed runs eagerly
            inside them. A class without an adapter of its own (see `winnow families`) runs through the generic one,
            once the doctor's checks have passed on this very model: pass `processor` the first time, which takes
            seconds.
        plan: `"slug:key=value,… + slug:… | positions=keep"`, a Method or a Plan.
        keep: content tokens to keep of each item (64) or their share (0.25), with the default method: HiPrune. It
            runs on every supported family, reads no question, costs about 1 % of a prefill, and is best at 25 and
            12.5 % on the shipped model and its twin (`make measured` holds it to that rule).
        processor: its chat template shows where the question ends, and its tokenizer which words it has. Without it,
            what the template adds behind the question counts as part of it, words that say nothing of the picture
            count as well, and plans that read the question warn.
        text_encoder: for methods that compare pictures with text in CLIP's space (`text=clip`): the CLIP whose vision
            tower the model has, as `(CLIPModel, tokenizer)`, or as a Hub id or a folder that holds safetensors, which
            is read when a plan needs it. Needs `processor`.
        positions: `keep` or `compact`; overrides the plan's.
        turns: what a later question on the same cache does, where the plan reads the text: `first` keeps what was
            selected for the first question, `again` selects again, and reads the conversation again for it. Either
            way the ledger says so (`ledger.selection`).
        keep_features: under `again`, where the features of the pictures wait for it: on the `device`, or on the `cpu`.

    Raises:
        UnsupportedError: the model, the method on this model, or the version; with what does work.
        WinnowError: the plan cannot be read, or the model is compressed already.
    """
    inner = unwrap(model)
    chosen = chosen_plan(plan, keep, positions)
    if processor is not None and is_unchecked(inner):
        diagnose(inner, processor)  # a class without an adapter of its own; what it finds is remembered
    suffix = None if processor is None else template_suffix(processor)
    given = {"processor": processor, "text_encoder": text_encoder}
    return attach(model, chosen, suffix=suffix, turns=Turns.of(turns, keep_features), **given)


def chosen_plan(plan: str | Plan | Method | None, keep: int | float | str | None, positions: str | None) -> Plan:
    """The plan that a user asks for: as it is given, or the default method."""
    if plan is not None and keep is not None:
        raise WinnowError(f"give a plan or keep=, not both: write keep into the plan, as in '{DEFAULT}:keep={keep}'.")
    if plan is None:
        plan = method_class(DEFAULT).configured(**({} if keep is None else {"keep": keep}))
    return Plan.of(plan, positions=positions)
