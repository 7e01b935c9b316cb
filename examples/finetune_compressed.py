"""Fine-tune a vision-language model with a plan attached, so that it learns to live with it.

The bundled reference model (6.5 million parameters, 8 layers) reads 256 visual tokens of a picture. With this plan all
but one of them leave before its layer 3, while it still looks at the picture, and it answers worse. Adapters (LoRA) are
then trained on drawn scenes with the plan attached, as in any other training loop: `labels` go in, a loss comes out,
and gradients flow through what was kept. So the model learns to look earlier. Only `winnow.compress` is new.

Needs peft: pip install "tokenwinnow[train]". Takes a few minutes on two CPU cores.
"""

import random
import time

import torch
from peft import LoraConfig, get_peft_model

import winnow
from winnow import reference, world

PLAN = "fastv:layer=3,keep=1"
BATCH = 16


def examples(first: int, count: int, split: str) -> list[tuple]:
    """(picture, question, answer), one for each scene that gives any; no scene is in two splits."""
    found = []
    for seed in range(first, first + count):
        scene = world.scene(seed, split=split)
        if scene.questions:
            question = random.Random(seed).choice(scene.questions)
            found.append((scene.image, question.text, question.answer))
    return found


def training_batch(processor, rows: list[tuple]) -> dict:
    """Inputs with labels on the answers; pictures, questions and padding get −100, as always."""
    end = processor.tokenizer.eos_token
    texts = [f"{reference.prompt(question)} {answer}{end}" for _, question, answer in rows]
    inputs = processor(images=[image for image, *_ in rows], text=texts, padding=True, return_tensors="pt")
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, (*_, answer) in enumerate(rows):
        length = len(processor.tokenizer(f"{answer}{end}", add_special_tokens=False)["input_ids"])
        labels[row, -length:] = inputs["input_ids"][row, -length:]  # padding stands on the left
    return {**inputs, "labels": labels}


@torch.no_grad()
def accuracy(model, processor, rows: list[tuple]) -> float:
    """Share of questions that are answered exactly, greedily."""
    model.eval()
    right = 0
    for at in range(0, len(rows), BATCH):
        images, questions, answers = zip(*rows[at : at + BATCH], strict=True)
        texts = [reference.prompt(question) for question in questions]
        inputs = processor(images=list(images), text=texts, padding=True, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=reference.MAX_NEW_TOKENS, do_sample=False)
        said = processor.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(a.strip() == b for a, b in zip(said, answers, strict=True))
    return right / len(rows)


@torch.no_grad()
def loss_of(model, processor, rows: list[tuple]) -> float:
    """Mean over batches, without training."""
    model.eval()
    parts = [model(**training_batch(processor, rows[at : at + BATCH])).loss for at in range(0, len(rows), BATCH)]
    return float(torch.stack(parts).mean())


def fine_tune(model, processor, steps: int) -> None:
    """AdamW on the adapters, with a fresh batch of scenes at every step."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        loss = model(**training_batch(processor, examples(step * BATCH, BATCH, "train"))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 25 == 0:
            print(f"  step {step:4d}   loss {loss.item():.3f}", flush=True)


def main(steps: int = 100, questions: int = 100) -> dict:
    torch.manual_seed(0)
    plain, processor = reference.load()
    processor.tokenizer.padding_side = "left"
    held_out = examples(0, questions, "test")
    adapters = LoraConfig(
        r=16, lora_alpha=32, target_modules=r".*language_model.*_proj|.*multi_modal_projector\.linear_."
    )
    model = get_peft_model(plain, adapters)
    found = {"plain": accuracy(model, processor, held_out)}
    start = time.perf_counter()
    with winnow.compress(model, PLAN, processor=processor) as handle:
        found["compressed"], found["loss before"] = (f(model, processor, held_out) for f in (accuracy, loss_of))
        print(f"{PLAN}: {handle.last.flops / handle.last.flops_full:.0%} of the language model's prefill; fine-tuning")
        fine_tune(model, processor, steps)
        found["tuned"], found["loss after"] = (f(model, processor, held_out) for f in (accuracy, loss_of))
    found["tuned, in full"] = accuracy(model, processor, held_out)  # detached: all 256 tokens again
    print(f"  {time.perf_counter() - start:.0f} seconds")
    print(f"loss on held-out questions   {found['loss before']:.3f} -> {found['loss after']:.3f}")
    print(f"answered exactly, of {len(held_out)} held-out questions:")
    print(f"  as it is                   {found['plain']:.3f}")
    print(f"  with the plan              {found['compressed']:.3f}")
    print(f"  the same, fine-tuned       {found['tuned']:.3f}")
    print(f"  fine-tuned, without it     {found['tuned, in full']:.3f}")
    return found


if __name__ == "__main__":
    main()
