"""Training a compressed model: labels, the Trainer of transformers, adapters of PEFT; each against a run by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import zoo
from byhand import Reference
from cases import CASES, ByHand, pairs
from peft import LoraConfig, PeftModel, get_peft_model
from probes import Pick, Probed, forward
from torch import Tensor, nn
from training import IGNORED, batch_by_hand, checkpointed, gradients, labelled, learning, losses_by_hand
from transformers import Trainer, TrainingArguments

import winnow

BUILDS = pytest.mark.parametrize("build", ["llava_clip", "qwen2_5_vl"])
CHECKPOINTING = pytest.mark.parametrize("checkpointing", [False, True])


@pytest.mark.parametrize(("kind", "build"), pairs(["picked", "probed"]))
def test_a_label_on_a_dropped_token_is_predicted_by_the_survivor_in_front_of_it(kind, build):
    """Labels on everything, pictures too: all of them count, as in the plain model."""
    parts, (plan, by_hand) = zoo.samples(build, zoo.MIXED), CASES[kind]
    inputs, model = zoo.collate(parts), zoo.model(build)
    begins = inputs["attention_mask"].cumsum(1) == 1
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | begins, IGNORED)
    with winnow.compress(model, plan):
        loss = forward(model, inputs, labels=labels).loss
    reference, losses = Reference(model), []
    for part in parts:
        own = part["input_ids"][0].clone()
        own[0] = IGNORED
        losses += losses_by_hand(reference, part, by_hand, own)
    assert len(losses) == (labels != IGNORED).sum()
    assert abs(loss - torch.stack(losses).mean()) <= 1e-5


@BUILDS
def test_the_number_of_labels_of_a_larger_batch_passes_through(build):
    """Trainer divides by the labels of all micro-batches that it accumulates."""
    parts, (plan, by_hand) = zoo.samples(build, zoo.RAGGED), CASES["probed"]
    inputs, model = zoo.collate(parts), zoo.model(build)
    with winnow.compress(model, plan):
        loss = forward(model, inputs, labels=labelled(inputs), num_items_in_batch=torch.tensor(100)).loss
    assert abs(loss - torch.stack(batch_by_hand(Reference(model), parts, by_hand)).sum() / 100) <= 1e-5


class Rows(torch.utils.data.Dataset):
    """Samples for Trainer, which shuffles nothing here."""

    def __init__(self, parts: Sequence[dict[str, Tensor]]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.parts[index]


class InOrder(Trainer):
    """Trainer that reads its samples in the order in which they are."""

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def batch(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    inputs = zoo.collate(parts)
    return {**inputs, "labels": labelled(inputs)}


ROWS = ("3 A 6", "3 B 9", "2 A 4", "3 C 5", "4 B 2", "2 B 4 C 5", "3 C 8", "2 A 7")
RATE = 0.05


def trained(model: Any, parts: Sequence[dict[str, Tensor]], folder: Any, checkpointing: bool) -> list[float]:
    """The losses of two steps of two micro-batches of two samples, as Trainer logs them."""
    options = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=checkpointing,
        num_train_epochs=1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        logging_steps=1,
        save_steps=2,
        use_cpu=True,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    trainer = InOrder(model, options, train_dataset=Rows(parts), data_collator=batch, optimizers=(optimizer, None))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def loop_by_hand(model: Any, parts: Sequence[dict[str, Tensor]], by_hand: ByHand) -> list[float]:
    """The same steps written out, with plain gradient descent; tokens are chosen anew with the weights of each step."""
    found = []
    for start in range(0, len(parts), 4):
        micro = [batch_by_hand(learning(model), parts[at : at + 2], by_hand) for at in (start, start + 2)]
        if getattr(model, "accepts_loss_kwargs", True):
            loss = torch.stack([*micro[0], *micro[1]]).mean()  # over all labels of the step
        else:  # Qwen2.5-VL does not take their number from Trainer, which then means over micro-batches
            loss = (torch.stack(micro[0]).mean() + torch.stack(micro[1]).mean()) / 2
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.grad is not None:
                    weight -= RATE * weight.grad
        found.append(loss.item())
    return found


@CHECKPOINTING
@BUILDS
def test_trainer_equals_a_loop_by_hand(build, checkpointing, tmp_path):
    parts, (plan, by_hand) = zoo.samples(build, ROWS), CASES["probed"]
    model, plain = zoo.model(build), zoo.model(build)
    keys = list(model.state_dict())
    with winnow.compress(model, plan) as handle:
        losses = trained(model, parts, tmp_path, checkpointing)
        assert handle.last.flops < handle.last.flops_full
    expected = loop_by_hand(plain, parts, by_hand)
    assert losses == pytest.approx(expected, abs=1e-4)
    assert abs(losses[0] - losses[1]) > 1e-2, "nothing was learned, so the second step shows nothing"
    for (name, weight), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (weight - other).abs().max() <= 1e-5, name
    # What was saved is a plain model.
    saved = type(model).from_pretrained(tmp_path / "checkpoint-2")
    assert list(saved.state_dict()) == keys
    inputs = zoo.collate(parts[:2])
    assert torch.equal(forward(saved.eval(), inputs).logits, forward(model.eval(), inputs).logits)


def adapted(model: nn.Module) -> PeftModel:
    """Adapters in the language model and in the tower, which change what the model says."""
    config = LoraConfig(r=4, target_modules=r".*\.(q_proj|v_proj|qkv|up_proj)", lora_dropout=0.0)
    tuned = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, weight in sorted(tuned.named_parameters()):
        if "lora_" in name:
            weight.data.normal_(0, 0.1, generator=generator)
    return tuned


@CHECKPOINTING
@BUILDS
@pytest.mark.parametrize(
    ("order", "kind"), [("adapter first", "merged"), ("adapter first", "probed"), ("plan first", "probed")]
)
def test_gradients_of_adapters_equal_by_hand(order, kind, build, checkpointing):
    parts, (plan, by_hand) = zoo.samples(build, zoo.RAGGED), CASES[kind]
    inputs, model = zoo.collate(parts), zoo.model(build)
    tuned = adapted(model) if order == "adapter first" else None
    with winnow.compress(model if tuned is None else tuned, plan):
        tuned = adapted(model) if tuned is None else tuned
        tuned.train()
        if checkpointing:
            checkpointed(model)
        loss = tuned(**inputs, labels=labelled(inputs)).loss
        loss.backward()
    found = gradients(tuned)
    plain = adapted(zoo.model(build))
    expected_loss = torch.stack(batch_by_hand(learning(plain.get_base_model()), parts, by_hand)).mean()
    expected_loss.backward()
    expected = gradients(plain)
    assert abs(loss - expected_loss) <= 1e-5
    assert found.keys() == expected.keys()
    assert all("lora_" in name for name in found)
    assert any(gradient.abs().max() > 1e-3 for gradient in found.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5, name


@BUILDS
def test_an_adapter_that_is_merged_says_the_same(build):
    inputs, tuned = zoo.inputs(build, zoo.RAGGED), adapted(zoo.model(build)).eval()
    without = forward(zoo.model(build), inputs).logits
    with winnow.compress(tuned, Probed()):
        apart = forward(tuned, inputs).logits
        tuned.merge_adapter()
        assert (forward(tuned, inputs).logits - apart).abs().max() <= 1e-4
        tuned.unmerge_adapter()
        model = tuned.merge_and_unload()
        assert (forward(model, inputs).logits - apart).abs().max() <= 1e-4
    with winnow.compress(copy.deepcopy(model), Probed()) as handle:
        assert (forward(handle.model, inputs).logits - apart).abs().max() <= 1e-4
    assert (without - apart).abs().max() > 1e-2


def test_an_adapter_that_replaces_a_seam_is_refused():
    """`modules_to_save` puts a copy in the place of a whole module, and hooks would be left on the old one."""
    inputs, model = zoo.inputs("llava_clip", zoo.SINGLE), zoo.model("llava_clip")
    with winnow.compress(model, Pick(keep=3)):
        tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["multi_modal_projector"]))
        with pytest.raises(winnow.UnsupportedError, match="replaced while the model was compressed"):
            tuned(**inputs)
