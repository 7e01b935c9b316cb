"""Family: what the engine must know about a model family, declared. One short file for each family derives this."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from winnow.core.errors import UnsupportedError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.models.supported_versions import RANGE


@dataclass(eq=False)
class Encoding:
    """One call of the encoder, as adapters see it.

    Attributes:
        modality: image, video or audio.
        inputs: the keyword arguments of the encoder call (sizes and grids are needed for layouts), and what the family
            reads beside them.
        lengths: tokens of each item in the LM's sequence, once the encoder has run.
        parts: how many of the encoder's items became each item, where some were joined (`Family.joined`,
            `Family.frames_apart`).
    """

    modality: str
    inputs: Mapping[str, Any]
    lengths: tuple[int, ...] = ()
    parts: tuple[int, ...] = ()


class Family:
    """The seams of a model family. Paths are relative to `model.base_model`.

    Class attributes:
        name: of the family.
        model_types: `config.model_type` values.
        tower, blocks, attention, projector: where the tower, its blocks, a block's attention and the connector are.
        ear: the layers of the encoder of sounds, whose calls show each a stretch of one sound, in their order. Where it
            is named, `cells` knows what to do with what they show.
        other_blocks: blocks of further towers of the same shape, where each modality has a tower of its own.
        encoders: (method of the base model, modality, name of the placeholder id in the configuration). The method of a
            part of it is written with dots, where the base model has no method of its own for it.
        beside: arguments of the model's forward that layouts need and the encoder is not given.
        points: where steps can act.
        mrope: whether positions are 3-D.
        axes: of positions, where they have several.
        short: whether the language model may be called with the shortened sequence, because all its layers attend
            causally to everything before. Otherwise it is called with the whole sequence, and its layers are given
            the part that is left.
        joined: whether items of the encoder that stand in one unbroken run of placeholders (the tiles of a picture) are
            one item. Only for families without steps at `features`, where the prompt is not known yet.
        frames_apart: whether each frame of a video is an item of the encoder. Where the caller names the videos of a
            request, `layouts` is asked for one item of `Encoding.parts` frames each, whose modality is video.
        tiles_apart: whether the tiles of a picture may be items of their own, so that the number of items does not tell
            that of pictures.
        generic: whether nothing is known of the class but its seams.
        cross: whether pictures are keys of cross-attention layers, and not in the sequence; see `CrossPass`.
        halves: of a block, the norm before its MLP and the MLP, whose output is added to what the norm was given.
            Needed for steps at `blocks[i].mlp`.
        packed: whether blocks take all patches in one sequence with `cu_seqlens`, instead of `[tiles, N, C]`.
        streams: whether frames can be read one by one into a growing cache (`winnow.stream`), as tests have shown.
        side_mergers: lists of modules that read the output of single blocks, as the merger reads that of the last one.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    tower: ClassVar[str | None] = "vision_tower"
    blocks: ClassVar[str | None] = "vision_tower.encoder.layers"
    attention: ClassVar[str] = "self_attn"
    projector: ClassVar[str | None] = "multi_modal_projector"
    ear: ClassVar[str | None] = None
    other_blocks: ClassVar[tuple[str, ...]] = ()
    encoders: ClassVar[tuple[tuple[str, str, str], ...]] = (("get_image_features", "image", "image_token_id"),)
    beside: ClassVar[tuple[str, ...]] = ()
    points: ClassVar[tuple[str, ...]] = ("features", "projected", "layers")
    mrope: ClassVar[bool] = False
    axes: ClassVar[int] = 3
    short: ClassVar[bool] = False
    joined: ClassVar[bool] = False
    frames_apart: ClassVar[bool] = False
    tiles_apart: ClassVar[bool] = False
    generic: ClassVar[bool] = False
    cross: ClassVar[bool] = False
    halves: ClassVar[tuple[str, str]] = ("layer_norm2", "mlp")
    packed: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    side_mergers: ClassVar[tuple[str, ...]] = ()

    def check(self, model: Any) -> None:
        """Raise an UnsupportedError where this very model has something that the family cannot do."""

    def check_prompt(self, model: Any, tokens: int) -> None:
        """Raise an UnsupportedError where a prompt of this many tokens, those of the cache included, is too long."""

    def cross_layers(self, model: Any) -> tuple[int, ...]:
        """The layers that read pictures by cross-attention. Needed where `cross`."""
        raise NotImplementedError

    def cross_layouts(self, model: Any, called: dict[str, Any]) -> tuple[tuple[Layout | None, ...], ...]:
        """The layout of the place of each picture of each row, None where a place is empty. Needed where `cross`.

        Args:
            called: the arguments of the forward.
        """
        raise NotImplementedError

    def rows(self, output: Any) -> Any:
        """`[items][n, D]` the tokens of each item in an encoder's output, or None where it holds none."""
        return getattr(output, "pooler_output", None)

    def info(self, model: Any) -> ModelInfo:
        """What is known of this model before data; by default nothing of its tower."""
        return ModelInfo(
            model=type(model).__name__,
            family=self.name,
            depth=len(decoder_of(model).layers),
            width=model.config.get_text_config().hidden_size,
            vision_depth=0,
            has_cls=False,
            points=self.points,
            mrope=self.mrope,
        )

    def lengths(self, model: Any, encoding: Encoding, pooled: Sequence[Tensor]) -> tuple[int, ...]:
        """Tokens of each item in what the encoder pooled; by default each of its elements is an item."""
        return tuple(x.reshape(-1, x.shape[-1]).shape[0] for x in pooled)

    def layouts(self, model: Any, encoding: Encoding) -> tuple[Layout, ...]:
        """The layout of each item as its tokens stand in the LM's sequence."""
        raise NotImplementedError

    def tile_counts(self, model: Any, encoding: Encoding, tiles: int) -> tuple[int, ...]:
        """Tiles of each item, where the tower saw `tiles` in all. Needed for steps at `blocks` and `features`."""
        raise NotImplementedError

    def tower_layouts(self, model: Any, encoding: Encoding, counts: tuple[int, ...]) -> tuple[Layout, ...]:
        """The layout of each item as the tower gives it: tile-major, [CLS] before each tile. Needed as above."""
        raise NotImplementedError

    def entries(self, model: Any, encoding: Encoding, counts: tuple[int, ...]) -> tuple[int, ...]:
        """Content tokens that each item will have in the LM. Needed as above."""
        raise NotImplementedError

    def tile_layouts(self, model: Any, encoding: Encoding, counts: tuple[int, ...]) -> tuple[Layout, ...]:
        """For each item the layout of one of its tiles, as if it were alone. Needed for steps at `blocks`."""
        raise NotImplementedError

    def packed_order(self, model: Any, encoding: Encoding) -> Tensor | None:
        """`[cells]` the cell at each place of a packed sequence; None: they stand in their own order."""
        return None

    def check_tower_call(self, model: Any, encoding: Encoding) -> None:
        """Refuse an encoder call that asks the tower for something else than the configuration says."""

    def features(self, model: Any, encoding: Encoding, output: Any) -> Tensor:
        """`[tiles, N, C]` what the tower gives the projector, [CLS] included, from the tower's output."""
        raise NotImplementedError

    def windows(self, model: Any, encoding: Encoding, tokens: int) -> tuple[int, ...]:
        """Where one call of a block's attention has several pictures side by side: the tokens of each, in order.

        Args:
            tokens: of the call.
        """
        return (tokens,)

    def cells(self, model: Any, encoding: Encoding, values: Sequence[Tensor]) -> Tensor:
        """Join what a module's calls gave, `[calls][tiles, N, …]`, into a row for each cell of the tower's output."""
        raise NotImplementedError

    def cell_starts(self, model: Any, encoding: Encoding) -> tuple[int, ...]:
        """The first cell of each item in the rows that `cells` returns."""
        raise NotImplementedError

    def patches(self, model: Any, encoding: Encoding) -> Tensor:
        """`[cells, …]` the pixel values behind each cell, as the encoder is given them."""
        raise NotImplementedError


# Where the layers of a decoder lie, from what `get_decoder` gives.
_INSIDE = ("", "model", "decoder", "model.decoder")


def decoder_of(model: Any) -> Any:
    """The module that runs the layers of the language model; None where there is none."""
    outer = model.get_decoder()
    for path in _INSIDE:
        at = outer
        for name in path.split(".") if path else ():
            at = getattr(at, name, None)
        if isinstance(getattr(at, "layers", None), nn.ModuleList):
            return at
    return None


def seam(root: nn.Module, path: str | None, model: Any) -> Any:
    """Follow a path of attributes; a missing one is a version that we do not know.

    Raises:
        UnsupportedError: it is missing, or the family names no path.
    """
    at: Any = root
    if path is None:
        raise UnsupportedError(f"winnow does not know the vision tower of {type(model).__name__}.")
    for name in path.split("."):
        if not hasattr(at, name):
            import transformers

            raise UnsupportedError(
                f"{type(model).__name__} has no {path!r} (missing {name!r}) in transformers "
                f"{transformers.__version__}; winnow supports {RANGE}."
            )
        at = getattr(at, name)
    return at


def feature_block(vision_feature_layer: int | Sequence[int]) -> int:
    """The block whose output is `hidden_states[vision_feature_layer]` (the last one of a list)."""
    layer = vision_feature_layer if isinstance(vision_feature_layer, int) else list(vision_feature_layer)[-1]
    return layer if layer < 0 else layer - 1


def join_tiles(values: Sequence[Tensor]) -> Tensor:
    """`[calls][tiles, N, …]` → `[tiles · N, …]`."""
    return torch.cat([x.flatten(0, 1) for x in values])


def token_starts(encoding: Encoding) -> tuple[int, ...]:
    """The first cell of each item, where `cells` gives a row for each of its tokens."""
    return (0, *accumulate(encoding.lengths))[:-1]
