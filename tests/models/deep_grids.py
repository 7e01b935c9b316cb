"""What the tests of families of grids share: where tokens stand, by the classes' own code, and each picture alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import builds
import torch
from alone import Alone, Encoders, items
from builds.build import Build
from probes import Look
from torch import Tensor
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

MERGE = 2


@dataclass(frozen=True)
class Grid:
    """How the tokens of a picture are made of patches, by the class's own code.

    Attributes:
        rows: `[tokens, k]` the rows of a block's output of which a token is made.
        pixels: `[tokens, k]` the rows of the pixels.
        places: `[patches, 2]` row and column of each patch, in the order of the pixels.
        size: patches down and across.
        frames: of a video.
    """

    rows: Tensor
    pixels: Tensor
    places: Tensor
    size: tuple[int, int]
    frames: int = 1


def patch_grid(model: Any, tensors: dict[str, Tensor]) -> Grid:
    """Patches in units of 2 × 2."""
    grid = tensors.get("image_grid_thw", tensors.get("video_grid_thw"))
    t, h, w = grid[0].tolist()
    units = torch.arange(t * h * w).view(-1, MERGE**2)
    return Grid(units, units, get_vision_position_ids(grid, MERGE), (h, w), t)


def windowed(model: Any, tensors: dict[str, Tensor]) -> Grid:
    """Units in the order of windows while they are in the tower."""
    plain = patch_grid(model, tensors)
    vision = model.config.vision_config
    order, _ = get_vision_window_index(
        tensors.get("image_grid_thw", tensors.get("video_grid_thw")),
        spatial_merge_size=MERGE,
        window_size=vision.window_size,
        patch_size=vision.patch_size,
    )
    return Grid(plain.rows[torch.argsort(order)], plain.pixels, plain.places, plain.size, plain.frames)


def square(model: Any, tensors: dict[str, Tensor]) -> Grid:
    """A map of patch numbers, pooled by the projector's own pooling where there is one."""
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    pool = getattr(model.base_model.multi_modal_projector, "avg_pool", None)
    if pool is None:
        rows = torch.arange(side * side)[:, None]
        return Grid(rows, rows, places, (side, side))
    one_hot = torch.eye(side * side).view(1, side * side, side, side)
    made = pool(one_hot).flatten(2)[0].T  # which patches a token is the mean of
    kernel = int((made[0] > 0).sum())
    rows = made.topk(kernel, dim=1).indices.sort(1).values
    return Grid(rows, rows, places, (side, side))


def by_places(model: Any, tensors: dict[str, Tensor]) -> Grid:
    """Patches pooled by their positions, by the tower's own pooling; each a token where there is no tower."""
    places = tensors.get("image_position_ids", tensors.get("video_position_ids"))
    kernel = model.config.vision_config.pooling_kernel_size
    frames, patches = places.shape[:2]
    tower = getattr(model.base_model, "vision_tower", None)
    rows = [torch.arange(frames * patches)[:, None]] if tower is None else []
    for frame in range(frames if tower is not None else 0):
        made, _ = tower.pooler._avg_pool_by_positions(
            torch.eye(patches)[None], places[frame : frame + 1], patches // kernel**2
        )
        rows.append(made[0].topk(kernel**2, dim=1).indices.sort(1).values + frame * patches)
    across, down = (places[0].amax(0) + 1).tolist()
    own = torch.cat(rows)
    return Grid(own, own, places.flatten(0, 1).flip(1), (down, across), frames)


@dataclass(frozen=True)
class Case:
    """A family's seams, as the tests know them, and how its tokens are made."""

    grid: Callable[[Any, dict[str, Tensor]], Grid]
    blocks: str | None = "visual.blocks"
    attention: str = "attn"
    projector: str = "visual.merger"
    features: bool = False
    hybrid: bool = False


SIGLIP = {"blocks": "vision_tower.encoder.layers", "attention": "self_attn", "projector": "multi_modal_projector"}
GEMMA4 = SIGLIP | {"projector": "embed_vision.embedding_projection"}

CASES = {
    "qwen2_vl": Case(patch_grid),
    "qwen3_vl": Case(patch_grid),
    "qwen3_vl_moe": Case(patch_grid),
    "qwen3_5": Case(patch_grid, hybrid=True),
    "qwen3_5_moe": Case(patch_grid, hybrid=True),
    "glm4v": Case(patch_grid),
    "glm4v_moe": Case(patch_grid),
    "glm46v": Case(patch_grid),
    "glm_ocr": Case(patch_grid),
    "qwen2_5_omni_thinker": Case(windowed),
    "gemma3": Case(square, **SIGLIP),
    "shieldgemma2": Case(square, **SIGLIP),
    "paligemma": Case(square, **SIGLIP, features=True),
    "paligemma2": Case(square, **SIGLIP, features=True),
    "gemma4": Case(by_places, **GEMMA4),
    "gemma4_moe": Case(by_places, **GEMMA4),
    "gemma4_unified": Case(by_places, blocks=None, projector="embed_vision.multimodal_embedder.embedding_projection"),
}
ROWS = ("3 A 6", "3 B 9", "11", "2 B 4 C 5")
VIDEOS = ("3 V 6", "9", "2 V 4")
BOTH = ("3 V 2 A 6", "2 B 4 V 3 C 5", "4 A 2", "7")


def build_of(name: str) -> Build:
    return builds.every()[name]


def with_videos(*names: str) -> list[str]:
    return [name for name in names or CASES if "V" in build_of(name).letters]


SEEN = [(n, ROWS) for n in CASES] + [(n, VIDEOS) for n in with_videos()]


def encoders(name: str, model: Any) -> Encoders:
    case = CASES[name]
    return Encoders(model, case.blocks, case.attention, case.projector)


def unpadded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A picture of Gemma 4 without its padding."""
    for pixels, places in (("pixel_values", "image_position_ids"), ("pixel_values_videos", "video_position_ids")):
        if places in tensors:
            real = int((tensors[places][0] >= 0).all(-1).sum())
            tensors = tensors | {pixels: tensors[pixels][:, :real], places: tensors[places][:, :real]}
    return tensors


def pictures(name: str, model: Any, rows: tuple[str, ...]) -> list[tuple[str, dict[str, Tensor], Grid, Alone]]:
    """Every picture and video of a batch: its letter, its tensors, its tokens, and what the encoder does with it."""
    reference, found = encoders(name, model), []
    for seed, row in enumerate(rows):
        for letter, tensors in items(build_of(name), row, seed):
            method = "get_video_features" if letter == "V" else "get_image_features"
            own = unpadded(tensors)
            found.append((letter, own, CASES[name].grid(model, own), reference.run(method, own)))
    return found


def lanes(look: Look) -> list[tuple[Tensor, dict[Any, Tensor], Any]]:
    """Tokens, signals and layout of each item that a `Look` was shown."""
    return [
        (view.tokens[lane], {signal: view[signal][lane] for signal in look.needs}, view.layout)
        for view in look.views
        for lane in range(view.b)
    ]


def lane_of(found: list[Any], projected: Tensor) -> Any:
    """The item that holds these rows."""
    own = [x for x in found if x[0].shape == projected.shape and (x[0] - projected).abs().max() <= 1e-4]
    assert len(own) == 1
    return own[0]
