"""What the towers of tiled classes compute, from eager copies, brought to tokens by the classes' own packing code.

Nothing here imports winnow. Each `Packing` maps rows `[tiles, patches, C]` of the tower to a row for each content
token that the language model reads, in order.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

Inputs = dict[str, Tensor]
NEWLINE = float("nan")


def by_channel(pack: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Packing code that makes several patches one row, run on each channel alone: the mean of the patches."""
    return torch.stack([pack(rows[..., c : c + 1]).flatten(0, -2).mean(-1) for c in range(rows.shape[-1])], -1)


def shuffled(pixel_shuffle: Callable[[Tensor], Tensor], grid: bool = False) -> Any:
    """A pixel shuffle of tiles, which is given the tile as a grid or as a row of patches."""

    def pack(rows: Tensor) -> Tensor:
        side = round(rows.shape[1] ** 0.5)
        return pixel_shuffle(rows.unflatten(1, (side, side)) if grid else rows)

    return lambda rows: by_channel(pack, rows)


def internvl(base: Any, inputs: Inputs, modality: str, rows: Tensor) -> Tensor:
    return shuffled(lambda x: base.pixel_shuffle(x, scale_factor=base.config.downsample_ratio), grid=True)(rows)


def idefics3(base: Any, inputs: Inputs, modality: str, rows: Tensor) -> Tensor:
    return shuffled(base.connector.pixel_shuffle)(rows)


def cohere(base: Any, inputs: Inputs, modality: str, rows: Tensor) -> Tensor:
    return shuffled(base.multi_modal_projector.pixel_shuffle)(rows)


def pixtral(base: Any, inputs: Inputs, modality: str, rows: Tensor) -> Tensor:
    projector: Any = next(m for m in base.modules() if hasattr(m, "patch_merger"))
    merger = copy.deepcopy(projector.patch_merger)
    merger.merging_layer = nn.Identity()
    return by_channel(lambda x: merger(x[0], inputs["image_sizes"]), rows)


def minicpm(base: Any, inputs: Inputs, modality: str, rows: Tensor) -> Tensor:
    sizes = inputs["target_sizes" if modality == "image" else "target_sizes_videos"]
    if rows.shape[1] == int(sizes.prod(1).sum()):  # before the merger in the tower
        index = base.vision_tower.vit_merger.get_window_index(sizes, {})[0]
        rows = rows[:, index].unflatten(1, (-1, 4)).mean(2)
    merger = copy.deepcopy(base.merger)
    merger.mlp = nn.ModuleList([nn.Identity()])
    return by_channel(lambda x: torch.cat(merger(x, sizes // 2)), rows)


def tile_counts(base: Any, inputs: Inputs) -> list[int]:
    config = base.config
    counts = [
        image_size_to_num_patches(size.tolist(), config.image_grid_pinpoints, config.vision_config.image_size)
        for size in inputs["image_sizes"]
    ]
    return [1] * len(counts) if int(inputs.get("batch_num_images", torch.ones(1))[0]) > 1 else counts


def anyres(base: Any, inputs: Inputs, rows: Tensor, *more: Any) -> Tensor:
    newline = torch.full((rows.shape[-1],), NEWLINE)
    pictures = list(rows.split(tile_counts(base, inputs)))
    packed, _ = base.pack_image_features(pictures, inputs["image_sizes"], *more, image_newline=newline)
    packed = torch.cat(packed)
    return packed[~packed[:, 0].isnan()]


def llava_next_video(base: Any, inputs: Inputs, modality: str, rows: Tensor) -> Tensor:
    if modality == "image":
        return anyres(base, inputs, rows, "default")
    return base.vision_resampler(rows).flatten(0, 1)


def llava_onevision(base: Any, inputs: Inputs, modality: str, rows: Tensor) -> Tensor:
    if modality == "video":
        return base.apply_pooling(rows).flatten(0, 1)
    ratio = base.config.vision_aspect_ratio
    newline = torch.full((rows.shape[-1],), NEWLINE)
    pictures = list(rows.split(tile_counts(base, inputs)))
    packed = torch.cat(base.pack_image_features(pictures, inputs["image_sizes"], newline, ratio)[0])
    return packed[~packed[:, 0].isnan()]


def plain(base: Any, inputs: Inputs, modality: str, rows: Tensor) -> Tensor:
    return rows.flatten(0, 1)


@dataclass(frozen=True)
class Packed:
    """Where the tower of a class lies, and how it packs.

    Attributes:
        pack: rows of the tower to rows of tokens.
        blocks, attention: of the towers.
        modalities: that it encodes.
        prefix: tokens before the patches.
        merge: patches of one side that make a token.
    """

    pack: Callable[[Any, Inputs, str, Tensor], Tensor]
    blocks: tuple[str, ...] = ("vision_tower.encoder.layers",)
    attention: str = "self_attn"
    modalities: tuple[str, ...] = ("image",)
    prefix: int = 0
    merge: int = 2


BOTH = ("image", "video")
CLASSES = {
    "internvl": Packed(internvl, ("vision_tower.encoder.layer",), "attention", prefix=1),
    "qianfan_ocr": Packed(internvl, ("vision_tower.layers",), "attention", prefix=1),
    "idefics3": Packed(idefics3, ("vision_model.encoder.layers",)),
    "smolvlm": Packed(idefics3, ("vision_model.encoder.layers",)),
    "aya_vision": Packed(cohere),
    "cohere2_vision": Packed(cohere),
    "mistral3": Packed(pixtral, ("vision_tower.transformer.layers",), "attention"),
    "mistral3_full": Packed(pixtral, ("vision_tower.transformer.layers",), "attention"),
    "lighton_ocr": Packed(pixtral, ("vision_encoder.transformer.layers",), "attention"),
    "minicpmv4_6": Packed(minicpm, modalities=BOTH, merge=4),
    "llava_next_video": Packed(llava_next_video, modalities=BOTH, prefix=1, merge=1),
    "llava_onevision": Packed(llava_onevision, modalities=BOTH, merge=1),
    "video_llava": Packed(
        plain,
        ("image_tower.encoder.layers", "video_tower.encoder.layers"),
        modalities=BOTH,
        prefix=1,
        merge=1,
    ),
}


@dataclass
class Block:
    """What one block did, call by call: attention `[b, H, N, N]`, keys `[b, N, d]`, and rows `[b, N, C]` it gave."""

    weights: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)


class Towers:
    """An eager copy of a model; the original is never touched."""

    def __init__(self, name: str, model: nn.Module) -> None:
        self.how = CLASSES[name]
        copied: Any = copy.deepcopy(model)
        copied.set_attn_implementation("eager")
        self.base = copied.base_model

    def blocks(self, index: int) -> list[Any]:
        return [self.base.get_submodule(path)[index] for path in self.how.blocks]

    @torch.no_grad()
    def run(self, sample: Inputs, modality: str, index: int) -> tuple[Block, Tensor, Inputs] | None:
        """What block `index` did with the pictures (videos) of a sample; the means `[b, N]` of the pixels of patches,
        and the inputs of the encoder."""
        encode = getattr(self.base, f"get_{modality}_features")
        own = {name: sample[name] for name in inspect.signature(encode).parameters if name in sample}
        if not any(name.startswith("pixel_values") for name in own):
            return None
        found, pixels = Block(), []
        blocks = self.blocks(index)
        attentions = [getattr(block, self.how.attention) for block in blocks]
        convolutions = [m for m in self.base.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3]
        hooks = [block.register_forward_hook(lambda m, a, out: found.after.append(out)) for block in blocks]
        hooks += [c.register_forward_pre_hook(lambda m, a: pixels.append((a[0], m.stride[0]))) for c in convolutions]
        with listening(attentions, found):
            encode(**own, return_dict=True)
        for hook in hooks:
            hook.remove()
        ((shown, patch),) = pixels
        means = nn.functional.avg_pool2d(shown, patch).mean(1)  # pictures, down, across
        if self.how.pack is pixtral:
            grids = zip(means, own["image_sizes"] // patch, strict=True)
            rows = torch.cat([picture[:h, :w].flatten() for picture, (h, w) in grids])[None]
        else:
            rows = means.flatten(1)
        return found, rows, own

    def tokens(self, inputs: Inputs, modality: str, rows: Tensor) -> Tensor:
        """`[tiles, N]` or `[tiles, N, C]` of patches → a row for each content token."""
        flat = rows if rows.ndim == 3 else rows[..., None]
        packed = self.how.pack(self.base, inputs, modality, flat)
        return packed if rows.ndim == 3 else packed[:, 0]

    def received(self, block: Block, inputs: Inputs) -> Tensor:
        """`[tiles, patches]` the attention that patches receive, mean over heads and the queries of their picture."""
        weights = [w.mean(1) for w in block.weights]
        if self.how.pack is pixtral:  # all pictures in one sequence, and none sees another
            patch = self.base.config.vision_config.patch_size
            counts = (inputs["image_sizes"] // patch).prod(1)
            queries = counts.repeat_interleave(counts)
            return (weights[0] / queries[:, None]).sum(1)
        return self.joined([w.mean(1)[:, self.how.prefix :] for w in weights])

    def joined(self, calls: list[Tensor]) -> Tensor:
        """Calls of one module: more tiles, or more patches of the one strip of all slices."""
        return torch.cat(calls, 1 if self.how.pack is minicpm else 0)


@contextmanager
def listening(attentions: list[nn.Module], found: Block) -> Iterator[None]:
    """Eager attention of these modules writes down what it does."""
    spaces = {sys.modules[type(module).__module__] for module in attentions}
    plain = {space: space.eager_attention_forward for space in spaces}

    def heard(eager: Any) -> Any:
        def attend(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            out, weights = eager(module, query, key, *args, **kwargs)
            if any(module is own for own in attentions):
                found.weights.append(weights)
                found.keys.append(key.mean(1))
            return out, weights

        return attend

    for space, eager in plain.items():
        space.eager_attention_forward = heard(eager)
    try:
        yield
    finally:
        for space, eager in plain.items():
            space.eager_attention_forward = eager
