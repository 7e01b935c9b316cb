"""Two methods in one plan, one before the LM and one inside it: the run of both by hand, and one ledger for both."""

from __future__ import annotations

import pytest
import torch
import zoo
from byhand import Reference

import winnow
from methods.byhand import fastv, visionzip
from winnow.core.budget import Budget

ROWS = ("3 A 6", "3 B 9", "2 B 4 C 5")


def by_hand(reference, sample, keep):
    """VisionZip's entry is what FastV cuts; its share is of the tokens that the encoder gave."""
    entry = visionzip.by_hand(reference, sample, reference.entry(sample), keep=keep, contextual=0.15625).entry
    return fastv.by_hand(reference, sample, entry, keep="50%", layer=2)


@pytest.mark.parametrize("build", ["llava_next", "llava_clip"])
@pytest.mark.parametrize("keep", ["75%", 9], ids=["both cut", "the first leaves less than half"])
def test_visionzip_and_fastv_make_one_plan_with_one_ledger(build, keep):
    """A batch of pictures of several sizes, with newlines and tiles, and a row of two pictures."""
    model, samples = zoo.model(build), zoo.samples(build, ROWS)
    reference = Reference(model)
    plan = f"visionzip:keep={keep} + fastv:layer=2,keep=0.5"
    with winnow.compress(model, plan) as handle, torch.no_grad():
        logits = model(**zoo.collate(samples)).logits[:, -1]
        ledger = handle.last
    text, first, second = [], [0] * len(ROWS), [0] * len(ROWS)
    for number, sample in enumerate(samples):
        hand = by_hand(reference, sample, keep)
        trace = reference.run(hand.entry, cuts=hand.cuts)
        torch.testing.assert_close(logits[number], trace.logits[0], rtol=1e-4, atol=1e-5)
        own = [item for item in ledger.items if item.row == number]
        assert [item.n_visual for item in own] == [len(content) for content in hand.entry.content]
        assert [sorted({*item.kept.tolist()}) for item in own] == [ids.tolist() for ids in trace.kept(hand.entry)]
        assert tuple(layer[number] for layer in ledger.layer_tokens) == trace.lengths
        text.append(len(sample["input_ids"][0]) - sum(map(len, hand.entry.items)))
        for content in map(len, hand.entry.content):
            entering = Budget(keep).of(content)
            first[number] += entering
            second[number] += min(entering, round(content / 2))
    counts = [[t + n for t, n in zip(text, own, strict=True)] for own in (first, second)]
    assert list(map(list, ledger.layer_tokens)) == [counts[0], counts[0], counts[1], counts[1]]
    assert (counts[1] < counts[0]) == (keep == "75%")
    assert sum(len(item.kept) for item in ledger.items) == sum(second)
    assert ledger.plan.count(" + ") == 1
