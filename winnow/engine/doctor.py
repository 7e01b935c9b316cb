"""The engine's own checks on a user's checkpoint: no large checkpoint is tested anywhere else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.engine.doctor_checks import CHECKS, Run, Subject
from winnow.models.families import family_of, unwrap
from winnow.models.inputs import model_inputs
from winnow.models.supported_versions import NEWEST, accept, is_untested, trying

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
    model in this process, if every check holds.

    Raises:
        UnsupportedError: the model's family is not supported.
        WinnowError: the processor does not fit the model.
    """
    with trying():
        family_of(unwrap(model))
        return run_checks(model, [model_inputs(model, processor, _picture(*size), ask) for size, ask in REQUESTS])


@torch.no_grad()
def run_checks(model: Any, samples: Sequence[dict[str, Tensor]]) -> list[Check]:
    """The checks of `diagnose` on two requests of unequal lengths, each prepared for the model."""
    with trying():
        subject = Subject.of(model, samples)
        checks = [_checked(subject, *check) for check in CHECKS]
    return [*checks, _judged(type(subject.inner).__name__, checks)] if is_untested() else checks


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
    told = f"{transformers.__version__} is newer than {newest}, the newest that winnow is tested with; {verdict}"
    return Check("an untested version of transformers", green, told)


def _picture(width: int, height: int) -> Image.Image:
    """A picture with structure everywhere."""
    x, y = torch.arange(width)[None].expand(height, -1), torch.arange(height)[:, None].expand(-1, width)
    return Image.fromarray((torch.stack([x, y, x ^ y], -1) % 256).to(torch.uint8).numpy())
