"""What a request of the page asks, each field checked by itself before anything of it is opened or made."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.core.plan import FULL, Plan
from winnow.media import Limits, MediaError, open_base64
from winnow.serve.errors import ApiError, invalid, told
from winnow.serve.plans import requested_plan
from winnow.serve.settings import Settings
from winnow.world import Scene, scene
from winnow.world.export import scene_in

LONGEST_QUESTION = 2_000  # characters
RUNS = 20  # timed runs of a request
TOKENS = 256  # of an answer
STAMPED = 5_464  # characters of base64 that hold where a picture says it comes from
FIELDS = ("picture", "question", "plan", "keep", "runs", "max_new_tokens")


@dataclass(frozen=True)
class Picture:
    """An upright RGB picture, and the scene of winnow's world that it is, where it is one."""

    image: Image.Image
    scene: Scene | None


@dataclass(frozen=True)
class Asked:
    """One question about one picture under one plan.

    Attributes:
        keep: the budget that replaces that of the plan's only method; None: as the plan says.
        runs: timed runs after a warm-up.
    """

    picture: Picture
    question: str
    plan: Plan
    keep: Budget | None
    runs: int
    max_new_tokens: int


def picture_of(given: Mapping[str, Any], limits: Limits) -> Picture:
    """The picture of a request: `world:SEED`, or a data: URL with base64. Nothing is opened by name.

    Raises:
        ApiError: it is none of these, or not a picture within the limits.
    """
    text = given.get("picture")
    if not isinstance(text, str):
        raise invalid("picture must be world:SEED, or a picture as a data: URL.", "picture")
    if text.startswith("world:"):
        if not re.fullmatch(r"world:\d{1,14}", text, re.ASCII):
            raise invalid("A scene is world:SEED with a whole number of at most 14 digits.", "picture")
        drawn = scene(int(text.removeprefix("world:")), split="test")
        return Picture(drawn.image, drawn)
    if not text.startswith("data:"):
        raise invalid("picture must be world:SEED, or a picture as a data: URL; no file and no address.", "picture")
    try:
        image = open_base64(text, limits=limits)
    except MediaError as refused:
        said, status = str(refused), refused.status
    else:
        head = base64.b64decode(text.partition(",")[2][:STAMPED])
        return Picture(image, scene_in(head, image))
    raise invalid(f"This picture is not taken: {said}.", "picture", "invalid_picture", status)


def asked_of(given: Mapping[str, Any], settings: Settings) -> Asked:
    """What is to be answered.

    Raises:
        ApiError: a field is missing, unknown or not allowed.
    """
    if unknown := [name for name in given if name not in FIELDS]:
        raise invalid(f"Unknown field {unknown[0][:64]!r}; allowed: {', '.join(FIELDS)}.", unknown[0][:64])
    question = given.get("question")
    if not isinstance(question, str) or not question.strip():
        raise invalid("Ask a question.", "question")
    if len(question) > LONGEST_QUESTION:
        raise invalid(f"The question has {len(question)} characters; at most {LONGEST_QUESTION} are taken.", "question")
    plan = _plan(given.get("plan"), settings)
    keep = _keep(given.get("keep"), plan)
    runs, tokens = _whole(given, "runs", 1, RUNS), _whole(given, "max_new_tokens", 16, TOKENS)
    return Asked(picture_of(given, settings.picture), question.strip(), plan, keep, runs, tokens)


def _plan(text: Any, settings: Settings) -> Plan:
    if not isinstance(text, str) or not text.strip():
        raise invalid(f"plan must be a plan, such as 'SLUG:keep=25%', or {FULL!r}.", "plan")
    try:
        return requested_plan(text, settings)
    except ApiError as error:
        problem = error.message.replace("winnow.plan", "plan", 1)  # where it stands in a body of `winnow serve`
    raise invalid(problem, "plan", "invalid_plan")


def _keep(value: Any, plan: Plan) -> Budget | None:
    if value is None:
        return None
    if not isinstance(value, str) or not re.fullmatch(r"\d{1,6}|\d{1,3}(\.\d{1,3})?%", value, re.ASCII):
        raise invalid("keep must be a number of tokens ('64') or a share ('25%'), as text.", "keep")
    if len(plan.methods) != 1:
        raise invalid("keep goes with a plan of one method; write keep=… into a longer one.", "keep")
    try:
        return Budget(value)
    except WinnowError as error:
        problem = told(error)
    raise invalid(problem, "keep")


def _whole(given: Mapping[str, Any], name: str, default: int, most: int) -> int:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise invalid(f"{name} must be a whole number from 1 to {most}.", name)
    return value
