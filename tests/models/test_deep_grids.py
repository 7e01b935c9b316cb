"""Families whose tokens are patches of a grid, or squares of them: what each token is, and what methods see of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from byhand import top
from contract.signals import BlockShift, CellPixels, TowerFeatures
from deep_grids import (
    BOTH,
    CASES,
    MERGE,
    ROWS,
    SEEN,
    VIDEOS,
    Grid,
    build_of,
    encoders,
    lane_of,
    lanes,
    patch_grid,
    pictures,
    with_videos,
)
from masked import Cut, MaskedReference
from probes import Folded, Look, Pick, Received, forward, generate, new_tokens, score, step_logits
from torch import Tensor
from transformers import ShieldGemma2ForImageClassification

import winnow
from winnow.core.plan import Plan
from winnow.models.families import family_of
from winnow.signals.vision import VisionAttention, VisionKeys


@pytest.mark.parametrize(("name", "rows"), SEEN)
def test_each_token_stands_where_its_patches_are(name, rows):
    model = build_of(name).model()
    look = Look(needs=(CellPixels(),))
    with winnow.compress(model, look):
        forward(model, build_of(name).batch(rows))
    found, expected = lanes(look), pictures(name, model, rows)
    assert len(found) == len(expected)
    for _, tensors, grid, alone in expected:
        tokens, signals, layout = lane_of(found, alone.projected)
        assert layout.n == layout.n_content == len(tokens) == len(grid.rows)
        boxes = torch.tensor(layout.boxes)
        down, across = grid.size
        centres = (grid.places[grid.pixels].double().mean(1) + 0.5) / torch.tensor([down, across])
        assert torch.allclose((boxes[:, :2] + boxes[:, 2:]) / 2, centres.flip(1))
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        assert torch.allclose(area, torch.full_like(area, grid.frames / len(tokens)))
        frames = torch.arange(len(tokens)) // (len(tokens) // grid.frames)
        assert layout.place[:, 1].tolist() == frames.tolist()
        pixels = tensors.get("pixel_values", tensors.get("pixel_values_videos"))
        own = square_patches(model, pixels) if pixels.ndim == 4 else pixels.reshape(-1, pixels.shape[-1])
        behind = own[grid.pixels].flatten(1)
        assert torch.equal(signals[CellPixels()].sort(1).values, behind.sort(1).values)


def square_patches(model: Any, pixels: Tensor) -> Tensor:
    """`[1, 3, H, W]` → `[patches, values]`, row by row."""
    size = model.config.vision_config.patch_size
    return pixels[0].unflatten(1, (-1, size)).unflatten(3, (-1, size)).permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)


@pytest.mark.parametrize(("name", "rows"), SEEN)
def test_signals_of_a_batch_are_those_of_each_picture_alone(name, rows):
    model = build_of(name).model()
    blocks = range(len(encoders(name, model).blocks))
    kinds = (lambda i: VisionAttention(i, query="all"), VisionKeys, BlockShift)
    needs = (*(kind(i) for kind in kinds for i in blocks), TowerFeatures())
    look = Look(needs=needs)
    with winnow.compress(model, look):
        forward(model, build_of(name).batch(rows))
    found = lanes(look)
    for _, _, grid, alone in pictures(name, model, rows):
        _, signals, _ = lane_of(found, alone.projected)
        for i in blocks:
            check(signals[VisionAttention(i, query="all")], alone.received[i], grid, 1e-6)
            check(signals[VisionKeys(i)], alone.keys[i], grid, 1e-4)
            shift = (alone.after[i] - alone.before[i]).norm(dim=-1)
            check(signals[BlockShift(i)], shift, grid, 1e-4)
        check(signals[TowerFeatures()], alone.projector, grid, 1e-3)


def check(found: Tensor, rows: Tensor, grid: Grid, tolerance: float) -> None:
    expected = rows if len(rows) == len(grid.rows) else rows[grid.rows].mean(1)
    assert (found - expected).abs().max() <= tolerance
    assert expected.std() > 100 * tolerance


METHODS = ("divprune:keep=7", "hiprune:keep=7", "fastervlm:keep=7", "fastv:keep=7", "pyramiddrop")
# Where a method cannot run, and what it is told.
REFUSED = {
    ("hiprune:keep=7", "gemma4_unified"): "knows no vision tower",
    ("fastervlm:keep=7", "gemma4_unified"): "knows no vision tower",
    ("pyramiddrop", "qwen3_5"): "has no attention to look at",
    ("pyramiddrop", "qwen3_5_moe"): "has no attention to look at",
    ("fastv:keep=7", "gemma4"): "read the keys of layer 0",
    ("pyramiddrop", "gemma4"): "read the keys of layer 0",
    ("fastv:keep=7", "paligemma2"): "softcap",
    ("pyramiddrop", "paligemma2"): "softcap",
}


RUN = [(n, p) for n in CASES for p in METHODS]


@pytest.mark.parametrize(("name", "plan"), RUN)
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


@pytest.mark.parametrize("name", [n for n in with_videos() if not n.startswith("glm")])
def test_videos_are_items_of_their_own(name):
    """In any order among pictures; frames with text between them are one item."""
    model, parts = build_of(name).model(), build_of(name).samples(BOTH)
    with winnow.compress(model, "divprune:keep=5") as handle:
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
    with pytest.raises(winnow.UnsupportedError, match=r"\[CLS\]|no vision tower"):
        winnow.compress(model, Received(row=VisionAttention(query="cls")))
    if not CASES[name].features:
        with pytest.raises(winnow.UnsupportedError, match="features"):
            winnow.compress(model, Pick(at="features"))
    info = family_of(model).info(model)
    reference = encoders(name, model)
    assert info.vision_depth == len(reference.blocks)
    reads = next((reference.blocks or reference.projector).parameters())
    assert info.vision_width == reads.shape[-1]


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


class TowerByHand:
    """A plain copy whose encoder goes on with some units of a single picture from a block on.

    What the merger makes of them stands at their places, and zeros elsewhere, so that the plain model can run on.

    Args:
        block: before which, or between whose attention and MLP (`half`), units leave.
        choose: from `[units, 4 · C]` the units that stay.
    """

    def __init__(self, model: Any, block: int, half: bool, choose: Callable[[Tensor], Tensor]) -> None:
        self.reference = MaskedReference(model)
        self.visual = self.reference.model.base_model.visual
        self.block, self.half, self.choose = block, half, choose
        for index, module in enumerate(self.visual.blocks):
            if index >= block:
                module.register_forward_pre_hook(functools.partial(self._enter, index), with_kwargs=True)
        if half:
            self.visual.blocks[block].register_forward_hook(self._leave_half, with_kwargs=True)
        for merger in (self.visual.merger, *getattr(self.visual, "deepstack_merger_list", ())):
            merger.register_forward_hook(self._leave_merger)

    def _enter(self, index: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if index == self.block and not self.half:
            self.kept = self.choose(args[0].unflatten(0, (-1, MERGE**2)).flatten(1))
            args = (self._cut(args[0]), *args[1:])
        if index == self.block and self.half:
            return None
        ends = torch.tensor([0, len(self.kept) * MERGE**2], dtype=torch.int32)
        turns = tuple(map(self._cut, kwargs["position_embeddings"]))
        return args, {**kwargs, "cu_seqlens": ends, "position_embeddings": turns}

    def _leave_half(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Tensor:
        rows = args[0] + module.attn(module.norm1(args[0]), **kwargs)
        self.kept = self.choose(rows.unflatten(0, (-1, MERGE**2)).flatten(1))
        rows = self._cut(rows)
        return rows + module.mlp(module.norm2(rows))

    def _cut(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, MERGE**2))[self.kept].flatten(0, 1)

    def _leave_merger(self, module: Any, args: tuple, made: Tensor) -> Tensor | None:
        if len(made) == self.units:
            return None  # a lower block's features, before anything left
        return made.new_zeros(self.units, made.shape[-1]).index_copy(0, self.kept, made)

    def run(self, sample: dict[str, Tensor], run: Tensor, forced: list[int]) -> Tensor:
        """`[T, vocabulary]`; `run` are the positions of the picture's placeholders."""
        self.units = len(run)
        cut = Cut(0, lambda rows, left: [run[self.kept]])
        return self.reference.run(sample, [run], forced, [cut]).logits


PACKED = [name for name in CASES if CASES[name].grid is patch_grid and not CASES[name].hybrid]


@pytest.mark.parametrize("at", ["blocks[0]", "blocks[1]", "blocks[2]", "blocks[1].mlp"])
@pytest.mark.parametrize("name", PACKED)
def test_units_that_leave_between_blocks_equal_by_hand(name, at):
    """Also DeepStack: what lower blocks made of a unit that is kept is added to its row."""
    model, build = build_of(name).model(), build_of(name)
    parts = build.samples(("3 A 6", "3 B 9"))
    with winnow.compress(model, Pick(keep=6, at=at)) as handle:
        output = generate(model, build.collate(parts))
        items = handle.last.items
    logits, tokens = step_logits(output), new_tokens(output, build.collate(parts))
    for row, part in enumerate(parts):
        by_hand = TowerByHand(model, int(at[7]), at.endswith("mlp"), lambda units: top(score(units), 6))
        places = (part["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
        expected = by_hand.run(part, places, tokens[row, :-1].tolist())
        assert items[row].kept.tolist() == by_hand.kept.tolist()
        assert (logits[row] - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].features])
def test_patches_that_leave_between_blocks_equal_by_hand(name):
    model, build = build_of(name).model(), build_of(name)
    model.set_attn_implementation("eager")
    parts = build.samples(("3 A 6", "3 B 9"))
    with winnow.compress(model, Pick(keep=6, at="blocks[1]")) as handle:
        output = generate(model, build.collate(parts))
        items = handle.last.items
    for row, part in enumerate(parts):
        reference, kept = MaskedReference(model), []
        base = reference.model.base_model

        def leave(module: Any, args: tuple, kept: list[Tensor] = kept) -> Any:
            kept.append(top(score(args[0][0]), 6))
            return (args[0][:, kept[0]], *args[1:])

        def come_back(module: Any, args: tuple, made: Tensor, kept: list[Tensor] = kept) -> Tensor:
            return made.new_zeros(1, 16, made.shape[-1]).index_copy(1, kept[0], made)

        base.vision_tower.encoder.layers[1].register_forward_pre_hook(leave)
        base.multi_modal_projector.register_forward_hook(come_back)
        run = (part["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
        tokens = new_tokens(output, build.collate(parts))[row, :-1].tolist()
        cut = Cut(0, lambda rows, left, run=run, kept=kept: [run[kept[0]]])
        expected = reference.run(part, [run], tokens, [cut]).logits
        assert items[row].kept.tolist() == kept[0].tolist()
        assert (step_logits(output)[row] - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].hybrid])
def test_units_that_leave_between_blocks_of_a_hybrid_enter_its_lm_as_by_hand(name):
    model, build = build_of(name).model(), build_of(name)
    part, look = build.sample("3 A 6"), Look()
    with winnow.compress(model, Plan((Pick(keep=6, at="blocks[1]"), look))):
        forward(model, part)
    by_hand = TowerByHand(model, 1, False, lambda units: top(score(units), 6))
    by_hand.units = int((part["input_ids"] == model.config.image_token_id).sum())
    base = by_hand.reference.model.base_model
    with torch.no_grad():
        (rows,) = base.get_image_features(part["pixel_values"], part["image_grid_thw"], return_dict=True).pooler_output
    assert (look.views[0].tokens[0] - rows[by_hand.kept]).abs().max() <= 1e-5
