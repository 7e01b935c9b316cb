"""The points ahead of a processor, for one request: which of its pictures enter, how each is cut and scaled.

Steps at `prompt` see all pictures, then steps at `frames` each video, then steps at `pixels` each picture that is left.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from winnow.core.entered import Entered
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.prompt_view import PromptView
from winnow.core.reduction import Reduction
from winnow.core.step import Observe, State
from winnow.engine.bound_plan import BoundPlan
from winnow.engine.frames import SIDE, chosen_frames
from winnow.engine.messages import PreparedMessages, read_messages, rewritten
from winnow.engine.pixels import Given, cut_picture, small
from winnow.engine.selecting import followed, selection
from winnow.models.picture_sizes import PictureSizes
from winnow.video import Video


@dataclass(frozen=True, eq=False)
class Prompt:
    """A request as a plan's steps ahead of the processor left it.

    Attributes:
        messages: for `processor.apply_chat_template`; text is as it was. Of a video there are its frames.
        pictures: those that entered, opened, in order: for `processor(images=…)`.
        entered: how each of them entered.
        videos: with the frames that entered; `video.metadata` is for the processor.
        plan: key of the plan.
    """

    messages: PreparedMessages
    pictures: tuple[Image.Image, ...]
    entered: tuple[Entered, ...]
    videos: tuple[Video, ...]
    plan: str


def chosen_prompt(
    plan: BoundPlan,
    messages: Any,
    features: Tensor | None = None,
    question_features: Tensor | None = None,
    sizes: PictureSizes | None = None,
) -> Prompt:
    """Run the plan's steps at `prompt`, `frames` and `pixels` on the messages of one request.

    Args:
        features: `[K, D]` what is known of each picture.
        question_features: `[D]` what is known of the question.
        sizes: of the model's processor; None where they are not known.
    """
    if isinstance(messages, Prompt):
        raise WinnowError("this prompt was prepared already; give the messages that it was prepared from.")
    found = read_messages(messages)
    given = list(found.pictures.values())
    _check_features(features, question_features, len(given))
    _check_videos(plan, len(given), len(found.videos))
    chosen, done = _chosen(plan, given, found.text, features, question_features)
    changed: dict[tuple[int, int], Any] = dict.fromkeys(found.pictures)
    pictures, entered = [], []
    places = list(found.pictures)
    for number in chosen:
        image = given[number].image
        about = Entered(
            number, len(given), (image.height, image.width), (0, 0, *image.size), (image.height, image.width),
            steps=done, plan=plan.plan.key,
        )  # fmt: skip
        shown, image, about = cut_picture(plan, given[number], about, sizes)
        changed[places[number]] = shown
        pictures.append(image)
        entered.append(about)
    videos = {place: chosen_frames(plan, video) for place, video in found.videos.items()}
    changed |= {place: video.frames for place, video in videos.items()}
    made = rewritten(messages, changed)
    return Prompt(made, tuple(pictures), tuple(entered), tuple(videos.values()), plan.plan.key)


def _check_features(features: Tensor | None, question: Tensor | None, count: int) -> None:
    if features is not None and (features.ndim != 2 or features.shape[0] != count):
        raise WinnowError(f"features= has shape {tuple(features.shape)}; give one row for each of {count} pictures.")
    if question is not None and question.ndim != 1:
        raise WinnowError(f"question_features= has shape {tuple(question.shape)}; give one row, [D].")
    if features is not None and question is not None and features.shape[1] != question.shape[0]:
        raise WinnowError(
            f"features= have {features.shape[1]} numbers each and question_features= {question.shape[0]}; give both of "
            "one space."
        )


def _check_videos(plan: BoundPlan, pictures: int, videos: int) -> None:
    """Refuse a video to which a plan would do nothing, although its user meant the request to be shortened."""
    if videos and plan.pixels:
        raise UnsupportedError(
            f"{plan.plan} cuts and scales pictures, and no videos; use a method that acts on their tokens, or "
            "handle.using('full')."
        )
    if videos and plan.prompt and not pictures:
        raise UnsupportedError(f"{plan.plan} chooses among pictures, and the messages hold videos alone.")


def _chosen(
    plan: BoundPlan, given: list[Given], text: str, features: Tensor | None, question: Tensor | None
) -> tuple[list[int], tuple[tuple[str, str, Reduction], ...]]:
    """Which of the pictures enter, and the maps of the steps that said so."""
    left = list(range(len(given)))
    states: dict[int, State] = {}
    done: list[tuple[str, str, Reduction]] = []
    for number, step in plan.prompt if left else ():
        slug = plan.resolved.methods[number].slug
        view = PromptView(
            _previews([given[i].image for i in left]),
            torch.tensor([[(given[i].image.height, given[i].image.width) for i in left]]),
            text,
            None if features is None else features[left][None].float(),
            None if question is None else question[None].float(),
            plan.plan.seed,
            plan.modules.get(number),
        )
        action, states[number] = step.act(view, states.get(number, State()))
        if isinstance(action, Observe):
            continue
        own, kept = selection(action, view.n, step, slug, "pictures")
        states = {at: followed(state, kept) for at, state in states.items()}
        left = [left[i] for i in kept]
        done.append((str(step.at), slug, own))
    return left, tuple(done)


def _previews(images: list[Image.Image]) -> Tensor:
    """`[1, K, h, w, 3]` small copies, each in the upper left corner."""
    copies = [small(image, SIDE) for image in images]
    high, wide = (max(copy.shape[axis] for copy in copies) for axis in (0, 1))
    sheet = np.zeros((len(copies), high, wide, 3), np.uint8)
    for row, copy in zip(sheet, copies, strict=True):
        row[: copy.shape[0], : copy.shape[1]] = copy
    return torch.from_numpy(sheet)[None]
