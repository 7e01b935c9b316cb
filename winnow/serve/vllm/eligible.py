"""Which plans vLLM can serve: derived from where their steps act and what they look at."""

from __future__ import annotations

import sys

from winnow.core.errors import UnsupportedError
from winnow.core.plan import Plan
from winnow.engine.bound_plan import BoundPlan


def check_positions(plan: Plan, known: str, model: str) -> None:
    """Refuse a position policy that vLLM does not have for a model."""
    if plan.methods and plan.positions != known:
        why = (
            "numbers the tokens of a prompt without gaps"
            if known == "compact"
            else "gives kept tokens their 3-D positions"
        )
        raise UnsupportedError(f"positions={plan.positions}: for {model}, vLLM {why}; write | positions={known}.")


def check_eligible(plan: BoundPlan) -> None:
    """Refuse what vLLM cannot give a method: it encodes a picture before, and for, all questions about it."""
    text = plan.plan
    if plan.changes_pictures:
        raise UnsupportedError(
            f"{text} chooses, cuts or scales pictures before a processor reads them, and vLLM's has read them before "
            "winnow is asked; use a method that acts on tokens."
        )
    if plan.reads_text or plan.text_signals or plan.needs_text_encoder:
        raise UnsupportedError(
            f"{text} reads the question. vLLM encodes a picture once for all questions about it, and before it knows "
            "one; use a method that looks at the picture alone."
        )
    if plan.layers or plan.kv or plan.cross_reads:
        raise UnsupportedError(
            f"{text} acts inside the language model or looks at it; under vLLM methods act on what the encoder gives."
        )
    if plan.modules:
        raise UnsupportedError(
            f"{text} has trained weights, which cannot be checked against the model that vLLM has loaded; use a "
            "method that was not trained."
        )
    elsewhere = sorted({site.stack for site in plan.listeners} - {"vision", "pixels"})
    if elsewhere:
        raise UnsupportedError(f"{text} looks at the {elsewhere[0]}, which winnow does not show it under vLLM.")
    for method in plan.resolved.methods:
        if method.streaming:
            raise UnsupportedError(f"{method.slug} remembers earlier pictures of a request, which vLLM does not keep.")
        if method.stretch(sys.maxsize) is not None:
            raise UnsupportedError(f"{method.slug} stretches rotary positions, which vLLM computes by itself.")
