"""Pictures that were encoded before, for plans that leave the tower alone: those of the KV cache."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from winnow.bench.reuse import encode, taken_by
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
            call, given = model.base_model.get_image_features, {"pixel_values": pixel_values, **inputs}
            key = _digest(taken_by(call, given)), plan is None
            if key not in self._outputs:
                self._outputs[key] = encode(call, given)
            output = self._outputs[key]
            if plan is not None:
                record = dataclasses.replace(record_of(output), plan=plan)  # type: ignore[type-var]
                output = dataclasses.replace(output, winnow=record)
            return model(**inputs, mm_encoder_outputs={"image": output})

        return read


def _digest(given: dict[str, Tensor]) -> bytes:
    """Tells apart all that the encoder reads: the same pixels may be of pictures of other sizes."""
    made = hashlib.blake2b()
    for name, x in sorted(given.items()):
        made.update(f"{name} {tuple(x.shape)}".encode() + x.double().cpu().numpy().tobytes())
    return made.digest()
