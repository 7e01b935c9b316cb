"""[CLS] top-k on a real Audio Spectrogram Transformer, block by block: no class of it is reached by the engine."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import ASTConfig, ASTModel

from winnow.core.errors import WinnowError
from winnow.parts.cls_top_k import AFTER, annealed, cls_top_k


def attention(seed, n, b=2, heads=3):
    return torch.randn(b, heads, n, n, generator=torch.Generator().manual_seed(seed)).softmax(-1)


@pytest.mark.parametrize("rate", [0.1, 0.29, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("n", [3, 12, 50])
def test_the_best_patches_of_the_row_of_cls_stay_in_their_order(n, rate):
    weights = attention(n, n)
    kept = cls_top_k(weights, rate)
    for own, index in zip(weights, kept.index, strict=True):
        row = own[:, 0].double().mean(0).tolist()
        count = math.ceil(round(rate * 100) * (n - 2) / 100)
        best = sorted(range(2, n), key=lambda t: -row[t])[:count]
        assert index.tolist() == [0, 1, *sorted(best)]


def test_a_rate_of_one_is_the_identity():
    kept = cls_top_k(attention(0, 20), 1.0)
    assert kept.index.tolist() == [list(range(20))] * 2


def test_the_rate_is_lowered_over_fifteen_epochs_behind_the_fifth():
    assert [annealed(0.5, epoch) for epoch in (0, 5, 20, 24)] == [1.0, 1.0, 0.5, 0.5]
    assert annealed(0.7, 12) == pytest.approx(1 - 0.3 * 7 / 15)


@pytest.fixture(scope="module")
def ast():
    config = ASTConfig(
        hidden_size=32,
        num_hidden_layers=12,
        num_attention_heads=4,
        intermediate_size=64,
        num_mel_bins=32,
        max_length=64,
    )
    torch.manual_seed(0)
    return ASTModel(config).eval().requires_grad_(False)


def run(model, mels, rate):
    """A forward in which patches leave behind the blocks of the paper, and how many tokens each block read."""
    hidden, read = model.embeddings(mels), []
    model.set_attn_implementation("eager")
    weights = []
    for number, block in enumerate(blocks_of(model)):
        hook = attention_of(block).register_forward_hook(lambda m, a, out: weights.append(out[1]))
        read.append(hidden.shape[1])
        out = block(hidden)
        hidden = out[0] if isinstance(out, tuple) else out
        hook.remove()
        if number in AFTER:
            hidden = cls_top_k(weights[-1], rate).apply(hidden)
    return model.layernorm(hidden), read


def blocks_of(model):
    return getattr(model, "layers", None) or model.encoder.layer


def attention_of(block):
    outer = getattr(block, "attention", None) or block.self_attn
    return getattr(outer, "attention", outer)


def test_an_audio_spectrogram_transformer_reads_fewer_patches_behind_three_blocks(ast):
    mels = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(1))
    whole, read = run(ast, mels, 1.0)
    assert torch.allclose(whole, ast(mels).last_hidden_state, atol=1e-5)
    less, short = run(ast, mels, 0.5)
    n = read[0]
    for after in AFTER:
        n = 2 + math.ceil((n - 2) / 2)
        assert short[after + 1] == n
    assert short[: AFTER[0] + 1] == read[: AFTER[0] + 1]
    assert less.shape[1] == n
    assert not torch.allclose(less[:, 0], whole[:, 0], atol=1e-4)


@pytest.mark.parametrize(("rate", "prefix"), [(0.0, 2), (1.5, 2), (0.5, 0), (0.5, 20)])
def test_what_makes_no_sense_is_refused(rate, prefix):
    with pytest.raises(WinnowError, match="rate above 0"):
        cls_top_k(attention(0, 20), rate, prefix)
