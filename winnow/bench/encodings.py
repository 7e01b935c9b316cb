"""Pictures that were encoded before, for plans that leave the tower alone: those of the KV cache."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from winnow.bench.reuse import encode
from winnow.engine.encoding import record_of
from winnow.engine.handle import Handle


class Encodings:
    """What the encoder of one model gave for pictures, so that many plans are asked about them."""

    def __init__(self) -> None:
        self._outputs: dict[tuple[bytes, bool], Any] = {}

    def reader(self, model: Any, handle: Handle | None) -> Callable[..., Any]:
        """The model's forward, which encodes no picture twice.

        It is the model itself where the plan acts in the tower or reads signals there.

        Args:
            handle: of the plan that is attached; None: the plain model.
        """
        plan = None if handle is None else handle.bind(handle.plan)
        if plan is not None and (plan.acts_in_tower or plan.tower_signals):
            return model

        def read(pixel_values: Tensor | None = None, **inputs: Any) -> Any:
            if pixel_values is None:
                return model(**inputs)
            key = hashlib.blake2b(pixel_values.float().cpu().numpy().tobytes()).digest(), plan is None
            if key not in self._outputs:
                given = {"pixel_values": pixel_values, **inputs}
                self._outputs[key] = encode(model.base_model.get_image_features, given)
            output = self._outputs[key]
            if plan is not None:
                record = dataclasses.replace(record_of(output), plan=plan)  # type: ignore[type-var]
                output = dataclasses.replace(output, winnow=record)
            return model(**inputs, mm_encoder_outputs={"image": output})

        return read
