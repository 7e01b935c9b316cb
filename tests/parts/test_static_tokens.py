"""Reuse of still tokens in blocks of a tower, against the blocks of real classes and against a loop by hand."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import Tensor

from winnow.core.errors import WinnowError
from winnow.parts.static_tokens import (
    Left,
    Parts,
    changed,
    changed_below,
    likeness,
    partial_block,
    scene_cut,
    whole_block,
)

BUILDS = ("llava_clip", "llava_siglip")
N, D = 26, 48


def blocks(build: str) -> list:
    model = zoo.model(build).model.vision_tower
    return list(model.encoder.layers)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tower(own: list, frames: Tensor, lefts: list[Left] | None, ratio: float) -> tuple[Tensor, list[Left], list[Tensor]]:
    """All blocks: in full where there is no reference, else in part."""
    made, rows = [], []
    for i, block in enumerate(own):
        if lefts is None:
            frames, left = whole_block(Parts.of(block), frames)
            made.append(left)
        else:
            frames, chosen = partial_block(Parts.of(block), frames, lefts[i], ratio)
            rows.append(chosen)
    return frames, made, rows


def plain(own: list, frames: Tensor) -> Tensor:
    for block in own:
        out = block(frames, attention_mask=None)
        frames = out if isinstance(out, Tensor) else out[0]
    return frames


@torch.no_grad()
@pytest.mark.system("stc", "exact")
@pytest.mark.parametrize("build", BUILDS)
def test_a_whole_block_is_the_block_of_the_class(build: str) -> None:
    own, frames = blocks(build), random(0, 3, N, D)
    assert (tower(own, frames, None, 1)[0] - plain(own, frames)).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.system("stc", "exact")
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_equal_frames_are_exact_at_every_ratio(build: str, ratio: float) -> None:
    own, frame = blocks(build), random(1, 1, N, D)
    _, lefts, _ = tower(own, frame, None, 1)
    found, _, rows = tower(own, frame.expand(2, -1, -1), lefts, ratio)
    assert (found - plain(own, frame)).abs().max() <= 1e-5
    assert {x.shape for x in rows} == {(2, max(1, int(N * ratio)))}


@torch.no_grad()
@pytest.mark.system("stc", "exact")
@pytest.mark.parametrize("build", BUILDS)
def test_all_of_the_tokens_are_exact_for_any_frames_and_the_error_falls_with_the_ratio(build: str) -> None:
    own, ratios = blocks(build), (0.1, 0.3, 0.6, 0.9, 1.0)
    error = dict.fromkeys(ratios, 0.0)
    for seed in range(8):
        first, change = random(seed, 2, 1, N, D)
        second = first + change * (torch.arange(N) % 3 == 0)[:, None]
        _, lefts, _ = tower(own, first, None, 1)
        for ratio in ratios:
            error[ratio] += float((tower(own, second, lefts, ratio)[0] - plain(own, second)).norm())
    assert list(error.values()) == sorted(error.values(), reverse=True)
    assert error[1.0] < 1e-3 < error[0.9]


@torch.no_grad()
@pytest.mark.system("stc", "exact")
def test_the_tokens_that_are_computed_in_the_first_block_are_those_that_changed() -> None:
    """A share of them drawn at random holds a share of what changed."""
    block, frame = blocks("llava_clip")[0], random(3, 1, N, D)
    where = torch.tensor([7, 8, 12, 13])
    other = frame.index_add(1, where, random(4, 1, 4, D))
    _, left = whole_block(Parts.of(block), frame)
    _, rows = partial_block(Parts.of(block), other, left, 4 / N)
    assert rows.tolist() == [where.tolist()]
    drawn = [torch.randperm(N, generator=torch.Generator().manual_seed(s))[:4] for s in range(50)]
    recall = sum(int(torch.isin(x, where).sum()) for x in drawn) / 200
    assert abs(recall - 4 / N) < 0.06


@torch.no_grad()
@pytest.mark.system("stc", "exact")
def test_a_partial_block_equals_the_code_by_hand() -> None:
    block, first, frames = blocks("llava_siglip")[0], random(5, 1, N, D), random(6, 2, N, D)
    frames = first + 0.4 * frames
    own = block.self_attn
    heads = own.num_heads
    _, left = whole_block(Parts.of(block), first)
    found, rows = partial_block(Parts.of(block), frames, left, 0.3)
    for lane, h in enumerate(frames):
        x = block.layer_norm1(h)
        keys = own.k_proj(x)
        like = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(keys, left.keys, strict=True)]
        chosen = sorted(sorted(range(N), key=lambda j: like[j])[: int(0.3 * N)])
        assert rows[lane].tolist() == chosen
        values, added, mlp = left.values.clone(), left.attention.clone(), left.mlp.clone()
        values[chosen] = own.v_proj(x[chosen])
        split = lambda t: t.unflatten(-1, (heads, -1)).transpose(0, 1)  # noqa: E731
        q, k, v = split(own.q_proj(x[chosen])), split(keys), split(values)
        weights = (q @ k.transpose(1, 2) * (D // heads) ** -0.5).softmax(-1)
        added[chosen] = own.out_proj((weights @ v).transpose(0, 1).flatten(1))
        h = h + added
        mlp[chosen] = block.mlp(block.layer_norm2(h[chosen]))
        assert (found[lane] - h - mlp).abs().max() <= 1e-5


def test_broken_keys_have_changed_and_ties_go_to_the_first() -> None:
    like = torch.tensor([[0.9, float("nan"), 0.9, 0.9]])
    assert changed(like, 0.5).tolist() == [[0, 1]]
    assert changed_below(like, 0.85).tolist() == [[False, True, False, False]]
    assert scene_cut(like, 0.5).tolist() == [True]


def test_a_threshold_takes_what_is_less_alike_and_a_cut_is_seen() -> None:
    keys = random(7, 1, N, D)
    same = likeness(torch.cat([keys, random(8, 1, N, D)]), keys[0])
    assert changed_below(same, 0.85).float().mean(1).tolist() == [0.0, 1.0]
    assert scene_cut(same, 0.5).tolist() == [False, True]


def test_what_does_not_fit_is_refused() -> None:
    block = blocks("llava_clip")[0]
    _, left = whole_block(Parts.of(block), random(0, 1, N, D))
    with pytest.raises(WinnowError, match="another size"):
        partial_block(Parts.of(block), random(0, 1, N + 1, D), left)
    with pytest.raises(WinnowError, match=r"ratio=1\.5"):
        partial_block(Parts.of(block), random(0, 1, N, D), left, 1.5)
    with pytest.raises(WinnowError, match="parts of a block of CLIP or SigLIP"):
        Parts.of(zoo.model("qwen2_5_vl").model.visual.blocks[0])
