"""Spans: which text of a prompt is the question.

They come from the caller, else from the chat template, else the question is the text after the last item.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.models.inputs import templated

MARK = "winnowquestion"


def template_suffix(processor: Any) -> tuple[int, ...]:
    """Token ids that the chat template puts after the user's text (the start of the answer).

    Empty if unknown: there is no template, or it fails, or its text lacks the question or the picture.
    """
    if processor is None or not getattr(processor, "chat_template", None):
        return ()
    text = templated(processor, MARK)
    if text is None or text.count(MARK) != 1:
        return ()
    suffix = text.partition(MARK)[2]
    tokenizer = getattr(processor, "tokenizer", processor)
    return tuple(tokenizer(suffix, add_special_tokens=False)["input_ids"]) if suffix else ()


def checked_spans(spans: Any) -> tuple[tuple[int, int], ...] | None:
    """The caller's question spans: one (start, end) of token positions for each sample, padding included."""
    if spans is None:
        return None
    try:
        pairs = tuple((int(s), int(e)) for s, e in spans)
    except (TypeError, ValueError):
        raise WinnowError(f"spans: one (start, end) of token positions for each sample; got {spans!r}.") from None
    if any(not 0 <= s < e for s, e in pairs):
        raise WinnowError(f"spans: each needs 0 ≤ start < end; got {pairs}.")
    return pairs


def question_span(ids: Sequence[int] | Tensor, after: int, end: int, suffix: Sequence[int]) -> tuple[int, int]:
    """The question of one row: from `after` (behind the last item) to `end`, less the template's suffix.

    Where nothing follows the last item (a bare picture), the last token stands for the question.
    """
    n = len(suffix)
    if n and end - n > after and [int(token) for token in ids[end - n : end]] == list(suffix):
        end -= n
    return (after, end) if after < end else (max(0, end - 1), end)
