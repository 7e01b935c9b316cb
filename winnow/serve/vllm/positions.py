"""Exact 3-D positions of kept tokens (M-RoPE).

Which tokens stay is known behind the encoder, and vLLM lays positions out before it. So the text gets its final
positions, which depend on the grids alone, and every placeholder of a picture or a video its first one. How far a kept
token lies from that, along time, height and width, travels as three more channels of its embedding. Their bits are
those of integers: as numbers of bfloat16 they would be exact up to 256 only.

Where vLLM's runner splits such channels off (it does for its own pruning of videos), `recompute_mrope_positions` adds
them. Where it does not (on CPUs), `embed_input_ids` splits them off and `forward` adds them. A request that the
scheduler puts back is added to again, so it must be seen what was added: the placeholders of a video start below the
last row of its frames, where none of its tokens lies. A picture has one place along time, so that it needs no mark.

Text between the frames of a video (Qwen3-VL) is embedded with its tokens (`frame_text`), and has positions as they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.serve.vllm.frame_text import in_text, whole_of
from winnow.serve.vllm.inputs import GRIDS
from winnow.serve.vllm.order import FIELD, Order
from winnow.serve.vllm.pruning import borrow_flag
from winnow.serve.vllm.settings import Settings
from winnow.serve.vllm.subject import Shortened, Subject, forget

CHANNELS = 3
POSITIONED = (*GRIDS.values(), "second_per_grid_ts")
_INTEGERS = {2: torch.int16, 4: torch.int32}


class KeptPositions:
    """Mixed into a model class of vLLM with 3-D positions, before `CompressedEncoder`."""

    supports_multimodal_pruning = True
    winnow: Subject | None
    config: Any
    _offsets: tuple[Tensor, Tensor] | None = None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        asked = Settings.of(vllm_config.model_config.hf_config) is not None
        if asked:
            borrow_flag(vllm_config.model_config.multimodal_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        if asked:
            self.is_multimodal_pruning_enabled = False  # the class adds no channels of its own
        self._relative: dict[tuple[Any, ...], Tensor] = {}

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, int]:
        """Positions `[3, tokens]`: final ones of the text, the first of each picture or video for its placeholders."""
        if self.winnow is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        full: list[int] = []
        features, starting = [], []
        source: list[int] = []
        done = 0
        for feature in sorted(mm_features, key=lambda own: own.mm_position.offset):
            first, length = feature.mm_position.offset, feature.mm_position.length
            order = _order_of(feature)
            source += range(len(full), len(full) + first - done)
            full += input_tokens[done:first]
            start = len(full)
            source += range(start, start + length)
            place = replace(feature.mm_position, offset=start)
            if order is None:
                full += input_tokens[first : first + length]
            else:
                whole = whole_of(order, input_tokens[first])
                full += whole
                place = replace(place, length=len(whole), is_embed=None)
                starting.append((slice(first, first + length), start, self._mark_of(feature, order)))
            features.append(replace(feature, mm_position=place))
            done = first + length
        source += range(len(full), len(full) + len(input_tokens) - done)
        full += input_tokens[done:]
        positions, _ = super().get_mrope_input_positions(full, features)  # type: ignore[misc]
        found = positions[:, source]
        for placeholders, start, mark in starting:
            found[:, placeholders] = positions[0, start]
            found[1, placeholders] += mark
        return found, int(positions.max()) + 1 - len(input_tokens)

    def _mark_of(self, feature: Any, order: Order) -> int:
        """How far below its first position the placeholders of an item start: the rows of a video's frames."""
        if order.modality != "video":
            return 0
        return int(feature.data[GRIDS["video"]].data[1]) // self.config.vision_config.spatial_merge_size

    def _placed(self, own: Shortened, order: Order, kwargs: dict[str, Any], number: int) -> Tensor:
        data = {name: torch.as_tensor(kwargs[name][number]) for name in POSITIONED if name in kwargs}
        rows, places = in_text(own, order, self)
        relative = self._positions_in(order, data)[:, places.cpu()]
        return torch.cat([rows, as_channels(relative.T.to(rows.device), rows.dtype)], 1)

    def _positions_in(self, order: Order, data: dict[str, Tensor]) -> Tensor:
        """`[3, N]` the positions of an item's tokens from its first one, by the model's own rule."""
        from vllm.multimodal.inputs import (
            MultiModalBatchedField,
            MultiModalFeatureSpec,
            MultiModalFieldElem,
            MultiModalKwargsItem,
            PlaceholderRange,
        )

        key = (order.modality, order.runs, order.marks, *((name, *x.flatten().tolist()) for name, x in data.items()))
        if key not in self._relative:
            token = self.config.video_token_id if order.modality == "video" else self.config.image_token_id
            whole = whole_of(order, token)
            given = {
                name: MultiModalFieldElem(data=x.cpu(), field=MultiModalBatchedField()) for name, x in data.items()
            }
            feature = MultiModalFeatureSpec(
                data=MultiModalKwargsItem(given),
                modality=order.modality,
                identifier="",
                mm_position=PlaceholderRange(offset=1, length=len(whole)),
            )
            prompt = [self.config.vision_start_token_id, *whole]
            positions, _ = super().get_mrope_input_positions(prompt, [feature])  # type: ignore[misc]
            forget(self._relative)
            self._relative[key] = positions[:, 1:] - positions[0, 1]
        return self._relative[key]

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Called by vLLM's runner: the embeddings of this step without their channels, and the prompt's positions."""
        if self.winnow is None:
            given = (input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens)
            return super().recompute_mrope_positions(*given)  # type: ignore[misc]
        positions = mrope_positions.clone()
        ids = torch.as_tensor(input_ids, device=positions.device)
        media = torch.isin(ids, torch.tensor([self.config.image_token_id, self.config.video_token_id]).to(ids))
        slots = media.nonzero()[:, 0]
        slots = slots[slots >= num_computed_tokens]
        rows = []
        for own in multimodal_embeddings:
            taken, slots = slots[: own.shape[0]], slots[own.shape[0] :]
            own, offsets = self._split(own)
            if offsets is not None:
                positions[:, taken] = _moved(positions[:, taken], offsets)
            rows.append(own)
        # Text has its final positions already, and a prompt ends in text.
        return rows, positions, int(positions.max()) + 1 - positions.shape[1]

    def embed_input_ids(self, input_ids: Tensor, multimodal_embeddings: Any = None, **kwargs: Any) -> Tensor:
        self._offsets = None
        if self.winnow is not None and multimodal_embeddings is not None and len(multimodal_embeddings):
            places = kwargs["is_multimodal"].nonzero()[:, 0].split([len(own) for own in multimodal_embeddings])
            parts = [self._split(own) for own in multimodal_embeddings]
            multimodal_embeddings = [rows for rows, _ in parts]
            moved = [(at, offsets) for at, (_, offsets) in zip(places, parts, strict=True) if offsets is not None]
            if moved:
                self._offsets = torch.cat([at for at, _ in moved]), torch.cat([offsets for _, offsets in moved])
        return super().embed_input_ids(input_ids, multimodal_embeddings, **kwargs)  # type: ignore[misc]

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._offsets is not None:
            at, offsets = (x.to(positions.device) for x in self._offsets)
            self._offsets = None
            positions[:, at] = _moved(positions[:, at], offsets)  # vLLM writes this buffer anew for each step
        return super().forward(input_ids, positions, *args, **kwargs)  # type: ignore[misc]

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[m, D]` rows and `[m, 3]` offsets; None: an item that is unchanged has none."""
        if self.winnow is None or rows.shape[1] % self.config.get_text_config().hidden_size != CHANNELS:
            return rows, None
        return rows[:, :-CHANNELS], from_channels(rows[:, -CHANNELS:])


def as_channels(numbers: Int[Tensor, "m 3"], dtype: torch.dtype) -> Float[Tensor, "m 3"]:
    """Whole numbers as bit patterns of a type of floats of the same width, which copies keep exactly.

    Raises:
        WinnowError: there are not so many.
    """
    if numbers.numel() and int(numbers.max()) > torch.iinfo(_INTEGERS[dtype.itemsize]).max:
        raise WinnowError(
            f"a kept token lies {int(numbers.max())} positions behind the first of its video, which {dtype} cannot "
            "carry; give vLLM fewer frames, or --dtype float32."
        )
    return numbers.to(_INTEGERS[dtype.itemsize]).view(dtype)


def from_channels(channels: Float[Tensor, "m 3"]) -> Int[Tensor, "m 3"]:
    """The numbers of `as_channels`."""
    return channels.contiguous().view(_INTEGERS[channels.dtype.itemsize]).long()


def _moved(positions: Int[Tensor, "3 m"], offsets: Int[Tensor, "m 3"]) -> Int[Tensor, "3 m"]:
    """Positions of kept tokens, from those of their placeholders or from themselves."""
    time, height, _ = along = offsets.T.to(positions)
    there = positions[1] - positions[0] == height - time
    return positions[0] - time * there + along


def _order_of(feature: Any) -> Order | None:
    """What is done to a picture or a video; None: nothing."""
    if feature.data is None or FIELD not in feature.data:
        return None
    order = Order.decoded(feature.data[FIELD].data)
    return None if order.unchanged else order
