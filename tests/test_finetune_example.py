"""The example that fine-tunes a compressed model: a short run, and what it prints of it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel

from winnow import reference

SOURCE = Path(__file__).resolve().parent.parent / "examples" / "finetune_compressed.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune_compressed", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_short() -> None:
    assert SOURCE.read_text(encoding="utf-8").count("\n") <= 150


def test_only_answers_are_labelled(example: ModuleType) -> None:
    model, processor = reference.load()
    processor.tokenizer.padding_side = "left"
    rows = example.examples(0, 6, "test")
    batch = example.training_batch(processor, rows)
    for ids, labels, (_, _, answer) in zip(batch["input_ids"], batch["labels"], rows, strict=True):
        known = labels != -100
        assert torch.equal(ids[known], labels[known])
        assert labels[-1] == processor.tokenizer.eos_token_id
        assert reference.decode(processor, labels[known]) == answer
        assert known[-int(known.sum()) :].all()
    with torch.no_grad():
        assert model(**batch).loss < 0.2, "the bundled model was trained on another form of answers"


def test_a_short_run_learns_and_says_what_it_measured(
    example: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "BATCH", 4)
    trained: list[PeftModel] = []
    tune = example.fine_tune
    monkeypatch.setattr(example, "fine_tune", lambda model, *rest: (trained.append(model), tune(model, *rest)))
    found = example.main(steps=6, questions=8)
    said = capsys.readouterr().out
    assert found["loss after"] != found["loss before"]
    assert f"{found['loss before']:.3f} -> {found['loss after']:.3f}" in said
    assert re.search(r"keep=1: \d\d% of", said), "the model was not compressed"
    for name in ("plain", "compressed", "tuned", "tuned, in full"):
        assert 0 <= found[name] <= 1
        assert f" {found[name]:.3f}" in said
    (model,) = trained
    assert "forward" not in vars(model.get_base_model().base_model), "still compressed"
    moved = [weight.detach() for name, weight in model.named_parameters() if "lora_B" in name]
    assert all(weight.abs().max() > 0 for weight in moved), "lora_B starts at 0: some adapter got no gradient"
