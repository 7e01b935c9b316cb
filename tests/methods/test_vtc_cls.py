"""VTC-CLS by its card: a sum of single-layer [CLS] rows; FasterVLM where only the feature block is read."""

from __future__ import annotations

import pytest
import torch

import winnow
from tests import zoo
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.fastervlm import FasterVLM
from winnow.methods.vtc_cls import VtcCls
from winnow.signals.vision import VisionAttention
from winnow.testing import WITH_CLS, WITHOUT_CLS, Picture

from .stubs import STUBS, ids, scores, tokens

CLIP_L = ModelInfo(model="CLIP-L", depth=32, vision_depth=24, feature_layer=-2)


def _view(*rows, layers=(3, 5)):
    return View.of(tokens(0, rows[0].shape[-1]), {VisionAttention(i): row for i, row in zip(layers, rows, strict=True)})


@pytest.mark.system("vtc-cls", "exact")
def test_golden_sum():
    a, b = torch.tensor([[0.5, 0.0, 0.3, 0.2]]), torch.tensor([[0.0, 0.5, 0.3, 0.2]])
    assert ids(VtcCls(keep=1, layers=(3, 5)).reduce(_view(a, b))) == [2]
    assert ids(VtcCls(keep=2, layers=(3, 5), combine="max").reduce(_view(a, b))) == [0, 1]
    assert ids(VtcCls(keep=2, layers=(3, 5), combine="min").reduce(_view(a, b))) == [2, 3]


def _is_linear(reduce):
    """score([a, b]) = score([a]) + score([b])."""
    for seed in range(5):
        a, b = scores(seed, 30), scores(seed + 100, 30)
        both = ids(reduce(_view(a, b), 6, (3, 5)))
        assert both == ids(reduce(_view(a + b, layers=(3,)), 6, (3,)))
        assert both != ids(reduce(_view(a, layers=(3,)), 6, (3,)))
        assert both == (a + b)[0].topk(6).indices.sort().values.tolist()


@pytest.mark.system("vtc-cls", "exact")
def test_score_is_the_sum_of_single_layer_scores():
    _is_linear(lambda view, k, layers: VtcCls(keep=k, layers=layers).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_linearity_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_linear(lambda view, k, layers: stub(view, k))


@pytest.mark.system("vtc-cls", "exact")
def test_started_at_the_feature_block_it_is_fastervlm():
    (step,) = VtcCls(keep=7, start=22).checked_steps(CLIP_L)
    assert [s.block(CLIP_L) for s in step.needs] == [FasterVLM().row.block(CLIP_L)] == [22]
    for layout in (Picture.grid(6, 5).lm, Picture.tiled(4, 2, 1).lm):
        row = scores(2, layout.n_content)
        view = View.of(tokens(0, layout.n_content), {step.needs[0]: row}, layout=layout)
        action, _ = step.act(view, State())
        assert ids(action.reduction) == ids(FasterVLM(keep=7).reduce(View.of(view.tokens, row, layout=layout)))


def test_default_reads_from_half_of_the_depth_to_the_feature_block():
    (step,) = VtcCls().checked_steps(CLIP_L)
    assert [s.layer for s in step.needs] == list(range(12, 23))  # the last block is left out: features are block 22's
    assert all(s.query == "cls" for s in step.needs)


def test_two_objects_that_different_blocks_attend_to_are_both_kept():
    middle, last = torch.full((1, 20), 0.01), torch.full((1, 20), 0.01)
    middle[0, [2, 3]], last[0, [15, 16]] = 0.4, 0.4
    assert ids(VtcCls(keep=4, layers=(3, 5)).reduce(_view(middle, last))) == [2, 3, 15, 16]
    assert ids(VtcCls(keep=4, layers=(5,)).reduce(_view(last, layers=(5,)))) == [0, 1, 15, 16]


def test_shallow_tower_reads_its_feature_block():
    info = ModelInfo(vision_depth=2, feature_layer=-2)
    (step,) = VtcCls().checked_steps(info)
    assert [s.layer for s in step.needs] == [0]


def test_no_cls_is_refused():
    with pytest.raises(UnsupportedError, match=r"vtc-cls.*no \[CLS\]"):
        VtcCls().checked_steps(WITHOUT_CLS)


def test_start_after_the_feature_block_is_refused():
    with pytest.raises(WinnowError, match="block 10"):
        VtcCls(start=11).checked_steps(WITH_CLS)


@pytest.mark.parametrize(
    "settings",
    [
        {"combine": "mean"},
        {"start": 1.5},
        {"layers": ()},
        {"layers": 3},
        {"layers": (1, "a")},
        {"start": 1, "layers": (2,)},
    ],
)
def test_wrong_settings(settings):
    with pytest.raises(WinnowError, match="allowed"):
        VtcCls(**settings)


SIDE, THING = 112, 28  # 8 × 8 patches; a thing covers 2 × 2 of them


def _scenes(count, seed):
    """Pictures `[B, 3, S, S]` of a red and a blue thing on noise, and the patches of each `[B, 2, 64]`."""
    generator = torch.Generator().manual_seed(seed)
    pictures, masks = torch.randn(count, 3, SIDE, SIDE, generator=generator) * 0.1, torch.zeros(count, 2, 8, 8)
    for picture, mask in zip(pictures, masks, strict=True):
        for thing, cell in enumerate(torch.randperm(16, generator=generator)[:2].tolist()):
            row, col = divmod(cell, 4)
            picture[2 * thing, THING * row : THING * (row + 1), THING * col : THING * (col + 1)] += 1
            mask[thing, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2] = 1
    return pictures, masks.flatten(2)


@pytest.fixture(scope="module")
def two_minded():
    """A tiny LLaVA whose tower learned to attend from [CLS] to the red thing in block 2, to the blue one in block 3."""
    torch.set_num_threads(1)
    model = zoo.model("llava_clip", side=SIDE)
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(tower.parameters(), 3e-3)
    for step in range(60):
        pictures, masks = _scenes(16, step)
        seen = tower(pictures, output_attentions=True).attentions
        rows = torch.stack([seen[block][:, :, 0, 1:].mean(1) for block in (2, 3)], 1)
        (-(rows + 1e-6).log() * masks / 4).sum(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    tower.set_attn_implementation("sdpa")
    return model


def _keeps_what_either_block_sees(model, plan):
    """Of new scenes, nearly all of both things with as many tokens as they have patches."""
    pictures, masks = _scenes(12, 1000)
    ids = torch.tensor([[3, 4, 5, *[zoo.IMAGE] * 64, 6, 7]]).expand(12, -1)
    with winnow.compress(model, plan) as handle, torch.no_grad():
        model(input_ids=ids, pixel_values=pictures)
        kept = torch.stack([item.kept for item in handle.last.items])
    found = masks.gather(2, kept[:, None].expand(-1, 2, -1)).sum(2) / 4
    assert found.mean(0).min() > 0.95


@pytest.mark.system("vtc-cls", "directional")
def test_a_thing_that_only_a_middle_block_attends_to_is_kept(two_minded):
    _keeps_what_either_block_sees(two_minded, "vtc-cls:keep=8,layers=[2,3]")


@pytest.mark.parametrize("plan", ["fastervlm:keep=8", "divprune:keep=8", "vtc-cls:keep=8,layers=[2]"])
def test_keeping_both_fails_for_one_block_and_for_what_does_not_look(two_minded, plan):
    with pytest.raises(AssertionError):
        _keeps_what_either_block_sees(two_minded, plan)
