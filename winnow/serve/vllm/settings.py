"""What the operator of a vLLM server allows, and what a request chooses of it.

The operator's settings are the entry `winnow` of the model's configuration, where every process of vLLM sees them:
`--hf-overrides '{"winnow": {"plan": "fastervlm:keep=64", "plans": ["divprune:keep=64"], "least": 16}}'`. A request
chooses one of the plans and a budget by `mm_processor_kwargs={"winnow": {"plan": "divprune", "keep": 40}}`; `false`
turns compression off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.core.plan import FULL, Plan

KEY = "winnow"
LONGEST = 12  # characters of a budget


@dataclass(frozen=True)
class Settings:
    """The operator's settings.

    Attributes:
        plan: what holds where a request says nothing.
        plans: further plans that a request may name, by their text or by the names of their methods.
        least, most: what a request may keep of the content tokens of a picture or a video. `most` below 100% forbids
            `false`.
    """

    plan: str = FULL
    plans: tuple[str, ...] = ()
    least: Budget = Budget(1)
    most: Budget = Budget("100%")

    @staticmethod
    def of(config: Any) -> Settings | None:
        """The settings in a model's configuration; None: the operator did not ask for winnow."""
        given = getattr(config, KEY, None)
        if given is None:
            return None
        known = [f.name for f in fields(Settings)]
        if not isinstance(given, Mapping) or set(given) - set(known):
            raise WinnowError(f"{KEY}={given!r} in the configuration; give an object with {', '.join(known)}.")
        values = dict(given)
        if not isinstance(values.get("plan", FULL), str):
            raise WinnowError(f"{KEY}.plan={values['plan']!r}; give the text of a plan.")
        plans = values.get("plans", ())
        if not isinstance(plans, list | tuple) or not all(isinstance(plan, str) for plan in plans):
            raise WinnowError(f"{KEY}.plans={plans!r}; give a list of the texts of plans.")
        values["plans"] = tuple(plans)
        for name in {"least", "most"} & set(values):
            values[name] = Budget.parse(values[name])
        return Settings(**values)

    @property
    def allowed(self) -> tuple[str, ...]:
        """All plans that a request may name."""
        return tuple(dict.fromkeys((self.plan, *self.plans)))

    def chosen(self, request: Any, positions: str) -> Plan:
        """The plan of a request.

        Args:
            request: what it says under `winnow`; None and True: nothing.
            positions: the policy that vLLM has for this model, which a text that names none means.

        Raises:
            WinnowError: the operator does not allow it, or it cannot be read.
        """
        if request is False:
            return Plan(())
        if request is None or request is True:
            return parsed(self.plan, positions)
        if isinstance(request, str):
            request = {"plan": request}
        if not isinstance(request, Mapping) or set(request) - {"plan", "keep"}:
            raise WinnowError(f"{KEY}: give false, or an object with plan, keep or both; got {str(request)[:100]!r}.")
        plan = self._named(request.get("plan"), positions)
        keep = request.get("keep")
        return plan if keep is None else _at_budget(plan, keep)

    def _named(self, name: Any, positions: str) -> Plan:
        if name is None:
            return parsed(self.plan, positions)
        for text in self.allowed:
            plan = parsed(text, positions)
            if name in (text, "+".join(method.slug for method in plan.methods)):
                return plan
        allowed = ", ".join(map(repr, self.allowed))
        raise WinnowError(f"{KEY}.plan={str(name)[:100]!r} is not offered by this server; it offers {allowed}.")

    def check_kept(self, kept: int, content: int, what: str = "picture") -> None:
        """Refuse a request that keeps less or more of a picture or a video than the operator allows."""
        if not self.least.of(content) <= kept <= self.most.of(content):
            raise WinnowError(
                f"{KEY}: {kept} of the {content} tokens of a {what} would be kept; this server allows "
                f"{self.least} to {self.most}."
            )


def parsed(text: str, positions: str) -> Plan:
    """A plan from its text; where that names no position policy, the one that vLLM has for the model."""
    plan = Plan.parse(text)
    return plan if "positions=" in text else replace(plan, positions=positions)


def _at_budget(plan: Plan, keep: Any) -> Plan:
    if isinstance(keep, str) and len(keep) > LONGEST:
        raise WinnowError(f"{KEY}.keep has {len(keep)} characters; give a number of tokens or a share.")
    budget = Budget.parse(keep)
    if len(plan.methods) != 1 or "keep" not in plan.methods[0].settings():
        raise WinnowError(f"{KEY}.keep: {plan} has no single budget to set; name a plan that has one.")
    return replace(plan, methods=(plan.methods[0].at_budget(budget, 0),))
