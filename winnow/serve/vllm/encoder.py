"""The worker: pictures are encoded in batches that fit, videos one by one, and the library's own engine shortens what
comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.engine.bound_plan import BoundPlan
from winnow.serve.vllm.frame_text import in_text
from winnow.serve.vllm.inputs import batches, of_call, part_of
from winnow.serve.vllm.order import FIELD, Order
from winnow.serve.vllm.refusals import check_engine, check_version
from winnow.serve.vllm.settings import Settings, parsed
from winnow.serve.vllm.subject import Shortened, Subject, subject_of
from winnow.serve.vllm.taps import Taps


class CompressedEncoder:
    """Mixed into a model class of vLLM.

    Attributes:
        winnow: the served model; None: the operator did not ask for winnow, and nothing changes.
    """

    winnow: Subject | None = None
    config: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        settings = Settings.of(config)
        if settings is None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
            return
        check_version()
        subject = subject_of(config)
        plans = [subject.bind(parsed(text, subject.positions).key) for text in settings.allowed]
        check_engine(vllm_config, plans)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.winnow = subject
        self._taps = Taps(self, subject)
        for plan in plans:
            self._taps.check(plan)
        self._most = vllm_config.scheduler_config.max_num_encoder_input_tokens

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """What is left of each picture or video, `[items][m, D]`."""
        data = kwargs.pop(FIELD, None)
        if self.winnow is None or data is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        orders = [Order.decoded(own) for own in data]
        made: list[Tensor | None] = [None] * len(orders)
        for numbers in batches(orders, self._most):
            part = part_of(kwargs, numbers, len(orders))
            for number, own in zip(numbers, self._encoded(part, [orders[n] for n in numbers]), strict=True):
                made[number] = own
        return tuple(made)

    def _encoded(self, kwargs: dict[str, Any], orders: Sequence[Order]) -> Iterator[Tensor]:
        """One call of the encoder, for pictures of one plan, or for a video."""
        subject: Subject = self.winnow  # type: ignore[assignment]
        plan = subject.bind(orders[0].plan)
        given = dict(kwargs)  # vLLM's models take them apart
        if orders[0].unchanged:
            for own in super().embed_multimodal(**given):  # type: ignore[misc]
                yield own.reshape(-1, own.shape[-1])
            return
        items = [n for order in orders for n in order.items]
        record = subject.record(plan, of_call(kwargs), items, orders[0].modality)
        with self._taps.listening(plan, record):
            encoded = super().embed_multimodal(**given)  # type: ignore[misc]
        rows = [part for own, order in zip(encoded, orders, strict=True) for part in _split(own, order)]
        with torch.no_grad():
            short = iter(subject.shorten(record, rows, self._width(rows[0])))
        for number, order in enumerate(orders):
            own = [next(short) for _ in order.items]
            _check_counts(order, own, plan)
            yield self._placed(_joined(own, order), order, kwargs, number)

    def _width(self, rows: Tensor) -> int:
        """The width of the language model, where rows hold those of deepstack layers as well."""
        width = self.config.get_text_config().hidden_size
        return width if rows.shape[-1] != width else 0

    def _placed(self, own: Shortened, order: Order, kwargs: dict[str, Any], number: int) -> Tensor:
        """The rows with what tells where they belong: the text of frames; nothing more where positions have one axis.

        Args:
            own: what is left of one picture or video.
            number: of it in the call.
        """
        return in_text(own, order, self)[0]


def _split(rows: Tensor, order: Order) -> tuple[Tensor, ...]:
    rows = rows.reshape(-1, rows.shape[-1])
    if rows.shape[0] != sum(order.runs):
        raise WinnowError(f"vLLM's encoder gave {rows.shape[0]} tokens of {order.what} with {order.runs} placeholders.")
    return rows.split(list(order.items))


def _joined(short: Sequence[Shortened], order: Order) -> Shortened:
    """The items of a picture as one, whose placeholders are numbered on."""
    starts = [0, *accumulate(order.items)]
    return Shortened(
        sum(own.content for own in short),
        torch.cat([own.rows for own in short]),
        torch.cat([own.slots + start for own, start in zip(short, starts, strict=False)]),
        torch.cat([own.places + start for own, start in zip(short, starts, strict=False)]),
    )


def _check_counts(order: Order, short: Sequence[Shortened], plan: BoundPlan) -> None:
    counts = tuple(x.rows.shape[0] for x in short)
    if counts != order.kept:
        raise WinnowError(
            f"{plan.plan} kept {counts} tokens of {order.what}, and {order.kept} were announced from its shape; leave "
            "the plan out of the settings, and report it."
        )
