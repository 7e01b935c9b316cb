"""Frames that are items of their own in a family: one item where the caller names their video, a warning where not."""

import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from winnow.core.errors import WinnowError, WinnowWarning
from winnow.core.sampled import Sampled
from winnow.engine.bound_model import BoundModel
from winnow.engine.bound_plan import BoundPlan
from winnow.engine.encoding import EncoderRecord
from winnow.engine.item_tokens import Span


def of_videos(
    bound: BoundModel, plan: BoundPlan, spans: list[Span], record: EncoderRecord, videos: Sequence[Sampled] | None
) -> tuple[list[Span], EncoderRecord]:
    """The items of a request in a family whose frames are apart; in others, as they are.

    Args:
        videos: of the request, in the order of its prompts; empty where the caller says that there are none, None where
            nothing is known.

    Raises:
        WinnowError: the items are not the frames of the videos that were named, or the plan chooses frames and nobody
            says whether these are some.
    """
    if not bound.family.frames_apart or (record.modality == "image" and "video" in bound.token_ids):
        return spans, record
    if videos:
        return joined_frames(bound, spans, record, videos)
    if videos is None and max(Counter((s.row, record.layouts[s.number].key) for s in spans).values(), default=0) > 1:
        _say_what_is_not_known(bound, plan, known=record.modality == "video")
    return spans, record


def joined_frames(
    bound: BoundModel, spans: list[Span], record: EncoderRecord, videos: Sequence[Sampled]
) -> tuple[list[Span], EncoderRecord]:
    """One item for each video; readings are shared with the encoder's record."""
    counts = tuple(video.kept for video in videos)
    name, shown = bound.info.model, len(record.lengths)
    if sum(counts) != shown or max(record.parts, default=1) > 1:
        tiles = f" of {record.parts} tiles" if max(record.parts, default=1) > 1 else ""
        raise WinnowError(
            f"videos= names {len(counts)} videos of {', '.join(map(str, counts))} frames, and the request holds "
            f"{shown} pictures{tiles}. {name} is given each frame as a picture of one tile, so frames cannot be told "
            "from pictures beside them: name each video with the frames that the processor was given, and ask about "
            "other pictures in a request of their own."
        )
    ends = tuple(accumulate(counts))
    runs: dict[tuple[int, int], list[Span]] = {}
    for span in spans:
        runs.setdefault((span.row, bisect_right(ends, span.number)), []).append(span)
    for (row, number), own in runs.items():
        if len(own) != counts[number]:
            raise WinnowError(
                f"videos= names a video of {counts[number]} frames, of which {len(own)} stand in prompt {row}; name "
                "the videos in the order of the prompts."
            )
    lengths = tuple(sum(record.lengths[end - n : end]) for end, n in zip(ends, counts, strict=True))
    made = replace(record, lengths=lengths, parts=counts, modality="video")
    made.layouts = bound.family.layouts(bound.model, made)
    return [Span(row, at, torch.cat([span.where for span in own])) for (row, at), own in runs.items()], made


def _say_what_is_not_known(bound: BoundModel, plan: BoundPlan, *, known: bool) -> None:
    """Several pictures of one shape in a prompt may be frames, which some methods would take for pictures.

    Args:
        known: whether they are frames, of whatever videos.
    """
    name = f"{bound.info.model} is given the frames of a video as pictures of their own"
    how = "name the videos in `with handle.using(handle.plan, videos=[video])`"
    how += "" if known else ", or say that there are none: videos=[]"
    if plan.frames:
        raise WinnowError(
            f"{plan.plan} chooses frames, and {name}: choose them with video = handle.frames(video), and {how}."
        )
    blind = [method.slug for method in plan.resolved.methods if method.across_frames]
    if blind:
        warnings.warn(
            f"{' and '.join(blind)} looks across the frames of a video, and {name}. Those of this request were taken "
            f"for pictures, each by itself{'' if known else '; if they are frames'}: {how}.",
            WinnowWarning,
            stacklevel=2,
        )
