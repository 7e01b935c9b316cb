"""Gemma 4: pictures of any grid, padded to one number of patches; squares of patches are pooled to a token.

Which patches make a token follows from their positions. Sounds are read in full: they are no items.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from winnow.core.errors import UnsupportedError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.models.family import Encoding, Family, seam, token_starts


class Gemma4(Family):
    """A family whose pictures are patches with positions.

    Class attributes:
        tower_width: the setting of `vision_config` that is the width of what the projector reads.
    """

    name = "gemma4"
    model_types = ("gemma4",)
    # The module around it is called with keywords; this is the part of it that makes rows of the language model.
    projector = "embed_vision.embedding_projection"
    encoders = (
        ("get_image_features", "image", "image_token_id"),
        ("get_video_features", "video", "video_token_id"),
    )
    # The tower pools squares of patches, so single patches cannot leave before the projector.
    points = ("projected", "layers")
    tower_width: ClassVar[str] = "hidden_size"

    def info(self, model: Any) -> ModelInfo:
        text, vision = model.config.get_text_config(), model.config.vision_config
        return ModelInfo(
            model=type(model).__name__,
            family=self.name,
            depth=text.num_hidden_layers,
            width=text.hidden_size,
            vision_width=getattr(vision, self.tower_width),
            vision_depth=0 if self.blocks is None else len(seam(model.base_model, self.blocks, model)),
            feature_layer=-1,
            has_cls=False,
            points=self.points,
            merge=self.kernel(model),
        )

    def kernel(self, model: Any) -> int:
        """Patches along a side of a token."""
        return model.config.vision_config.pooling_kernel_size

    def places(self, model: Any, encoding: Encoding) -> Tensor:
        """`[frames, patches, 2]` the column and row of each patch; −1 for padding. A picture is one frame."""
        places = encoding.inputs.get(f"{encoding.modality}_position_ids")
        if places is None:
            raise UnsupportedError(
                f"{type(model).__name__} needs {encoding.modality}_position_ids beside the pixels; "
                "the processor gives both."
            )
        return places

    def layouts(self, model: Any, encoding: Encoding) -> tuple[Layout, ...]:
        kernel, places = self.kernel(model), self.places(model, encoding)
        sizes = (places.amax(1) + 1).tolist()
        filled = (places >= 0).all(-1).sum(1).tolist()
        for (across, down), patches in zip(sizes, filled, strict=True):
            if across * down != patches or across % kernel or down % kernel:
                raise UnsupportedError(
                    f"{type(model).__name__} was given {patches} patches on a grid of {across} × {down}; expected are "
                    f"full grids whose sides are multiples of {kernel}, as its processor makes them."
                )
        frames = [(down // kernel, across // kernel) for across, down in sizes]
        layouts, at = [], 0
        for count in self.frames(encoding, len(frames)):
            own, at = frames[at : at + count], at + count
            if len(set(own)) != 1:
                raise UnsupportedError(
                    f"{type(model).__name__} was given a video whose frames differ in size: {own}; give frames of one."
                )
            layouts.append(Layout.grid(*own[0], count))
        return tuple(layouts)

    def frames(self, encoding: Encoding, frames: int) -> tuple[int, ...]:
        """Frames of each item."""
        counts = encoding.inputs.get("num_frames_per_video") if encoding.modality == "video" else None
        return (1,) * frames if counts is None else tuple(counts.tolist())

    def cells(self, model: Any, encoding: Encoding, values: Sequence[Tensor]) -> Tensor:
        """Blocks give a row for each patch, with padding or without; the projector one for each token."""
        rows = torch.cat([x.flatten(0, 1) for x in values])
        if rows.shape[0] == sum(encoding.lengths):
            return rows
        order = self.order(model, encoding).to(rows.device)
        if rows.shape[0] != order.shape[0]:
            rows = rows[(self.places(model, encoding) >= 0).all(-1).flatten().to(rows.device)]
        return rows[order].unflatten(0, (-1, self.kernel(model) ** 2)).mean(1)

    def order(self, model: Any, encoding: Encoding) -> Tensor:
        """`[patches]` the real patches of all frames, those of a token together, tokens in the order of the LM."""
        kernel, places = self.kernel(model), self.places(model, encoding)
        real = (places >= 0).all(-1)
        frame = torch.arange(len(places), device=places.device)[:, None].expand_as(real)[real]
        column, row = places[real].unbind(-1)
        most = int(places.max()) + 1
        token = (frame * most + row // kernel) * most + column // kernel
        return torch.argsort(token, stable=True)

    def patches(self, model: Any, encoding: Encoding) -> Tensor:
        name = "pixel_values" if encoding.modality == "image" else "pixel_values_videos"
        pixels = encoding.inputs[name][(self.places(model, encoding) >= 0).all(-1)]
        return pixels[self.order(model, encoding)].unflatten(0, (-1, self.kernel(model) ** 2)).flatten(1)

    def cell_starts(self, model: Any, encoding: Encoding) -> tuple[int, ...]:
        return token_starts(encoding)


class Gemma4Unified(Gemma4):
    """Gemma 4 without a tower: each patch, as the processor cuts it, is projected to a token."""

    name = "gemma4_unified"
    model_types = ("gemma4_unified",)
    tower = blocks = None
    projector = "embed_vision.multimodal_embedder.embedding_projection"
    tower_width = "output_proj_dims"

    def kernel(self, model: Any) -> int:
        return 1
