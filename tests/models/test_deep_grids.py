"""Families whose tokens are patches of a grid, or squares of them: what each token is, and what methods see of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import builds
import pytest
import torch
from alone import Alone, Encoders, items
from builds.build import Build
from byhand import top
from contract.signals import BlockShift, CellPixels, TowerFeatures
from masked import Cut, MaskedReference
from probes import Folded, Look, Pick, Received, forward, generate, new_tokens, score, step_logits
from torch import Tensor
from transformers import ShieldGemma2ForImageClassification
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

import winnow
from winnow.models.families import family_of
from winnow.signals.vision import VisionAttention, VisionKeys

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
    """Patches pooled by their positions, by the tower's own pooling."""
    places = tensors.get("image_position_ids", tensors.get("video_position_ids"))
    kernel = model.config.vision_config.pooling_kernel_size
    frames, patches = places.shape[:2]
    rows = []
    for frame in range(frames):
        made, _ = model.base_model.vision_tower.pooler._avg_pool_by_positions(
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
    blocks: str = "visual.blocks"
    attention: str = "attn"
    projector: str = "visual.merger"
    features: bool = False
    deepstack: bool = False
    hybrid: bool = False


SIGLIP = {"blocks": "vision_tower.encoder.layers", "attention": "self_attn", "projector": "multi_modal_projector"}
GEMMA4 = SIGLIP | {"projector": "embed_vision.embedding_projection"}

CASES = {
    "qwen2_vl": Case(patch_grid),
    "qwen3_vl": Case(patch_grid, deepstack=True),
    "qwen3_vl_moe": Case(patch_grid, deepstack=True),
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
}
ROWS = ("3 A 6", "3 B 9", "11", "2 B 4 C 5")
VIDEOS = ("3 V 6", "9", "2 V 4")


def build_of(name: str) -> Build:
    return builds.every()[name]


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


@pytest.mark.parametrize("name", CASES)
def test_each_token_stands_where_its_patches_are(name):
    model = build_of(name).model()
    look = Look(needs=(CellPixels(),))
    for rows in (ROWS, VIDEOS) if "V" in build_of(name).letters else (ROWS,):
        look.views.clear()
        with winnow.compress(model, look):
            forward(model, build_of(name).batch(rows))
        found = lanes(look)
        expected = pictures(name, model, rows)
        assert len(found) == len(expected)
        for _, tensors, grid, alone in expected:
            tokens, signals, layout = lane_of(found, alone.projected)
            assert layout.n == layout.n_content == len(tokens) == len(grid.rows)
            boxes = torch.from_numpy(layout.boxes)
            down, across = grid.size
            centres = (grid.places[grid.pixels].double().mean(1) + 0.5) / torch.tensor([down, across])
            assert torch.allclose((boxes[:, :2] + boxes[:, 2:]) / 2, centres.flip(1))
            area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
            assert torch.allclose(area, torch.full_like(area, grid.frames / len(tokens)))
            frames = torch.arange(len(tokens)) // (len(tokens) // grid.frames)
            assert layout.place[:, 1].tolist() == frames.tolist()
            pixels = tensors.get("pixel_values", tensors.get("pixel_values_videos"))
            own = square_patches(model, pixels) if pixels.ndim == 4 else pixels.reshape(-1, pixels.shape[-1])
            expected_pixels = own[grid.pixels].flatten(1).sort(1).values
            assert torch.equal(signals[CellPixels()].sort(1).values, expected_pixels)


def square_patches(model: Any, pixels: Tensor) -> Tensor:
    """`[1, 3, H, W]` → `[patches, values]`, row by row."""
    size = model.config.vision_config.patch_size
    return pixels[0].unflatten(1, (-1, size)).unflatten(3, (-1, size)).permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)


@pytest.mark.parametrize("name", CASES)
def test_signals_of_a_batch_are_those_of_each_picture_alone(name):
    model = build_of(name).model()
    blocks = range(len(encoders(name, model).blocks))
    kinds = (lambda i: VisionAttention(i, query="all"), VisionKeys, BlockShift)
    needs = (*(kind(i) for kind in kinds for i in blocks), TowerFeatures())
    look = Look(needs=needs)
    for rows in (ROWS, VIDEOS) if "V" in build_of(name).letters else (ROWS,):
        look.views.clear()
        with winnow.compress(model, look):
            forward(model, build_of(name).batch(rows))
        found = lanes(look)
        for _, _, grid, alone in pictures(name, model, rows):
            _, signals, _ = lane_of(found, alone.projected)
            for i in blocks:
                check(signals[VisionAttention(i, query="all")], alone.received[i], grid, 1e-6)
                check(signals[VisionKeys(i)], alone.keys[i], grid, 1e-4)
                check(signals[BlockShift(i)], (alone.after[i] - alone.before[i]).norm(dim=-1), grid, 1e-4)
            check(signals[TowerFeatures()], alone.projector, grid, 1e-3)


def check(found: Tensor, rows: Tensor, grid: Grid, tolerance: float) -> None:
    expected = rows if len(rows) == len(grid.rows) else rows[grid.rows].mean(1)
    assert (found - expected).abs().max() <= tolerance
    assert expected.std() > 100 * tolerance


METHODS = ("divprune:keep=7", "hiprune:keep=7", "fastervlm:keep=7", "fastv:keep=7", "pyramiddrop")
# Where a method cannot run, and what it is told.
REFUSED = {
    ("pyramiddrop", "qwen3_5"): "has no attention to look at",
    ("pyramiddrop", "qwen3_5_moe"): "has no attention to look at",
    ("fastv:keep=7", "gemma4"): "read the keys of layer 0",
    ("pyramiddrop", "gemma4"): "read the keys of layer 0",
    ("fastv:keep=7", "paligemma2"): "softcap",
    ("pyramiddrop", "paligemma2"): "softcap",
}


@pytest.mark.parametrize("plan", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_methods_keep_what_they_promise_and_batches_are_their_samples_alone(name, plan):
    model, parts = build_of(name).model(), build_of(name).samples(ROWS)
    if reason := REFUSED.get((plan, name)):
        with pytest.raises(winnow.UnsupportedError, match=reason), winnow.compress(model, plan):
            forward(model, build_of(name).collate(parts))
        return
    plain = forward(model, build_of(name).collate(parts)).logits[:, -1]
    with winnow.compress(model, plan) as handle:
        together = forward(model, build_of(name).collate(parts)).logits[:, -1]
        kept = [(item.n_visual, len(item.kept)) for item in handle.last.items]
        alone = torch.cat([forward(model, part).logits[:, -1] for part in parts])
    assert [n for _, n in kept] == [max(1, n // 8) if plan == "pyramiddrop" else 7 for n, _ in kept]
    assert len(kept) == 4
    assert (together - alone).abs().max() <= 2e-5
    assert (together - plain).abs().max() > 1e-2


BOTH = ("3 V 2 A 6", "2 B 4 V 3 C 5", "4 A 2", "7")


@pytest.mark.parametrize("plan", ["divprune:keep=5", "hiprune:keep=5"])
@pytest.mark.parametrize("name", [n for n in CASES if "V" in build_of(n).letters and not n.startswith("glm")])
def test_videos_are_items_of_their_own(name, plan):
    """In any order among pictures; frames with text between them are one item."""
    model, parts = build_of(name).model(), build_of(name).samples(BOTH)
    with winnow.compress(model, plan) as handle:
        together = forward(model, build_of(name).collate(parts)).logits[:, -1]
        items = handle.last.items
        alone = torch.cat([forward(model, part).logits[:, -1] for part in parts])
    for row, kinds in enumerate((["video", "image"], ["image", "video", "image"], ["image"], [])):
        assert [item.modality for item in items if item.row == row] == kinds
    assert {len(item.kept) for item in items} == {5}
    assert (together - alone).abs().max() <= 2e-5


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("glm")])
def test_videos_of_glm_stand_under_the_placeholder_of_pictures(name):
    model, build = build_of(name).model(), build_of(name)
    with winnow.compress(model, "divprune:keep=5") as handle:
        output = generate(model, build.batch(VIDEOS))
        assert [(item.modality, len(item.kept)) for item in handle.last.items] == [("video", 5)] * 2
        alone = [generate(model, part) for part in build.samples(VIDEOS)]
        together = torch.stack(output.logits, 1)
        for row, own in enumerate(alone):
            assert (torch.stack(own.logits, 1)[0] - together[row]).abs().max() <= 2e-5


@pytest.mark.parametrize("name", [n for n in CASES if "U" in build_of(n).letters])
def test_sounds_are_read_in_full(name):
    build = build_of(name)
    model, parts = build.model(), build.samples(("3 U 6", "2 A 3 U 5", "9"))
    plain = forward(model, parts[0]).logits
    with winnow.compress(model, "divprune:keep=5") as handle:
        assert torch.equal(forward(model, parts[0]).logits, plain)
        batch = forward(model, build.collate(parts)).logits[:, -1]
        assert [(item.row, item.modality, len(item.kept)) for item in handle.last.items] == [(1, "image", 5)]
        alone = torch.cat([forward(model, part).logits[:, -1] for part in parts])
    assert (batch - alone).abs().max() <= 2e-5


@pytest.mark.parametrize("name", CASES)
def test_points_and_queries_that_a_tower_does_not_have_are_refused(name):
    model = build_of(name).model()
    with pytest.raises(winnow.UnsupportedError, match=r"\[CLS\]"):
        winnow.compress(model, Received(row=VisionAttention(query="cls")))
    if not CASES[name].features:
        with pytest.raises(winnow.UnsupportedError, match="features"):
            winnow.compress(model, Pick(at="features"))
    info = family_of(model).info(model)
    tower = encoders(name, model).blocks
    assert info.vision_depth == len(tower)
    assert info.vision_width == next(tower.parameters()).shape[-1]


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].features])
def test_tokens_picked_at_features_are_those_with_the_projected_rows(name):
    """Each row of the tower is projected alone, so what is picked before the projector equals picking behind it."""
    model, build = build_of(name).model(), build_of(name)
    model.set_attn_implementation("eager")  # SDPA leaves out the soft caps of PaliGemma 2
    parts = build.samples(ROWS)
    expected = []
    for _, _, _, alone in pictures(name, model, ROWS):
        expected.append(top(score(alone.projector), 6).tolist())
    with winnow.compress(model, Pick(keep=6, at="features")) as handle:
        output = generate(model, build.collate(parts))
        items = handle.last.items
    assert [item.kept.tolist() for item in items] == expected
    reference, tokens = MaskedReference(model), new_tokens(output, build.collate(parts))
    for row, part in enumerate(parts):
        at = (part["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
        kept = [torch.tensor(own) for item, own in zip(items, expected, strict=True) if item.row == row]
        runs = list(at.view(len(kept), -1)) if kept else []
        stay = [run[own] for run, own in zip(runs, kept, strict=True)]
        by_hand = reference.run(part, runs, tokens[row, :-1].tolist(), [Cut(0, lambda rows, left, stay=stay: stay)])
        assert (step_logits(output)[row] - by_hand.logits).abs().max() <= 2e-5


def test_rows_merged_at_features_are_projected_and_take_the_first_places():
    """PaliGemma: the whole prompt sees itself, so the shortened prompt is the plain model on fewer rows."""
    name = "paligemma"
    model, build = build_of(name).model(), build_of(name)
    plain = encoders(name, model).model
    plain.set_attn_implementation("eager")
    for part in build.samples(("3 A 6", "2 B 4 C 5")):
        with winnow.compress(model, Folded()), torch.no_grad():
            found = forward(model, part).logits[0, -1]
        with torch.no_grad():
            features = plain.base_model.vision_tower(part["pixel_values"]).last_hidden_state
            rows = plain.get_input_embeddings()(part["input_ids"][0])
            at = (part["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].view(len(features), -1)
            places = torch.arange(len(rows))
            for run, own in zip(at, features, strict=True):
                firsts = torch.arange(0, len(own), 2).flip(0)
                means = torch.stack([own[i : i + 2].mean(0) for i in firsts])
                rows[run[: len(firsts)]] = plain.base_model.multi_modal_projector(means[None])[0]
                places[run[: len(firsts)]] = run[firsts]
            gone = torch.cat([run[(len(run) + 1) // 2 :] for run in at])
            stays = torch.ones(len(rows), dtype=torch.bool)
            stays[gone] = False
            expected = plain(
                inputs_embeds=rows[stays][None],
                attention_mask=torch.ones(1, int(stays.sum()), dtype=torch.int64),  # else gaps are read as packed rows
                position_ids=places[stays][None] + 1,
                token_type_ids=torch.zeros(1, int(stays.sum()), dtype=torch.int64),
            ).logits[0, -1]
        assert (found - expected).abs().max() <= 2e-5


def test_pooling_that_leaves_patches_out_is_refused():
    model = build_of("gemma3").model()
    model.config.mm_tokens_per_image = 9  # 8 × 8 patches by 2 are 4 × 4; by 8 // 3 = 2 too
    assert winnow.compress(model, "divprune").detach() is None
    model.config.vision_config.image_size = 63  # 9 × 9 patches
    model.config.mm_tokens_per_image = 16
    with pytest.raises(winnow.UnsupportedError, match="9 × 9 patches by 2"):
        winnow.compress(model, "divprune")


def test_the_classifier_of_shieldgemma_is_compressed_through_the_model_inside():
    inner = build_of("shieldgemma2").model()
    model = ShieldGemma2ForImageClassification(inner.config)
    model.model, model.yes_token_index, model.no_token_index = inner, 20, 21
    part = build_of("shieldgemma2").sample("3 A 6")
    plain = forward(model, part).probabilities
    with winnow.compress(inner, "divprune:keep=5") as handle:
        assert (forward(model, part).probabilities - plain).abs().max() > 1e-4
        assert len(handle.last.items[0].kept) == 5
