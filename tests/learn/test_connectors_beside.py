"""What is read beside the sequence in training is what the engine reads."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

import winnow
from tests.learn.test_connectors import folder  # noqa: F401
from winnow.learn.connectors import clips
from winnow.learn.connectors.beside import AJAR, as_the_layer
from winnow.learn.connectors.clips import LEARNED, Frozen, questions_of, rows_of
from winnow.learn.connectors.fit import recipe_of
from winnow.learn.connectors.recipe import answering
from winnow.parts.cross_attention import GatedHeads, GatedStates
from winnow.parts.learned import untrained
from winnow.reference import video
from winnow.world.clips import clip

PLANS = {"crosslmm": "crosslmm:grid=2", "slow-fast-video-mllm": "slow-fast-video-mllm:stride=4,least=1"}


def opened(slug: str):
    """The recipe of a method whose gates are open before it is trained."""
    kind = recipe_of(slug)

    class Open(kind):
        settings: ClassVar = {**kind.settings, "gate": 0.6, **({"grid": 2} if slug == "crosslmm" else {})}

    return Open


@pytest.fixture(scope="module")
def frozen(folder):  # noqa: F811
    torch.set_num_threads(1)
    return Frozen(folder)


@pytest.mark.parametrize("slug", PLANS)
def test_the_harness_reads_beside_the_sequence_what_the_engine_reads(slug, folder, frozen):  # noqa: F811
    own = opened(slug)(frozen)
    seen = clip(clips.FIRST, types=LEARNED, per_type=clips.PER_TYPE)
    record = frozen.record(seen)
    model, processor = video.load(folder)
    asked = questions_of(record)[:3]
    inputs = processor(seen.pixels, asked[0].text)
    tower = model.get_video_features(**{n: inputs[n] for n in ("pixel_values_videos", "video_grid_thw")})
    record["tokens"] = torch.cat(list(tower.pooler_output))  # not in half precision
    rows = [type(row)(row.tokens, (one,)) for row in rows_of([record], asks=False) for one in asked]
    with torch.no_grad():
        output = own.outputs(own.make(), rows)
        logits, _ = answering(frozen, rows, output)
        blind, _ = answering(frozen, rows, type(output)(output.tokens, output.at))
        assert (logits - blind).abs().max() > 1e-2
        with winnow.compress(model, f"{PLANS[slug]},gate=0.6,weights=untrained", processor=processor):
            for row, one in enumerate(asked):
                found = model(**processor(seen.pixels, one.text)).logits[0, -1]
                assert (logits[row, len(video.token_ids(one.text))] - found).abs().max() <= 1e-4


@pytest.mark.parametrize("slug", PLANS)
def test_gradients_reach_all_that_reads_and_nothing_else(slug, frozen):
    own = recipe_of(slug)(frozen)
    module = untrained(own.make)
    assert all(reader.gate == 0 for reader in module.values())
    own.start(module)
    own.answers(module, rows_of([frozen.record(seen) for seen in clips.drawn(0, 2)], False)).backward()
    idle = {name for name, x in module.named_parameters() if x.grad is None or x.grad.abs().max() == 0}
    assert not {name for name in idle if not name.endswith("k.bias")}  # which no attention depends on
    assert all(x.grad is None for x in frozen.model.parameters())
    assert not [name for name, part in frozen.model.named_modules() if part._forward_pre_hooks or part._forward_hooks]


@pytest.mark.parametrize("kind", [GatedHeads, GatedStates])
def test_what_reads_starts_as_the_layer(kind, frozen):
    """Keys and values of visual tokens are those that the layer itself would make, before they are turned."""
    layer, info = frozen.model.model.language_model.layers[0], frozen.info
    reader = untrained(lambda: kind(info.width, info.heads, info.kv_heads, info.head_dim))
    as_the_layer(reader, layer)
    assert reader.gate == AJAR
    x = torch.randn(1, 5, info.width, generator=torch.Generator().manual_seed(0))
    k, v = reader.beside(x)
    normed = layer.input_layernorm(x)
    for made, own in ((k, layer.self_attn.k_proj), (v, layer.self_attn.v_proj)):
        assert (made.transpose(1, 2).flatten(2) - own(normed)).abs().max() <= 1e-5
