"""The readable page of a model card."""

from __future__ import annotations

from typing import Any

from winnow.learn import card_controls
from winnow.learn.markdown import percents, table


def page(card: dict[str, Any]) -> str:
    """Markdown from the dictionary that `winnow.learn.card.make` writes."""
    return (
        "\n\n".join(
            part
            for part in (
                f"# The reference model `{card['preset']}`",
                "Written by `python -m winnow.learn.card`; every number is measured and stored in `card.json`.",
                _what(card),
                _accuracy(card),
                _labels(card),
                _depth(card),
                _dropping(card),
                _erasure(card),
                _held_out(card),
                _training(card),
                *card_controls.sections(card),
                "## Not run\n\n" + "\n".join(f"- {item}" for item in card["not_run"]),
            )
            if part
        )
        + "\n"
    )


def _what(card: dict[str, Any]) -> str:
    check = card["generate_check"]
    return (
        f"A `LlavaForConditionalGeneration` of {card['parameters'] / 1e6:.1f} million parameters "
        f"({card['bytes'] / 1e6:.1f} MB in bfloat16): a CLIP-type tower with [CLS] ({card['image_size']} pixels, "
        f"{card['visual_tokens']} visual tokens of the last layer but one), an MLP projector, a Llama-type language "
        f"model of {card['layers']} layers and width {card['width']}. It is a measuring instrument: it understands the "
        "pictures and questions of winnow's world and nothing else.\n\n"
        "```python\n"
        "from winnow import reference, world\n\n"
        "model, processor = reference.load()\n"
        'scene = world.scene(0, split="test")\n'
        "question = scene.questions[0]\n"
        "print(question.text, reference.answer(model, processor, scene.image, question.text), question.answer)\n"
        "```\n\n"
        f"{check['agree']} of {check['questions']} questions asked through the processor and `generate` were marked as "
        "in the batched evaluation below."
    )


def _accuracy(card: dict[str, Any]) -> str:
    rows = [
        (kind, row["accuracy"], row["blind"], row["no_image"], row["majority"], row["target"], row["n"])
        for kind, row in card["per_type"].items()
    ]
    whole = [f"**{card[key]:.3f}**" for key in ("overall", "blind", "no_image", "majority", "target")]
    return (
        f"## Accuracy\n\n{card['questions']} questions about {card['scenes']} scenes of the split `test`, exact match, "
        "greedy. *No image* is the model without visual tokens, *majority* the best constant answer per type, *blind* "
        "the larger of the two, *target* (accuracy − blind) / (1 − blind).\n\n"
        + table(
            ("type", "accuracy", "blind", "no image", "majority", "target", "n"),
            [*rows, ("**all**", *whole, card["questions"])],
        )
    )


def _labels(card: dict[str, Any]) -> str:
    groups = card["reading_by_labels"]
    rows = [
        (kind, labels if labels != "6" else "6 or more", row["accuracy"], row["n"])
        for kind, by_count in groups.items()
        for labels, row in by_count.items()
    ]
    return "Reading and referring by the number of labels in the picture:\n\n" + table(
        ("type", "labels", "accuracy", "n"), rows
    )


def _depth(card: dict[str, Any]) -> str:
    depth = card["depth_of_use"]
    layers = list(depth["before_layer"].items())
    return (
        "## Depth of use\n\nAccuracy when all visual tokens leave the language model before layer l "
        f"({depth['questions']} questions; the last column removes nothing). Where it is already high at small l, "
        "methods that prune inside the language model look free.\n\n"
        + table(["l", *(layer for layer, _ in layers)], [["accuracy", *(value for _, value in layers)]])
        + f"\n\nLeaving before layer 2 costs {100 * depth['cost_before_layer_2']:.0f} % of what no picture costs."
    )


def _dropping(card: dict[str, Any]) -> str:
    drop = card["dropping"]
    return (
        f"## Dropping tokens at the connector\n\n{drop['questions']} questions, one per scene; all tokens: "
        f"{drop['full']:.3f}. *Evidence and random* keeps the tokens that the answer depends on and random "
        "others up to the budget: the ceiling of methods that select.\n\n"
        + table(
            ["kept", *percents(drop["random"])],
            [[name.replace("_", " "), *drop[name].values()] for name in ("random", "evidence_and_random")],
        )
    )


def _erasure(card: dict[str, Any]) -> str:
    found = card["erasure"]
    rows = [(kind, *row.values()) for kind, row in found.items() if kind != "questions"]
    return (
        f"## Is the evidence the evidence?\n\n{found['questions']} questions with evidence: accuracy on the picture as "
        "it is, with the evidence boxes painted over by the picture's median colour, and with boxes of the same size "
        "elsewhere painted over. What is erased is absent, so yes-no questions about it can still be guessed.\n\n"
        + table(("type", "intact", "evidence erased", "elsewhere erased"), rows)
    )


def _held_out(card: dict[str, Any]) -> str:
    held = card["heldout_glyphs"]
    return (
        f"## Held-out glyphs\n\n{len(held['glyphs'])} glyphs ({', '.join(held['glyphs'])}) were in pictures of all "
        "stages, named in the tower's pretraining and in alignment, and in no question or answer. "
        f"{held['questions']} questions that name one:\n\n"
        + table(
            ("type", "accuracy", "blind"),
            [
                *((kind, row["accuracy"], row["blind"]) for kind, row in held["per_type"].items()),
                ("**all**", f"**{held['overall']:.3f}**", f"**{held['blind']:.3f}**"),
            ],
        )
    )


def _training(card: dict[str, Any]) -> str:
    run = card["training"]
    if run is None:
        return ""
    rows = [(name, s["steps"], s["images"], f"{s['cpu_minutes']:.0f}") for name, s in run["stages"].items()]
    return (
        f"## Training\n\n`winnow train reference --preset {card['preset']} --seed {card['seed']}`, world version "
        f"{card['world_version']}, on {run['machine']}: {run['images']} pictures, each drawn "
        f"for its step and used once, {run['steps']} steps, "
        f"{run['cpu_minutes']:.0f} CPU minutes. Token dropout is {run['token_dropout']}. {run['note']}\n\n"
        + table(("stage", "steps", "pictures", "CPU minutes"), rows)
        + "\n\nRunning accuracies of the stages, on pictures seen for the first time (the log is `training.jsonl` "
        "beside the weights):\n\n![accuracy by stage](images/reference-model-curves.png)"
    )
