"""What one forward of the base model was called with: its encodings, its positions, its items and its questions."""

import dataclasses
import itertools
import sys
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.engine.bound_model import BoundModel
from winnow.engine.bound_plan import BoundPlan
from winnow.engine.cache import CacheState, check_cache, state_of
from winnow.engine.encoding import EncoderRecord, is_marked, record_of
from winnow.engine.frames import tell_videos
from winnow.engine.item_tokens import Span, find_spans, join_runs
from winnow.engine.lm_pass import LMPass
from winnow.engine.merged import merged_items
from winnow.engine.prompt_items import refuse_unprepared, tell_pictures
from winnow.engine.request import Request, listened, padding_mask
from winnow.engine.spans import question_span
from winnow.engine.stretching import stretches_text
from winnow.engine.video_items import of_videos


def encodings_of(called: dict[str, Any], plan: BoundPlan) -> dict[str, EncoderRecord]:
    """The records of encoder outputs that the caller made before."""
    outputs = called.get("mm_encoder_outputs") or {}
    found = {modality: record_of(output) for modality, output in outputs.items() if output is not None}
    foreign = [modality for modality, record in found.items() if record is None]
    if foreign and plan.plan.methods and is_marked(outputs[foreign[0]]):
        raise UnsupportedError(
            "a prompt that is prefilled in chunks (prefill_chunk_size) is not compressed: its pictures come in slices; "
            "leave prefill_chunk_size unset."
        )
    if foreign and plan.plan.methods:
        raise WinnowError(
            f"mm_encoder_outputs[{foreign[0]!r}] was made before the model was compressed; "
            "pass the pixels instead, or encode under the plan."
        )
    return {modality: record for modality, record in found.items() if record is not None}


def positions_of_later_turn(state: CacheState, called: dict[str, Any], axes: int) -> Any:
    """`[axes, B, q]` positions of new text behind a reduced prompt, from the request's own deltas.

    The model keeps the deltas on the module, where another request may have overwritten them.
    """
    given = called.get("position_ids")
    by_model = given is None or (given.ndim == 3 and given.shape[0] == 1)
    if state.rope_deltas is None or state.real is None or not by_model:
        return given
    new = called.get("input_ids")
    new = called.get("inputs_embeds") if new is None else new
    length = new.shape[1]  # type: ignore[union-attr]
    mask = called.get("attention_mask")
    if mask is None or length == 1:
        ranks = torch.arange(length, device=state.real.device)[None]
    else:
        ranks = (mask[:, -length:].to(state.real.device).cumsum(1) - 1).clamp_min(0)
    return (state.real[:, None] + ranks + state.rope_deltas)[None].expand(axes, -1, -1)


def start_lm(request: Request, arguments: dict[str, Any]) -> LMPass | None:
    """The pass through the LM, if there is anything to do: items, or a cache that holds a reduced prompt."""
    cache = arguments.get(request.bound.cache_name)
    _refuse_unseen(request)
    merged = merged_items(request) if not request.encodings else None
    quiet = not request.encodings and merged is None and state_of(cache) is None
    if quiet and not stretches_text(request.plan):
        _refuse_chunks(request)
        _refuse_left_out(request, cache)
        return None
    if request.plan.plan.methods:
        if request.encodings:
            request.bound.check_seams()
        if cache is not None:
            check_cache(cache, request.bound.windowed)
    given = padding_mask(request, arguments)
    if given is not None and (not isinstance(given, Tensor) or given.ndim != 2):
        raise UnsupportedError("compression takes a 2-D attention_mask (1 real, 0 padding); got a prepared mask.")
    if merged is not None:
        refuse_unprepared(request.plan, "with inputs_embeds that hold them already")
        spans, ends, ids = merged
        return LMPass(request, arguments, spans, questions_of(request, arguments, ids, ends), ends)
    if not request.encodings:
        return LMPass(request, arguments)
    ids = _token_ids(request)
    spans, ends = _spans(request, ids)
    made = LMPass(request, arguments, spans, questions_of(request, arguments, ids, ends), ends, ids)
    tell_videos(request.plan, request.videos, made.items)
    tell_pictures(request, ids.shape[0], made.items)
    return made


PIXELS = {
    "image": ("pixel_values", "pixel_values_images", "image_patches"),
    "video": ("pixel_values_videos",),
    "audio": ("input_features",),
}


def _refuse_unseen(request: Request) -> None:
    """Pictures that the model encoded by another way than the one that we listen to would be read in full."""
    if not request.plan.plan.methods:
        return
    for modality in listened(request).keys() - request.encodings.keys():
        given = [name for name in PIXELS.get(modality, ()) if request.called.get(name) is not None]
        if given:
            raise UnsupportedError(
                f"{request.bound.info.model} was given {given[0]} and did not encode it by "
                f"{', '.join(name for name, own, _ in request.bound.family.encoders if own == modality)}, so it cannot "
                "be compressed; use handle.using('full'), or report the class."
            )


def _refuse_left_out(request: Request, cache: Any) -> None:
    """A first forward without pictures is not the request whose pictures the caller named."""
    named = sum(map(len, request.prompts or ()))
    if named and (cache is None or cache.get_seq_length() == 0):
        raise WinnowError(
            f"prompt= lets {named} pictures in, and the request has none; make its inputs from chosen.messages."
        )


def _refuse_chunks(request: Request) -> None:
    """Placeholders without their pictures are read as words, as by the plain model; but not in a chunk of a prompt.

    `generate` passes the pictures of a chunked prompt with no chunk (transformers ≤ 5.22), and does not say so in its
    calls: its own frame tells.
    """
    ids = request.called.get("input_ids")
    if ids is None or ids.shape[1] == 1 or not request.plan.plan.methods:
        return
    if not any(bool((ids == token).any()) for token in listened(request).values()):
        return
    frame: Any = sys._getframe(1)
    while frame is not None and "generation_config" not in frame.f_locals:
        frame = frame.f_back
    if frame is not None and getattr(frame.f_locals["generation_config"], "prefill_chunk_size", None) is not None:
        raise UnsupportedError(
            "a prompt that is prefilled in chunks (prefill_chunk_size) is not compressed: its pictures would be read "
            "as words; leave prefill_chunk_size unset."
        )


def _token_ids(request: Request) -> Int[Tensor, "b s"]:
    """The prompt's token ids on the CPU; where only embeddings were given, its placeholders, and −1 elsewhere."""
    ids = request.called.get("input_ids")
    if ids is not None:
        return ids.cpu()
    given = request.called.get("inputs_embeds")
    if given is None:
        raise WinnowError("compression finds pictures by their placeholders; pass input_ids, or inputs_embeds.")
    found = torch.full(given.shape[:2], -1, dtype=torch.int64)
    table = request.bound.model.get_input_embeddings()
    for modality in request.encodings:
        token = request.bound.token_ids[modality]
        row = table(torch.full((), token, dtype=torch.int64, device=given.device))
        found[(given == row.to(given.device)).all(-1).cpu()] = token
    return found


def _spans(request: Request, ids: Tensor) -> tuple[list[tuple[Span, EncoderRecord]], list[int]]:
    """Where the items of all modalities stand, in order, and where the last one ends in each row."""
    found: list[tuple[Span, EncoderRecord]] = []
    ends = [0] * ids.shape[0]
    for modality, record in request.encodings.items():
        if record.plan is not request.plan:
            raise WinnowError("these encoder outputs were made under another plan; encode again under this one.")
        if request.bound.family.generic and record.undivided:
            _split_by_runs(request, ids, record)
        own, last = find_spans(ids, request.bound.token_ids[modality], record.lengths, modality)
        if request.bound.family.joined:
            own, record = joined_items(request.bound, own, record)
        own, record = of_videos(request.bound, request.plan, own, record, request.videos)
        found += [(span, record) for span in own]
        ends = [max(a, b) for a, b in zip(ends, last, strict=True)]
    return sorted(found, key=lambda pair: (pair[0].row, int(pair[0].where[0]))), ends


def _split_by_runs(request: Request, ids: Tensor, record: EncoderRecord) -> None:
    """Where an encoder gives the tokens of all its items as one, runs of placeholders tell them apart."""
    placeholder = ids == request.bound.token_ids[record.modality]
    total = int(placeholder.sum())
    if len(record.lengths) != 1 or total == 0 or total % record.lengths[0]:
        return
    edges = torch.nn.functional.pad(placeholder.int(), (1, 1)).diff(dim=1)
    starts, stops = (edges == 1).nonzero(), (edges == -1).nonzero()
    runs = (stops - starts)[:, 1].tolist()
    per_repeat = len(runs) // (total // record.lengths[0])
    if per_repeat > 1:
        record.lengths = tuple(runs[:per_repeat])
        record.layouts = request.bound.family.layouts(request.bound.model, record)


def joined_items(bound: BoundModel, spans: list[Span], record: EncoderRecord) -> tuple[list[Span], EncoderRecord]:
    """Items of the encoder in one run of placeholders are one item; readings are shared with the encoder's record."""
    own, parts = join_runs(spans)
    ends = list(itertools.accumulate(parts))
    lengths = tuple(sum(record.lengths[end - n : end]) for end, n in zip(ends, parts, strict=True))
    made = dataclasses.replace(record, lengths=lengths, parts=parts)
    made.layouts = bound.family.layouts(bound.model, made)
    return own, made


def questions_of(request: Request, arguments: dict[str, Any], ids: Tensor, ends: list[int]) -> list[tuple[int, int]]:
    """The span of the question of each row: the caller's, or the text behind the last item."""
    length, given = ids.shape[1], request.spans
    if given is not None and len(given) not in (1, len(ends)) and len(ends) % len(given):
        raise WinnowError(f"spans: got {len(given)} for a batch of {len(ends)} samples.")
    mask = padding_mask(request, arguments)
    # One read of the mask, and none where nobody asks for the question.
    mask = mask.cpu() if mask is not None and request.plan.reads_question else None
    questions = []
    for row, end in enumerate(ends):
        if given is not None:
            span = given[row * len(given) // len(ends)]
            if span[1] > length:
                raise WinnowError(f"spans: {span} ends behind the prompt of {length} tokens.")
            questions.append(span)
            continue
        real = None if mask is None else mask[row, -length:].nonzero()
        stop = int(real[-1]) + 1 if real is not None and len(real) else length
        questions.append(question_span(ids[row], max(end, request.question_from), stop, request.suffix or ()))
    return questions
