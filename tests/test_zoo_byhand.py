"""The reference itself: by hand, with everything kept, is what the plain model computes."""

from __future__ import annotations

import pytest
import torch
import zoo
from byhand import Reference
from clips import CLIPS, LENGTHS

STEPS = 6


@pytest.mark.parametrize("rows", [zoo.RAGGED, zoo.SINGLE, zoo.MIXED], ids=["ragged", "single", "mixed"])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_by_hand_equals_the_plain_model(build, rows):
    """Per-step logits of a left-padded batch against each sample alone; the rows really differ in length."""
    check_plain(zoo.model(build), zoo.samples(build, rows), zoo.collate)


@pytest.mark.parametrize("letter", LENGTHS)
def test_by_hand_equals_the_plain_model_for_clips(letter):
    rows = (f"3 {letter} 6", "9", f"2 {letter} 4 {letter} 3")
    check_plain(zoo.model("qwen2_5_vl"), zoo.samples("qwen2_5_vl", rows), zoo.collate)
    for build in CLIPS.values():
        check_plain(build.model(), build.samples(rows), build.collate)


def check_plain(model, parts, collate):
    inputs = collate(parts)
    options = {"do_sample": False, "max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        output = model.generate(**inputs, **options)
    logits, tokens = torch.stack(output.logits, 1), output.sequences[:, inputs["input_ids"].shape[1] :]
    reference = Reference(model)
    for row, part in enumerate(parts):
        trace = reference.run(reference.entry(part), tokens[row, :-1].tolist())
        assert torch.allclose(trace.logits, logits[row], atol=1e-5, rtol=0)
        assert trace.lengths == (part["input_ids"].shape[1],) * zoo.DEPTH


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_the_reference_notices_a_missing_token(build):
    """A reference that could not tell a dropped token would prove nothing."""
    reference = Reference(zoo.model(build))
    entry = reference.entry(zoo.sample(build, "3 A 6"))
    whole = reference.run(entry)
    for gone in (0, len(entry.content[0]) - 1):
        slot = int(entry.content[0][gone])
        stay = torch.arange(len(entry.held)) != slot
        less = type(entry)(
            entry.embeds[:, stay], entry.held[stay], entry.positions, entry.items, entry.content, entry.cells
        )
        assert (reference.run(less).logits - whole.logits).abs().max() > 1e-3


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_entries_have_the_pictures_of_the_row(build):
    reference = Reference(zoo.model(build))
    entry = reference.entry(zoo.sample(build, "2 B 4 C 5"))
    assert [len(item) for item in entry.items] == [zoo.tokens_of(build, "B"), zoo.tokens_of(build, "C")]
    separators = [len(item) - len(content) for item, content in zip(entry.items, entry.content, strict=True)]
    assert separators == ([3, 10] if build == "llava_next" else [0, 0])
    for cells in entry.cells:
        assert len(set(cells.tolist())) == len(cells)


def test_by_hand_attention_of_a_clip_has_a_value_for_each_token():
    """Frames are pooled, so what a token receives is the mean over its patches."""
    for build in CLIPS.values():
        reference, sample = Reference(build.model()), build.sample("3 W 2 W 6")
        vision, entry = reference.vision(sample), reference.entry(sample)
        for block in (*vision.cls, *vision.received):
            assert [part.shape[1] for part in block] == [len(content) for content in entry.content]
        for block in vision.cls:
            frames = block[0].unflatten(1, (LENGTHS["W"][0], -1)).mean(-1) * reference.cells
            assert ((frames > 0) & (frames < 1)).all()


@pytest.mark.parametrize("build", zoo.WITH_CLS)
def test_by_hand_attention_rows_sum_to_one(build):
    """[CLS] attention to the patches and to itself is a distribution: what is left for [CLS] is between 0 and 1."""
    reference = Reference(zoo.model(build))
    vision = reference.vision(zoo.sample(build, "3 A 6"))
    for block in vision.cls:
        tiles = block[0].unflatten(1, (-1, reference.cells)).sum(-1)
        assert ((tiles > 0) & (tiles < 1)).all()


def test_singles_and_batches_hold_the_same_pictures():
    for build in zoo.BUILDS:
        parts = zoo.samples(build, zoo.MIXED)
        batch = zoo.collate(parts)
        counts = [int((part["input_ids"] == zoo.IMAGE).sum()) for part in parts]
        assert counts[1] == 0
        assert (batch["input_ids"] == zoo.IMAGE).sum(1).tolist() == counts
        assert len(batch["pixel_values"]) == sum(len(part.get("pixel_values", ())) for part in parts)
