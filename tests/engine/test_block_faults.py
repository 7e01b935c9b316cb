"""What steps in the tower may not do is refused in its own words; and corners: side mergers, rows without an anchor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
import zoo
from byhand import Hand, Reference
from cases import check_against_hand
from engine.test_blocks import Couple, Share, sharing
from probes import Look, forward
from towerhand import Tile, projected, tiles_of
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

import winnow
from winnow.core.info import ModelInfo
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.signal import Signal, Site
from winnow.core.step import Reduce, State, Step
from winnow.core.view import View
from winnow.engine.engine import Engine
from winnow.models.qwen2_5_vl import Qwen25VL
from winnow.signals.language import LMAttention
from winnow.signals.vision import VisionAttention, VisionKeys, VisionSignal


@dataclass(frozen=True)
class Made(Method):
    """A reduction made by a function of the view."""

    make: Callable[[View], Any] = field(default=lambda view: None, compare=False, metadata={"setting": False})
    at: str = "blocks[1]"  # type: ignore[misc]
    slug: ClassVar[str] = "made"

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        return (Step(Point.of(self.at), lambda view, state: self.make(view)),)


def rows(first: int, last: int | None = None) -> Callable[[View], Reduction]:
    return lambda view: Reduction.select(torch.arange(view.n)[first:last].expand(view.b, -1), view.n)


@dataclass(frozen=True)
class BlockInput(VisionSignal):
    """What goes into a block."""

    def site(self, info: ModelInfo) -> Site:
        return Site("vision", self.block(info), "hidden")


@pytest.mark.parametrize("at", ["blocks[1]", "blocks[2].mlp"])
@pytest.mark.parametrize("build", zoo.WITH_CLS)
def test_removing_or_moving_cls_is_refused(build, at):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    plain = forward(model, inputs).logits
    turned = lambda view: Reduction.select(torch.arange(view.n).flip(0).expand(view.b, -1), view.n, ordered=False)  # noqa: E731
    for make in (rows(1), turned):
        with (
            winnow.compress(model, Made(make, at=at)),
            pytest.raises(winnow.WinnowError, match=r"made.*\[CLS\].*row 0"),
        ):
            forward(model, inputs)
    assert torch.equal(forward(model, inputs).logits, plain)


@pytest.mark.parametrize("build", ["llava_siglip", "qwen2_5_vl"])
def test_a_tile_without_tokens_is_refused(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    with winnow.compress(model, Made(rows(0, 0))), pytest.raises(winnow.WinnowError, match="at least one"):
        forward(model, inputs)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (Share(at="blocks[4]"), r"block 3: nothing would change. Act at blocks\[3\]"),
        (Share(at="blocks[9].mlp"), r"blocks 0 … 4"),
        (Look((VisionKeys(2),), at="blocks[2]"), r"cannot see.*blocks\[2\].mlp it can"),
        (Look((VisionAttention(3),), at="blocks[2].mlp"), r"cannot see.*blocks\[3\].mlp it can"),
        (Look((BlockInput(2),), at="blocks[2].mlp"), r"cannot see"),
        (Look((LMAttention(0),), at="blocks[2].mlp"), r"cannot see"),
        (Plan((Look((BlockInput(2),)), Share(at="blocks[2].mlp"))), "inside block 2"),
        (Share(at="kv[1]"), r"kv\[1\]"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_attached(plan, reason):
    with pytest.raises(winnow.WinnowError, match=reason):
        winnow.compress(zoo.model("llava_clip"), plan)


def test_steps_behind_the_block_that_counts_are_left_out():
    """A method that acts in all blocks acts in those that the projector depends on."""
    model = zoo.model("llava_clip")
    with winnow.compress(model, Couple(("blocks[1]", "blocks[4]"))) as handle:
        forward(model, zoo.inputs("llava_clip", zoo.SINGLE))
        assert [point for point, _, _ in handle.last.items[0].reductions] == ["blocks[1]", "features"]


@pytest.mark.parametrize("change", [{"vision_feature_layer": [-2, -3]}, {"vision_feature_select_strategy": "full"}])
def test_a_projector_that_reads_more_than_the_patches_of_one_block_offers_no_blocks(change):
    model = zoo.model("llava_clip")
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(winnow.UnsupportedError, match=r"blocks\[1\], which .* does not offer"):
        winnow.compress(model, Share())


def test_another_layer_than_that_of_the_configuration_is_refused():
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.SINGLE)
    with winnow.compress(model, Share()), pytest.raises(winnow.UnsupportedError, match="vision_feature_layer=-3"):
        forward(model, inputs, vision_feature_layer=-3)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_attention_without_masks_takes_equal_tiles_only(build):
    """As FlashAttention does: selections of equal count run, and what needs a mask says what to do."""
    sdpa = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
    ALL_ATTENTION_FUNCTIONS.register("maskless", sdpa)
    try:
        model, inputs = zoo.model(build), zoo.inputs(build, ("3 C 6", "3 C 5"))
        model.set_attn_implementation({"vision_config": "maskless"})
        with winnow.compress(model, Share()):
            forward(model, inputs)
        with winnow.compress(model, Couple()), pytest.raises(winnow.UnsupportedError, match=r"'maskless'.*sdpa"):
            forward(model, inputs)
    finally:
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop("maskless")


class Scaled(CLIPEncoderLayer):
    """A block that scales what its MLP gives."""

    def forward(self, hidden_states, attention_mask, **kwargs):
        made, _ = self.self_attn(self.layer_norm1(hidden_states), attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + made
        return hidden_states + 0.5 * self.mlp(self.layer_norm2(hidden_states))


def test_a_block_that_does_more_than_add_its_mlp_is_refused():
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.SINGLE)
    model.model.vision_tower.encoder.layers[1].__class__ = Scaled
    with (
        winnow.compress(model, Share(at="blocks[1].mlp")),
        pytest.raises(winnow.UnsupportedError, match=r"blocks\[i\]"),
    ):
        forward(model, inputs)
    with winnow.compress(model, Share(at="blocks[1]")):
        forward(model, inputs)


def test_a_bias_elsewhere_or_of_another_shape_is_refused():
    model, inputs = zoo.model("llava_siglip"), zoo.inputs("llava_siglip", zoo.SINGLE)
    biased = lambda view: Reduce(rows(0)(view), log_bias=torch.zeros(view.b, view.n))  # noqa: E731
    with (
        winnow.compress(model, Made(biased, at="projected")),
        pytest.raises(winnow.UnsupportedError, match="at blocks"),
    ):
        forward(model, inputs)
    longer = lambda view: Reduce(rows(0)(view), log_bias=torch.zeros(view.b, view.n + 1))  # noqa: E731
    with winnow.compress(model, Made(longer)), pytest.raises(winnow.WinnowError, match="log_bias of shape"):
        forward(model, inputs)


def test_blocks_that_lose_their_hooks_are_noticed():
    model, inputs = zoo.model("llava_siglip"), zoo.inputs("llava_siglip", zoo.SINGLE)
    with winnow.compress(model, Share()):
        for block in model.model.vision_tower.encoder.layers:
            block._forward_pre_hooks.clear()
        with pytest.raises(winnow.UnsupportedError, match="did not run before its projector"):
            forward(model, inputs)


def mixing(n: int, prefix: int) -> torch.Tensor:
    """`[m, n]`: [CLS] alone, then three mixtures, two of which have the same heaviest source."""
    weights = torch.full((prefix + 3, n), 1.0 / n)
    weights[:prefix] = 0
    weights[:prefix, :prefix] = 1
    for row, heaviest in enumerate((4, 9, 4)):
        weights[prefix + row, heaviest + prefix] += 1 + 0.1 * row
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize("build", ["llava_clip", "llava_siglip"])
def test_mixtures_without_an_anchor_take_the_first_places(build):
    """In the order of their heaviest sources, and at their positions."""
    prefix = int(build in zoo.WITH_CLS)

    def make(view: View) -> Reduction:
        return Reduction.mix(mixing(view.n, prefix).expand(view.b, -1, -1))

    def act(point: str, tile: Tile) -> None:
        if point == "blocks[1]":
            tile.take([*range(prefix), 4 + prefix, 9 + prefix, 4 + prefix], mixing(len(tile.ids), prefix) @ tile.x)

    def by_hand(reference, sample, entry):
        if not entry.cells:
            return Hand(entry)
        embeds, held = entry.embeds, entry.held
        for picture, (tile,) in enumerate(tiles_of(reference, sample, act)):
            item = entry.items[picture]
            made = torch.stack([projected(reference, tile.x[row + prefix]) for row in (0, 2, 1)])[None]
            before, after = held < item[0], held > item[-1]
            embeds = torch.cat([embeds[:, before], made, embeds[:, after]], 1)
            held = torch.cat([held[before], entry.content[picture][torch.tensor([4, 4, 9])], held[after]])
        return Hand(replace(entry, embeds=embeds, held=held))

    check_against_hand(zoo.model(build), zoo.samples(build, zoo.MIXED), Made(make), by_hand)


class Qwen3(Qwen25VL):
    """As a family with deepstack declares itself; what it needs in the language model is another matter."""

    name = "qwen3_vl"
    points = ("blocks", "blocks.mlp")
    side_mergers = ("visual.deepstack_merger_list",)

    def packed_order(self, model, encoding):
        return None


def qwen3() -> Qwen3VLForConditionalGeneration:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0, "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rope_parameters": rope,
        },
        vision_config={
            "depth": 4, "hidden_size": 48, "out_hidden_size": 64, "num_heads": 4, "patch_size": 14,
            "intermediate_size": 96, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2],
        },
        image_token_id=zoo.IMAGE,
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(config).eval()


def test_side_mergers_of_a_deepstack_get_their_places_back():
    """Qwen3-VL: what the mergers of lower blocks give stands at the places of the tokens that were left there."""
    model = qwen3()
    inputs = zoo.inputs("qwen2_5_vl", zoo.RAGGED)
    pictures = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    plain = model.model.get_image_features(**pictures, return_dict=True)
    stages: dict[str, list[Tile]] = {"blocks[1]": [], "blocks[3]": []}

    def act(point: str, tile: Tile) -> None:
        if point in stages:
            stages[point].append(replace(tile))
        sharing("blocks[1].mlp", 0.6)(point, tile)

    tiles = [own[0] for own in tiles_of(Reference(model), pictures, act)]
    for share in (1.0, 0.6):
        engine = Engine(model, Qwen3(), Plan.of(Share(share, at="blocks[1].mlp")))
        engine.attach()
        with torch.no_grad():
            found = model.model.get_image_features(**pictures, return_dict=True)
        engine.detach()
        if share == 1.0:
            assert all(torch.equal(a, b) for a, b in zip(found.pooler_output, plain.pooler_output, strict=True))
            for a, b in zip(found.deepstack_features, plain.deepstack_features, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
            continue
        visual = model.model.visual
        for picture, tile in enumerate(tiles):
            assert found.winnow.items[picture].ids.tolist() == tile.ids
            with torch.no_grad():
                made = visual.merger(tile.x.flatten(0, 1))
                assert (found.pooler_output[picture][tile.ids] - made).abs().max() < 1e-5
                for level, point in enumerate(stages):
                    own = stages[point][picture]
                    made = visual.deepstack_merger_list[level](own.x.flatten(0, 1))
                    assert (found.deepstack_features[level][picture][own.ids] - made).abs().max() < 1e-5


@dataclass(frozen=True)
class Counted(Method):
    """Counts in the tower what each token stands for, and says behind the projector what it found."""

    found: list[torch.Tensor] = field(default_factory=list, compare=False, metadata={"setting": False})
    slug: ClassVar[str] = "counted"

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        return (Step(Point("blocks", 0), self._start), Step(Point("projected"), self._end))

    def _start(self, view: View, state: State) -> tuple[Reduction, State]:
        ones = torch.ones(view.b, view.n)
        return rows(0)(view), State({"id": view.ids}, {"tile": ones[:, 0]}, {}, {"size": ones})

    def _end(self, view: View, state: State) -> tuple[Reduction, State]:
        assert not state.item  # facts of a tile are none of the item
        self.found.extend([state.summed["size"], state.token["id"]])
        return rows(0)(view), state


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_what_was_remembered_in_the_tower_goes_on_behind_it(build):
    """Through another method's merges, from tiles to items, and into the order of the LM."""
    model, counted = zoo.model(build), Counted()
    with winnow.compress(model, Plan((counted, Couple(("blocks[1]", "blocks[2].mlp"))))) as handle:
        forward(model, zoo.sample(build, "3 C 6"))
        (item,) = handle.last.items
    size, ids = counted.found
    assert size.shape == (1, len(item.kept))
    assert int(size.sum()) == item.n_visual
    assert torch.equal(size[0], (item.provenance().to_matrix() != 0).sum(1).float())
    per_tile = 25 if build != "qwen2_5_vl" else item.n_visual
    prefix = int(build in zoo.WITH_CLS)
    cells = torch.from_numpy(item.layout.cell[item.layout.content])[item.kept]
    assert torch.equal(ids[0] - prefix, cells % per_tile)


def test_signals_of_pixels_can_be_seen_between_blocks():
    @dataclass(frozen=True)
    class Loudness(Signal):
        def site(self, info):
            return Site("pixels")

        def read(self, seen):
            return seen.patches.float().flatten(1).std(1)

    signal = Loudness()
    for build in zoo.BUILDS:
        model, part = zoo.model(build), zoo.sample(build, "3 C 6")
        looks = [Look((signal,), at=at) for at in ("blocks[1]", "blocks[2]", "projected")]
        with winnow.compress(model, Plan((looks[0], Share(0.6), *looks[1:]))):
            forward(model, part)
        with winnow.compress(model, whole := Look((signal,))):
            forward(model, part)
        prefix = int(build in zoo.WITH_CLS)
        (late,), (all_,) = looks[2].seen(signal), whole.seen(signal)
        ids = looks[2].views[0].ids[0]
        assert len(ids) < len(all_)
        assert torch.equal(late, all_[ids])
        before = torch.cat([lane[prefix:] for lane in looks[0].seen(signal)])
        after = torch.cat([lane[prefix:] for lane in looks[1].seen(signal)])
        assert sorted(before.tolist()) == sorted(all_.tolist())
        assert sorted(after.tolist()) == sorted(late.tolist())
