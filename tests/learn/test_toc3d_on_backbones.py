"""ToC3D on the detector's own blocks and on towers of transformers: as worked by hand, and a batch as its drives."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    VitDetConfig,
    VitDetModel,
)

from tests.learn import routed_byhand as hand
from winnow.core.errors import UnsupportedError
from winnow.learn.detection.backbones import backbone_of
from winnow.learn.detection.blocks import SIDE, WINDOW
from winnow.learn.detection.detector import WHOLE, Detector, Memory
from winnow.parts.learned import untrained

BUILDS = ("detector", "vitdet", "siglip")
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "patch_size": 8, "image_size": 64}
BLOCKS = 6


def vitdet(**others):
    windows = {"window_size": WINDOW, "window_block_indices": [i for i in range(BLOCKS) if i not in WHOLE]}
    settings = {"num_hidden_layers": BLOCKS, "pretrain_image_size": 64, "mlp_ratio": 2, **windows}
    return VitDetModel(VitDetConfig(**{**SIZES, **settings, **others}))


def clip():
    return CLIPVisionModel(CLIPVisionConfig(**SIZES, num_hidden_layers=BLOCKS, intermediate_size=64))


def siglip(**others):
    settings = {"num_hidden_layers": BLOCKS, "intermediate_size": 64, "vision_use_head": False}
    return SiglipVisionModel(SiglipVisionConfig(**{**SIZES, **settings, **others}))


def made(build):
    """A detector with random weights, and its tower where that is of transformers."""
    tower = {"detector": lambda: None, "vitdet": vitdet, "siglip": siglip}[build]()
    backbone = None if tower is None else backbone_of(tower)
    detector = untrained(lambda: Detector(width=32, queries=8, backbone=backbone)).eval()
    return detector, None if tower is None else tower.eval()


def drives(b=3):
    """Images of drives, and what is remembered of the moments before."""
    g = torch.Generator().manual_seed(0)
    images = torch.rand(b, 4, 64, 64, 3, generator=g)
    content, points = torch.randn(b, 8, 32, generator=g), torch.randn(b, 8, 3, generator=g)
    pose = torch.eye(4)[:3] + 0.1 * torch.randn(b, 3, 4, generator=g)
    return images, Memory(content, points, torch.zeros(b, 8, 2), pose, torch.full((b,), 0.5))


def alone(memory, number):
    return None if memory is None else Memory(**{k: x[number : number + 1] for k, x in vars(memory).items()})


def first_rows(build, detector, tower, images):
    """`[n, C]` the rows of one drive that go into the first block."""
    pictures = images.movedim(-1, 1)
    if build == "detector":
        weight = detector.patch.weight.unflatten(1, (8, 8, 3)).movedim(-1, 1)
        rows = hand.patched(pictures - 0.5, weight, detector.patch.bias)
    else:
        made = tower.embeddings
        if build == "vitdet":
            own, places = made.projection, made.position_embeddings[0, 1:]
        else:
            own, places = made.patch_embedding, made.position_embedding.weight
        rows = hand.patched(2 * pictures - 1, own.weight, own.bias) + places.repeat(4, 1)
    return rows + hand.on(detector.rays, detector.ray)


def layers_of(build, detector, tower):
    if build == "detector":
        return [(hand.own_block, block, SIDE if i in WHOLE else WINDOW) for i, block in enumerate(detector.blocks)]
    if build == "vitdet":
        return [(hand.vitdet_layer, x, SIDE if i in WHOLE else WINDOW) for i, x in enumerate(tower.encoder.layer)]
    return [(hand.siglip_layer, x, SIDE) for x in tower.encoder.layers]


@pytest.mark.system("toc3d", "model")
@pytest.mark.parametrize("history", [True, False], ids=["with_history", "without"])
@pytest.mark.parametrize("build", BUILDS)
@torch.no_grad()
def test_logits_are_those_worked_by_hand_and_a_batch_is_its_drives(build, history):
    detector, tower = made(build)
    images, memory = drives()
    memory = memory if history else None
    found, plain = detector(images, memory), detector(images, ratios=None)
    assert (found.kinds - plain.kinds).abs().max() > 1e-2  # something was really routed
    queries = detector._queries(memory) if history else [None] * len(images)
    for number, picture in enumerate(images):
        rows = first_rows(build, detector, tower, picture)
        wanted = hand.logits(detector, rows, layers_of(build, detector, tower), queries[number])
        said = torch.cat([found.kinds[number], found.values[number]], 1)
        torch.testing.assert_close(said, wanted, atol=1e-5, rtol=1e-5)
        single = detector(images[number : number + 1], alone(memory, number))
        torch.testing.assert_close(single.kinds[0], found.kinds[number], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(single.values[0], found.values[number], atol=1e-5, rtol=1e-5)


@pytest.mark.system("toc3d", "exact")
@pytest.mark.parametrize("build", BUILDS[1:])
@torch.no_grad()
def test_with_all_tokens_kept_the_tower_is_what_transformers_makes_of_it(build):
    detector, tower = made(build)
    detector.ray.weight.zero_()  # what the tower's own forward knows nothing of; its bias is 0
    images, memory = drives(2)
    pictures = (2 * images - 1).flatten(0, 1).permute(0, 3, 1, 2)
    last = tower(pictures, output_hidden_states=True).hidden_states[-1]
    rows = last.flatten(2).mT if build == "vitdet" else last
    wanted = detector.norm(rows.reshape(2, -1, 32))
    for found in (detector(images, ratios=None), detector(images, memory, ratios=(1.0, 1.0))):
        torch.testing.assert_close(found.features, wanted, atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_tower_and_its_scores():
    detector, tower = made("vitdet")
    images, memory = drives(1)
    detector.train()(images, memory).kinds.square().sum().backward()
    assert tower.embeddings.projection.weight.grad.abs().max() > 0
    assert all(x.attention.qkv.weight.grad.abs().max() > 0 for x in tower.encoder.layer)
    assert detector.by_history[0].project.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("tower", "says"),
    [
        (
            lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, num_hidden_layers=4, intermediate_size=64)),
            "CLIPVisionMod",
        ),
        (lambda: vitdet(patch_size=16), "patch_size of the tower is 16; .* with 8"),
        (lambda: siglip(image_size=32), "image_size of the tower is 32; .* with 64"),
        (
            lambda: vitdet(use_relative_position_embeddings=True),
            "use_relative_position_emb.* is True",
        ),
        (lambda: vitdet(residual_block_indices=[1]), r"residual_block_indices of the tower is \[1\]"),
        (lambda: vitdet(drop_path_rate=0.1), "drop_path_rate of the tower is 0.1"),
        (lambda: vitdet(window_size=3), "window_size of the tower is 3; .* divisors of 8"),
        (lambda: siglip(num_hidden_layers=3), "has 3 layers; .* 4 or more"),
    ],
)
def test_towers_that_cannot_be_routed_are_refused(tower, says):
    with pytest.raises(UnsupportedError, match=says):
        backbone_of(tower())
