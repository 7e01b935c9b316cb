"""prepare: shorten the inputs, and leave the model as it is."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from winnow.core.errors import WinnowError
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.engine.preparation import Preparation
from winnow.engine.prepared import Bucket, Prepared, bucketed, joined


def prepare(
    model: Any,
    inputs: Mapping[str, Any],
    plan: str | Plan | Method | None = None,
    *,
    keep: int | float | str | None = None,
    positions: str | None = None,
    bucket: Bucket = None,
    use_cache: bool = True,
    weights: Any = None,
    processor: Any = None,
    text_encoder: Any = None,
) -> Prepared:
    """Shortened inputs for the plain model: for static caches, chunked prefill, `torch.compile` and batching servers.

    Nothing is attached, in no thread, and nothing is left: `model.generate(**prepared.inputs)` is a plain call.

    Args:
        model: as `compress` takes it; what is compiled in place may stay so, and is encoded with eagerly.
        inputs: what a processor made: `input_ids`, `attention_mask` and pixels. Rows of a batch may differ in length.
        plan, keep, positions: as in `compress`; steps act at `features` and `projected`.
        bucket: prompts are padded to a multiple of this number, or to the smallest width of a list that holds them and
            one slot of padding, so that what is compiled for shapes is compiled for few.
        use_cache: False makes inputs for `generate(use_cache=False)`, which are one slot wider.
        weights: a folder that `handle.save` wrote for this plan, for methods that were trained.
        processor, text_encoder: as in `compress`, for plans that read the question.

    Raises:
        UnsupportedError: the class, the method or the plan cannot be had by shortened inputs; with what to do.
        WinnowError: the inputs cannot be read.
    """
    given = {"processor": processor, "text_encoder": text_encoder}
    made = Preparation(model, plan, keep=keep, positions=positions, weights=weights, **given)
    return made.of(inputs, bucket=bucket, use_cache=use_cache)


def prepare_many(
    model: Any,
    requests: Iterable[Mapping[str, Any]],
    plan: str | Plan | Method | None = None,
    *,
    keep: int | float | str | None = None,
    positions: str | None = None,
    bucket: Bucket = None,
    batch: int | None = None,
    weights: Any = None,
    processor: Any = None,
    text_encoder: Any = None,
) -> list[Prepared]:
    """Requests as batches of one compressed width each, for a server: `prepared.requests` says whose the rows are.

    Args:
        requests: the inputs of each; their other arguments are those of `prepare`.
        batch: the largest number of rows of a batch, unless one request has more.
    """
    if batch is not None and batch < 1:
        raise WinnowError(f"batch={batch}; give a number of rows from 1.")
    given = {"processor": processor, "text_encoder": text_encoder}
    made = Preparation(model, plan, keep=keep, positions=positions, weights=weights, **given)
    groups: dict[int, list[Prepared]] = {}
    for number, inputs in enumerate(requests):
        own = made.of(inputs)
        width = own.width if bucket is None else bucketed(own.width + 1, bucket)  # with padding in every row
        groups.setdefault(width, []).append(replace(own, requests=(number,) * len(own.sizes)))
    batches: list[Prepared] = []
    for width, group in sorted(groups.items()):
        batches += [joined(part, width) for part in _parts(group, batch)]
    return batches


def _parts(group: list[Prepared], batch: int | None) -> Iterable[list[Prepared]]:
    part: list[Prepared] = []
    for own in group:
        if batch is not None and part and sum(len(p.sizes) for p in part) + len(own.sizes) > batch:
            yield part
            part = []
        part.append(own)
    yield part
