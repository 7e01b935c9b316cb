"""Scaling a picture down to a number of tokens: as the processor's own limit does it, and never to more."""

from __future__ import annotations

import pytest
import torch
import zoo
from builds.grids import END, MERGE, PATCH, START
from builds.qwen import BUILDS
from hypothesis import given
from hypothesis import strategies as st
from picture_processors import QwenProcessor, asked, inputs_of
from PIL import Image
from probes import forward
from torch import nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

import winnow
from winnow.contract import ModelInfo, Observe, PictureView, Recut, State
from winnow.core.errors import UnsupportedError
from winnow.methods.downscale import Downscale
from winnow.models.picture_sizes import PictureSizes
from winnow.models.supported_versions import trying

SIDE = 28
SIZES = PictureSizes(SIDE, 4 * SIDE**2, 1280 * SIDE**2)
sides = st.integers(8, 4000)


def view_of(high: int, wide: int) -> PictureView:
    rows, columns = SIZES.grid(high, wide)
    return PictureView(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), (high, wide), SIDE, rows * columns, SIZES.fewest)


def scaled(keep, high: int, wide: int) -> tuple[int, int] | None:
    """Rows and columns of tokens; None where the picture stays as it is."""
    action = Downscale(keep=keep).scale(view_of(high, wide), State())
    if isinstance(action, Observe):
        return None
    assert isinstance(action, Recut)
    assert action.box is None
    return action.size[0] // SIDE, action.size[1] // SIDE


@given(sides, sides, st.integers(1, 2000), st.integers(1, 2000))
def test_sizes_are_those_of_the_image_processor(high, wide, least, most):
    if max(high, wide) > 200 * min(high, wide) or least > most:
        return
    found = PictureSizes(SIDE, least * SIDE**2, most * SIDE**2).grid(high, wide)
    want = smart_resize(high, wide, SIDE, least * SIDE**2, most * SIDE**2)
    assert found == (want[0] // SIDE, want[1] // SIDE)


@pytest.mark.parametrize("processor", [object(), Qwen2VLImageProcessorPil(do_resize=False)])
def test_processors_of_other_rules_are_not_known(processor):
    assert PictureSizes.of(processor, SIDE) is None
    assert PictureSizes.of(Qwen2VLImageProcessorPil(), 32) is None
    assert PictureSizes.of(Qwen2VLImageProcessorPil(), None) is None
    known = PictureSizes.of(Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 9408}), SIDE)
    assert known == PictureSizes(SIDE, 3136, 9408)


@pytest.mark.system("downscale", "exact")
@given(sides, sides, st.integers(1, 1280))
def test_it_is_the_processors_own_limit(high, wide, keep):
    """What `max_pixels` of so many tokens gives, wherever that is no more than them: of strips it may be."""
    if max(high, wide) > 200 * min(high, wide):
        return
    found, tokens = scaled(keep, high, wide), view_of(high, wide).tokens
    if keep >= tokens:
        assert found is None
        return
    rows, columns = found
    assert rows * columns <= keep
    if keep < SIZES.fewest:
        return  # what the engine refuses
    assert rows * columns >= SIZES.fewest
    assert SIZES.grid(rows * SIDE, columns * SIDE) == found  # the processor leaves it as it is
    want = smart_resize(high, wide, SIDE, 1, keep * SIDE**2)
    is_limit = round(high / SIDE) * round(wide / SIDE) > keep
    if is_limit and SIZES.least <= want[0] * want[1] <= keep * SIDE**2:
        assert (rows * SIDE, columns * SIDE) == want


@given(sides, sides, st.integers(1, 100))
def test_a_share_is_met_but_for_the_smallest_pictures(high, wide, percent):
    if max(high, wide) > 200 * min(high, wide):
        return
    view, found = view_of(high, wide), scaled(f"{percent}%", high, wide)
    most = max(Downscale(keep=f"{percent}%").keep.of(view), SIZES.fewest)
    rows, columns = SIZES.grid(high, wide) if found is None else found
    assert rows * columns <= most or view.tokens == rows * columns <= most
    assert SIZES.grid(rows * SIDE, columns * SIDE) == (rows, columns)


@pytest.mark.system("downscale", "exact")
@pytest.mark.parametrize(
    ("keep", "size", "grid"),
    [
        (32, (560, 560), (5, 5)),  # √32 is 5.66
        (64, (560, 560), (8, 8)),
        (100, (280, 1120), (5, 20)),
        ("25%", (560, 560), (10, 10)),
        (0.5, (560, 1120), (14, 28)),  # √½ of 20 × 40 is 14.1 × 28.3
        (7, (28, 2800), (1, 7)),  # a strip: the area alone would say 1 × 26
        (7, (2800, 28), (7, 1)),
        (399, (560, 560), (19, 19)),
        (400, (560, 560), None),
        ("100%", (3000, 4000), None),  # the processor makes 1,280 tokens of it at the most
        (1000, (3000, 4000), (27, 36)),
        (4, (56, 84), (2, 2)),  # 1 × 2 would be scaled up again
        ("25%", (56, 56), None),  # the processor makes four tokens of any picture
        ("25%", (84, 84), (2, 2)),
    ],
)
def test_grids_by_hand(keep, size, grid):
    assert scaled(keep, *size) == grid


def keeps_the_aspect(scale) -> None:
    """The shape of what is left is nearer to that of the picture than a square is, at a sixteenth of the tokens."""
    near = 0
    for high, wide in ((700, 1400), (1400, 700), (600, 1500), (1500, 500)):
        rows, columns = scale("6.25%", high, wide)
        near += abs(rows / columns - high / wide) < abs(1 - high / wide) / 4
    assert near == 4, near


@pytest.mark.system("downscale", "directional")
def test_a_long_picture_stays_long():
    keeps_the_aspect(scaled)


def square(keep, high: int, wide: int) -> tuple[int, int]:
    """A stub: as many tokens, in a square."""
    side = int((high * wide / SIDE**2 / 16) ** 0.5)
    return side, side


def test_the_aspect_tells_a_stub():
    with pytest.raises(AssertionError):
        keeps_the_aspect(square)


def grids(name: str) -> tuple[nn.Module, QwenProcessor]:
    """A build that takes pictures at their own resolution, and a processor for it."""
    if name == "qwen2_5_vl":
        return zoo.model(name), QwenProcessor(most=100)
    (build,) = [build for build in BUILDS if build.name == name]
    return build.model(), QwenProcessor(most=100, side=MERGE * PATCH, marks=(f"w{START}", f"w{END}"))


@pytest.mark.system("downscale", "model")
@pytest.mark.parametrize("build", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_5"])
def test_on_a_model_it_is_the_picture_scaled_by_hand(build):
    model, processor = grids(build)
    pictures = [Image.effect_noise(size, 70).convert("RGB") for size in ((150, 100), (90, 200))]
    side = model.config.vision_config.patch_size * model.config.vision_config.spatial_merge_size
    with trying(), winnow.compress(model, "downscale:keep=12", processor=processor) as handle:
        chosen = handle.prompt(asked(*pictures))
        with handle.using(handle.plan, prompt=chosen):
            found = forward(model, inputs_of(processor, chosen.messages)).logits
        items = handle.last.items
    by_hand = [picture.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
               for picture, (rows, columns) in zip(pictures, ((2, 4), (5, 2)), strict=True)]  # fmt: skip
    assert [(item.picture.grid, item.layout.n_content) for item in items] == [((2, 4), 8), ((5, 2), 10)]
    plain = grids(build)[0]
    assert torch.equal(found, forward(plain, inputs_of(processor, asked(*by_hand))).logits)
    whole = forward(plain, inputs_of(processor, asked(*pictures))).logits
    assert whole.shape[1] > found.shape[1]


def test_models_that_bring_pictures_to_one_size_are_refused():
    with pytest.raises(UnsupportedError, match=r"cannot run on LLaVA: its processor brings pictures to one size"):
        Downscale().bind(ModelInfo("LLaVA", points=("pixels", "projected")))
    assert Downscale().bind(ModelInfo("Qwen", points=("pixels",), token_side=SIDE))[1][0].at.name == "pixels"
