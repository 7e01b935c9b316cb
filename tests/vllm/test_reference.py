"""The bundled model with wider heads, which `make bench-serve-vllm` serves, is the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from winnow import reference
from winnow.core.errors import WinnowError
from winnow.reference.wider import widened, write_wider
from winnow.world import scene

HEADS, NARROW, WIDE = 4, 48, 64


def attended(x: Tensor, weights: dict[str, Tensor], width: int) -> Tensor:
    """`[n, D]` causal attention by hand; the first 48 channels of each head are rotated."""
    q, k, v = (
        (x @ weights[name].T).unflatten(1, (HEADS, width)).transpose(0, 1) for name in ("q_proj", "k_proj", "v_proj")
    )
    angle = torch.arange(len(x))[:, None] * 1e6 ** (-torch.arange(0, NARROW, 2) / NARROW)

    def rotated(own: Tensor) -> Tensor:
        first, second = own[..., : NARROW // 2], own[..., NARROW // 2 : NARROW]
        turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
        return torch.cat([*turned, own[..., NARROW:]], -1)

    scores = rotated(q) @ rotated(k).transpose(1, 2) / width**0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ weights["o_proj"].T


def test_wider_heads_attend_as_before() -> None:
    generator = torch.Generator().manual_seed(0)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    weights = {name: torch.randn(192, 192, generator=generator) / 14 for name in names}
    wider = {
        name: widened(f"language_model.model.layers.0.self_attn.{name}.weight", own, NARROW, WIDE)
        for name, own in weights.items()
    }
    assert wider["q_proj"].shape == (256, 192)
    assert wider["o_proj"].shape == (192, 256)
    x = torch.randn(9, 192, generator=generator)
    torch.testing.assert_close(attended(x, wider, WIDE), attended(x, weights, NARROW))
    tower = "vision_tower.encoder.layers.0.self_attn.q_proj.weight"
    assert widened(tower, weights["q_proj"], NARROW, WIDE) is weights["q_proj"]


def test_heads_that_are_not_wider_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WinnowError, match="width=48: the heads of 'small' have 48 channels"):
        write_wider(tmp_path / "same", NARROW)
    assert not (tmp_path / "same").exists()


def test_vllm_answers_as_the_bundled_model(engine: Any, tmp_path: Path) -> None:
    from vllm import SamplingParams

    llm = engine(str(write_wider(tmp_path / "wider")), {"plan": "full"})
    model, processor = reference.load()
    asked = []
    for seed in range(40, 50):
        drawn = scene(seed, 224, "test")
        asked.append((drawn.image, drawn.questions[seed % len(drawn.questions)].text))
    requests = [{"prompt": reference.prompt(text), "multi_modal_data": {"image": [image]}} for image, text in asked]
    said = llm.generate(requests, SamplingParams(max_tokens=reference.MAX_NEW_TOKENS, temperature=0), use_tqdm=False)
    wanted = [reference.answer(model, processor, image, text) for image, text in asked]
    assert [own.outputs[0].text.strip() for own in said] == wanted
    assert len(set(wanted)) > 3
