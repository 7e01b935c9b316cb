"""The engine's own checks on a user's checkpoint: no large checkpoint is tested anywhere else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.engine.bound_model import BoundModel
from winnow.engine.doctor_cache import CACHE_CHECKS
from winnow.engine.doctor_checks import ENGINE_CHECKS, Run, Subject
from winnow.models.acceptance import accept_points
from winnow.models.families import family_of, unwrap
from winnow.models.inputs import model_inputs
from winnow.models.supported_versions import NEWEST, accept, installed, is_untested, trying

CHECKS = (*ENGINE_CHECKS[:-1], *CACHE_CHECKS, ENGINE_CHECKS[-1])  # detaching comes last

GENERIC = "the generic adapter on this class"

# Of different lengths, about pictures of different shapes: a batch of both is padded.
REQUESTS = (
    ((336, 336), "What is in the picture?"),
    ((336, 200), "What is in the picture, and which of its colors is the brightest of all?"),
)


@dataclass(frozen=True)
class Check:
    """One check: its name, whether it held, and what was seen; if it did not hold, also what is suspected."""

    name: str
    ok: bool
    detail: str


def diagnose(model: Any, processor: Any) -> list[Check]:
    """Run the engine's checks on this model.

    A version of transformers that is newer than all that winnow is tested with passes from now on, for this class of
    model in this process, if every check holds. A class without an adapter of its own is accepted at the points where
    every check holds, and that is remembered for its class, version and configuration.

    Raises:
        UnsupportedError: the model's family is not supported.
        WinnowError: the processor does not fit the model.
    """
    with trying():
        family_of(unwrap(model))
        return run_checks(model, [model_inputs(model, processor, _picture(*size), ask) for size, ask in REQUESTS])


@torch.no_grad()
def run_checks(model: Any, samples: Sequence[dict[str, Tensor]], batch: dict[str, Tensor] | None = None) -> list[Check]:
    """The checks of `diagnose` on two requests of unequal lengths, each prepared for the model.

    Args:
        samples: the inputs of each request alone.
        batch: both in one left-padded batch; made from the samples where it is not given; empty: not checked.
    """
    with trying():
        inner = unwrap(model)
        family = family_of(inner)
        BoundModel.of(inner, family)  # a seam that is missing is named here, before the model fails on it
        points = tuple(point for point in ("projected", "layers") if family.generic or point in family.points)
        checks = _run(model, samples, batch, points)
        if family.generic:
            checks = _accept(model, samples, batch, checks)
    return [*checks, _judged(type(inner).__name__, checks)] if is_untested() else checks


def _run(
    model: Any, samples: Sequence[dict[str, Tensor]], batch: dict[str, Tensor] | None, points: tuple[str, ...]
) -> list[Check]:
    subject = Subject.of(model, samples, batch, points)
    return [_checked(subject, *check) for check in CHECKS]


def _accept(
    model: Any, samples: Sequence[dict[str, Tensor]], batch: dict[str, Tensor] | None, checks: list[Check]
) -> list[Check]:
    """Accept a class without an adapter of its own at the points where every check holds."""
    red = [check for check in checks if not check.ok]
    if not red:
        accept_points(unwrap(model), ("projected", "layers"))
        return [*checks, Check(GENERIC, True, "accepted at projected and inside the LM")]
    again = _run(model, samples, batch, ("projected",))
    if not all(check.ok for check in again):
        return [*checks, Check(GENERIC, False, "not accepted, because a check failed")]
    accept_points(unwrap(model), ("projected",))
    return [*again, Check(GENERIC, True, f"accepted at projected; not inside the LM: {red[0].name}: {red[0].detail}")]


def _checked(subject: Subject, name: str, run: Run, suspects: str) -> Check:
    try:
        ok, detail = run(subject)
    except WinnowError as error:
        ok, detail = False, str(error)
    except Exception as error:
        ok, detail = False, f"{type(error).__name__} in the model"
    return Check(name, ok, detail if ok else f"{detail.rstrip('.')}. Suspect: {suspects}.")


def _judged(model: str, checks: Sequence[Check]) -> Check:
    """Accept an untested version of transformers for a class of model, or not."""
    green = all(check.ok for check in checks)
    if green:
        accept(model)
    verdict = f"accepted for {model} in this process" if green else "not accepted, because a check failed"
    newest = ".".join(map(str, NEWEST))
    told = f"{installed()} is newer than {newest}, the newest that winnow is tested with; {verdict}"
    return Check("an untested version of transformers", green, told)


def _picture(width: int, height: int) -> Image.Image:
    """A picture with structure everywhere."""
    x, y = torch.arange(width)[None].expand(height, -1), torch.arange(height)[:, None].expand(-1, width)
    return Image.fromarray((torch.stack([x, y, x ^ y], -1) % 256).to(torch.uint8).numpy())
