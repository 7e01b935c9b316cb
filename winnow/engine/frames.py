"""The point `frames`: steps that say which frames of a video enter, before a processor or the model sees any."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.core.frames_view import FramesView
from winnow.core.reduction import Reduction
from winnow.core.sampled import Sampled
from winnow.core.step import Observe, State
from winnow.engine.bound_plan import BoundPlan
from winnow.engine.selecting import followed, selection
from winnow.video import Video

SIDE = 64  # pixels of the longer side of what steps see


def chosen_frames(plan: BoundPlan, video: Video, features: Tensor | None = None) -> Video:
    """The frames that the plan's steps at `frames` let in; all of them where it has none.

    Args:
        features: `[T, D]` what is known of each frame, for methods that ask for it.
    """
    if not isinstance(video, Video):
        raise WinnowError(f"frames of a {type(video).__name__} cannot be chosen; open it with winnow.open_video first.")
    if not plan.frames:
        return video
    if video.sampled.plan:
        raise WinnowError(f"these frames were chosen already, by {video.sampled.plan}; start from the opened video.")
    if features is not None and (features.ndim != 2 or features.shape[0] != len(video)):
        raise WinnowError(f"features= has shape {tuple(features.shape)}; give one row for each of {len(video)} frames.")
    states: dict[int, State] = {}
    done: list[tuple[str, str, Reduction]] = []
    for number, step in plan.frames:
        view = _view(plan, number, video, features)
        slug = plan.resolved.methods[number].slug
        action, states[number] = step.act(view, states.get(number, State()))
        if isinstance(action, Observe):
            continue
        own, chosen = selection(action, view.n, step, slug, "frames")
        states = {at: followed(state, chosen) for at, state in states.items()}
        video = video.take(chosen)
        features = None if features is None else features[chosen]
        done.append((str(step.at), slug, own))
    about = replace(video.sampled, reductions=tuple(done), plan=plan.plan.key)
    return Video(video.frames, video.times, about)


def _view(plan: BoundPlan, number: int, video: Video, features: Tensor | None) -> FramesView:
    pixels = torch.from_numpy(np.ascontiguousarray(video.small(SIDE)))[None]
    times = torch.tensor([video.times], dtype=torch.float32)
    known = None if features is None else features[None].float()
    return FramesView(pixels, times, known, plan.plan.seed, plan.modules.get(number))


def tell_videos(plan: BoundPlan, videos: Sequence[Sampled] | None, items: Sequence[Any]) -> None:
    """Say in the ledgers of a request's videos how their frames were chosen.

    Args:
        videos: what the caller named, in the order of the prompts; None: nothing.
        items: of the request, whose `record` is the ledger.

    Raises:
        WinnowError: the plan chooses frames and nobody says that it did, or the videos are not those of the request.
    """
    rows: dict[int, list[Any]] = {}
    for item in items:
        if item.record.modality == "video":
            rows.setdefault(item.row, []).append(item)
    if videos is None:
        if plan.frames and rows:
            raise WinnowError(
                f"{plan.plan} chooses frames, which it cannot do inside the model: choose them with "
                "video = handle.frames(video), and call the model in `with handle.using(handle.plan, videos=[video])`."
            )
        return
    if not rows:
        return
    groups = [rows[row] for row in sorted(rows)]
    shown = sum(map(len, groups))
    copies = max(1, shown // max(1, len(videos)))  # beams repeat each row
    originals = groups[::copies]
    if sum(map(len, originals)) != len(videos) or shown != copies * len(videos):
        raise WinnowError(f"videos= names {len(videos)} videos, and the request holds {shown}.")
    named = iter(videos)
    for number, original in enumerate(originals):
        own = [next(named) for _ in original]
        for group in groups[number * copies : (number + 1) * copies]:
            for item, sampled in zip(group, own, strict=True):
                _check(plan, sampled, item)
                item.record.frames = sampled


def _check(plan: BoundPlan, sampled: Sampled, item: Any) -> None:
    if plan.frames and sampled.plan != plan.plan.key:
        raise WinnowError(
            f"the frames of a video were not chosen by {plan.plan}: pass what handle.frames(video) returned."
        )
    frames = int(item.layout.place[:, 1].max()) + 1
    if frames > sampled.kept:
        raise WinnowError(f"the model was given {frames} frames of a video that has {sampled.kept}.")
