"""The example that a newcomer opens first: what it prints, and the three things that it says matter."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

SOURCE = Path(__file__).resolve().parent.parent / "examples" / "minimal.py"


@pytest.fixture(scope="module")
def minimal() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def asked(minimal: ModuleType) -> tuple:
    """A model, a picture, and a question of five tokens."""
    torch.manual_seed(3)
    picture = torch.rand(1, 3, minimal.SIDE, minimal.SIDE)
    return minimal.Model().eval(), picture, torch.randint(minimal.VOCAB, (1, 5))


def test_it_is_short_and_uses_torch_alone() -> None:
    text = SOURCE.read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    assert set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)) == {"time", "torch"}


def test_what_it_prints_is_what_it_measured(minimal: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    plain, full, pruned = minimal.main(keep=64)
    said = capsys.readouterr().out
    assert (plain["tokens"], full["tokens"], pruned["tokens"]) == (576 + 12, 576 + 12, 64 + 12)
    assert "588 -> 76" in said
    assert plain["bytes"] * 76 == pruned["bytes"] * 588
    assert torch.equal(full["logits"], plain["logits"])
    assert "keep-all equals plain       True" in said
    ratio = re.search(r"first token +([\d.]+) times shorter", said)
    assert ratio is not None
    assert float(ratio[1]) == pytest.approx(plain["seconds"] / pruned["seconds"], abs=0.06)
    assert pruned["seconds"] < plain["seconds"]


def test_it_keeps_the_patches_that_cls_attends_to_at_their_positions(minimal: ModuleType, asked: tuple) -> None:
    model, picture, question = asked
    with torch.no_grad():
        _, row = model.tower(picture)
        whole, _ = model.prompt(picture, question)
        x, positions = model.prompt(picture, question, keep=7)
    best = sorted(range(minimal.V), key=lambda i: -row[0, i].item())[:7]
    assert positions.tolist() == [*sorted(best), *range(minimal.V, minimal.V + 5)]
    assert torch.equal(x, whole[:, positions])


def test_the_row_is_that_of_the_whole_attention_matrix(minimal: ModuleType, asked: tuple) -> None:
    model, picture, _ = asked
    seen = []
    last = model.tower.blocks[-1]
    hook = last.norm1.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        _, row = model.tower(picture)
        hook.remove()
        q, k, _ = last.heads(seen[0])
        matrix = torch.einsum("bhqd,bhkd->bhqk", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    torch.testing.assert_close(row, matrix.mean(1)[:, 0, 1:])
    assert row.shape == (1, minimal.V)


def test_pruning_equals_hiding_the_dropped_patches(
    minimal: ModuleType, asked: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With true positions, a dropped patch is one that nobody looks at; with renumbered ones it would not be."""
    _, picture, question = asked
    model, picture = minimal.Model().double().eval(), picture.double()
    _, pruned, _ = model.generate(picture, question, keep=9)
    with torch.no_grad():
        x, positions = model.prompt(picture, question, keep=9)
        renumbered = model.lm(x, torch.arange(len(positions)), {})
        visible = torch.zeros(minimal.V + 5, dtype=torch.bool)
        visible[positions] = True
        whole, where = model.prompt(picture, question)
    attend = torch.nn.functional.scaled_dot_product_attention

    def hiding(q, k, v, is_causal=False):
        n = q.shape[2]
        # A dropped row sees itself, so that no row is empty.
        mask = (torch.ones(n, n).tril().bool() & visible) | torch.eye(n, dtype=torch.bool)
        return attend(q, k, v, mask)

    monkeypatch.setattr(minimal.F, "scaled_dot_product_attention", hiding)
    with torch.no_grad():
        hidden = model.lm(whole, where, {})
    torch.testing.assert_close(pruned, hidden, rtol=1e-5, atol=1e-6)
    assert (renumbered - hidden).abs().max() > 1e-3


def test_decoding_with_the_cache_equals_reading_all_at_once(minimal: ModuleType, asked: tuple) -> None:
    model, picture, question = asked
    ids, _, cache = model.generate(picture, question, keep=9, new=4)
    assert {k.shape[2] for k, _ in cache.values()} == {9 + 5 + 3}
    longer = torch.cat([question, torch.tensor([ids[:3]])], 1)
    again, logits, _ = model.generate(picture, longer, keep=9)
    assert again == ids[3:]
    assert logits.shape == (1, minimal.VOCAB)
