"""What a search found: the plan, the table of its last rounds, and the plan file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from winnow.core.errors import WinnowError
from winnow.core.plan import Plan
from winnow.core.plan_file import write_plan_file
from winnow.tuning.halving import Standing
from winnow.tuning.limits import Limits
from winnow.tuning.loss import Loss

COLUMNS = ("plan", "first token, ms", "share of full [95 %]", "FLOPs", "KV, bytes", "lost in the search",
           "lost, held out", "at most", "verdict")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A finalist.

    Attributes:
        standing: what the search saw of it; its times are those of the last rounds, in which all finalists ran.
        held_out: what it lost on the questions held out; None where it was not asked them.
        verdict: why it is the plan, or why not.
    """

    standing: Standing
    held_out: Loss | None
    verdict: str

    def as_json(self, confidence: float) -> dict[str, Any]:
        time, held = self.standing.time, self.held_out
        found: dict[str, Any] = {
            "plan": str(self.standing.candidate.plan),
            "prefill_ms": round(time.ms, 3),
            "prefill_share": round(time.share.value, 4),
            "prefill_share_95": [round(time.share.low, 4), round(time.share.high, 4)],
            "flops_share": round(self.standing.flops, 4),
            "kv_bytes": self.standing.kv_bytes,
            "search": _loss(self.standing.loss, confidence),
            "verdict": self.verdict,
        }
        if held is not None:
            found["held_out"] = _loss(held, confidence)
        return found


def _loss(loss: Loss, confidence: float) -> dict[str, Any]:
    return {
        "questions": loss.n,
        "full_right": sum(loss.full),
        "right": sum(loss.mine),
        "lost": loss.lost,
        "gained": loss.gained,
        "loss": round(loss.value, 5),
        "loss_at_most": round(loss.at_most(confidence), 5),
    }


@dataclass(frozen=True)
class Tuned:
    """The result of `winnow.tune`.

    Attributes:
        plan: the plan that was found, as `winnow.compress` takes it; None where none could be proven.
        rows: of the finalists, fastest first.
        limits, confidence: what was asked for.
        resolution: shares of the full model's time that differ by less were called equal.
        full_ms: of the full model to the first token.
        tried: plans of the whole search.
        about: the model, the questions, the machine.
        unusable: plans that the model cannot run, and why.
    """

    plan: Plan | None
    rows: tuple[Row, ...]
    limits: Limits
    confidence: float
    resolution: float
    full_ms: float
    tried: int
    about: dict[str, Any] = field(repr=False)
    unusable: dict[str, str] = field(repr=False)

    @property
    def chosen(self) -> Row | None:
        """The row of the plan."""
        return next((row for row in self.rows if row.standing.candidate.plan == self.plan), None)

    @property
    def why_none(self) -> str:
        """What to do where no plan was found; empty where one was."""
        if self.plan is not None:
            return ""
        said = f"No plan is proven to keep the limit ({self.limits}) at {self.confidence:.3g} confidence"
        if self.limits.lose is None:
            return f"{said}: none of the plans costs so little. Raise the limit, or let --keep go lower."
        asked = [(row.held_out.enough(self.limits.lose, self.confidence), row) for row in self.rows if row.held_out]
        enough = min((n for n, _ in asked if n is not None), default=None)
        if enough is not None and asked:
            n = max(row.held_out.n for _, row in asked if row.held_out)
            return f"{said} by {n} questions held out; about {max(enough, n + 1)} may do, or a higher limit."
        return f"{said}. Raise the limit, or name more methods or larger budgets."

    def as_json(self) -> dict[str, Any]:
        """All of it, as the command prints it."""
        return {
            "plan": None if self.plan is None else str(self.plan),
            "key": None if self.plan is None else self.plan.key,
            **self._facts(),
            "finalists": [row.as_json(self.confidence) for row in self.rows],
            "unusable": self.unusable,
            "why_none": self.why_none,
        }

    def _facts(self) -> dict[str, Any]:
        limits = {k: v for k, v in vars(self.limits).items() if v is not None}
        return {
            "limits": limits,
            "confidence": self.confidence,
            "full_prefill_ms": round(self.full_ms, 3),
            "resolution": round(self.resolution, 4),
            "plans_tried": self.tried,
            **self.about,
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan file, which `winnow.compress` and every command take as a plan.

        Raises:
            WinnowError: no plan was found, or the name does not end in .json.
        """
        chosen = self.chosen
        if self.plan is None or chosen is None:
            raise WinnowError(self.why_none)
        return write_plan_file(path, self.plan.key, {**self._facts(), "measured": chosen.as_json(self.confidence)})

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Columns and rows for people."""
        return COLUMNS, [self._line(row) for row in self.rows]

    def _line(self, row: Row) -> tuple[str, ...]:
        time, held = row.standing.time, row.held_out
        share = f"{time.share.value:.2f} [{time.share.low:.2f}, {time.share.high:.2f}]"
        return (
            str(row.standing.candidate.plan), f"{time.ms:.2f}", share, f"{row.standing.flops:.1%}",
            f"{row.standing.kv_bytes:,}", _told(row.standing.loss), "–" if held is None else _told(held),
            "–" if held is None else f"{held.at_most(self.confidence):+.1%}", row.verdict,
        )  # fmt: skip


def _told(loss: Loss) -> str:
    return f"{loss.value:+.1%} (−{loss.lost} +{loss.gained} of {loss.n})"
