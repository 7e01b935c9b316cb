"""The recall model: its rows, a run that is cut off and goes on, and what the shipped one can do."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from winnow.core.errors import WinnowError
from winnow.learn import attention, recall
from winnow.learn.packing import IGNORED
from winnow.learn.progress import read
from winnow.learn.recall import Texts
from winnow.learn.recipes import recall as recipe
from winnow.reference import text
from winnow.world.recall import TASKS, draw
from winnow.world.recall_words import FILLER_IDS, VOCABULARY, WORD_ID, words

TINY = text.config(width=32, layers=2, heads=4, groups=2, inner=32)
MIX = Texts({"pairs": 2, "several": 1, "copy": 1, "needle": 1, "echo": 1, "filler": 1}, (24, 40), full=0.8, room=32)
PLAN = [
    recipe.Stage("first", 5, MIX, gate={"pairs": 1.1}, tokens=300),
    recipe.Stage("last", 6, MIX, tokens=300, decay=True),
]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def test_a_row_teaches_answers_and_filler():
    sample = draw("several", 2, 96, facts=3, asks=2)
    rows = recall.pack([sample, draw("pairs", 1, 64, facts=4, asks=3)])
    ids, labels = rows.ids[0], rows.labels[0]
    for at in range(len(ids) - 1):
        assert labels[at] in (IGNORED, ids[at + 1])
    for place, asked in enumerate(sample.asked):
        own = rows.number[0] == place
        assert tuple(labels[own].tolist()) == asked.answer
        assert tuple(ids[1:][own[:-1]].tolist()) == asked.answer
    taught = labels[(labels != IGNORED) & (rows.kind[0] < 0)]
    assert set(taught.tolist()) <= set(FILLER_IDS)
    assert len(taught) == 96 - 1 - 3 * 8
    assert rows.kind.unique().tolist() == [-1, TASKS.index("pairs"), TASKS.index("several")]


def test_right_by_task_counts_whole_answers():
    rows = recall.make_rows(MIX, 7, 2000)
    assert (
        recall.right_by_task(rows.labels, rows)[:, 0].tolist() == recall.right_by_task(rows.labels, rows)[:, 1].tolist()
    )
    wrong = rows.labels.clone()
    at = (rows.kind == TASKS.index("several")).nonzero()[0]
    wrong[at[0], at[1]] = WORD_ID["?"]
    lost = recall.right_by_task(rows.labels, rows) - recall.right_by_task(wrong, rows)
    assert lost[TASKS.index("several")].tolist() == [1, 0]
    assert lost.sum() == 1


def test_an_echo_says_everything_again():
    sample = recall.echo(random.Random(0), 30)
    said = [word for asked in sample.asked for word in (*asked.question[2:], *asked.answer)]
    assert tuple(said) == sample.context[1:]


def test_attention_as_products_shares_heads():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 9, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    mask = recall.causal_mask(9, torch.device("cpu")).float()
    ours, _ = attention.products(torch.nn.Identity(), query, key, value, mask)
    theirs = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)


def test_a_step_has_the_loss_of_the_plain_model():
    model = text.make_model(TINY, 1)
    rows = recall.make_rows(MIX, 3, 400)
    with torch.no_grad():
        logits = model(input_ids=rows.ids).logits
    answers, learned = rows.kind >= 0, rows.labels != IGNORED
    by_task = [
        F.cross_entropy(logits[rows.kind == k], rows.labels[rows.kind == k]) for k in rows.kind[answers].unique()
    ]
    answer, filler = (
        sum(by_task) / len(by_task),
        F.cross_entropy(*(x[learned & ~answers] for x in (logits, rows.labels))),
    )
    assert len(by_task) > 1
    loss, parts, _ = recall.step(model, rows)
    assert parts["answer"] == pytest.approx(answer.item(), rel=2e-2)
    assert loss.item() == pytest.approx((answer + recall.FILLER_WEIGHT * filler).item(), rel=2e-2)


@pytest.mark.parametrize("stop", [3, 5, 8])
def test_a_run_that_was_cut_off_ends_with_the_same_weights(tmp_path, stop):
    quick = {"sizes": TINY, "plan": PLAN, "every": 1, "save": 2, "quiet": True, "seed": 4}
    whole = recipe.train(tmp_path / "whole", **quick)
    recipe.train(tmp_path / "cut", stop_after=stop, **quick)
    cut = recipe.train(tmp_path / "cut", resume=True, **quick)
    one, other = (LlamaForCausalLM.from_pretrained(folder).state_dict() for folder in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)
    steps = [[(row["stage"], row["step"]) for row in read(folder.parent / "log.jsonl")] for folder in (whole, cut)]
    assert steps[0] == steps[1] == [("first", n) for n in range(1, 6)] + [("last", n) for n in range(1, 7)]


def test_a_run_is_not_written_over_and_does_not_change_its_options(tmp_path):
    quick = {"sizes": TINY, "plan": PLAN[:1], "quiet": True}
    recipe.train(tmp_path, stop_after=1, **quick)
    with pytest.raises(WinnowError, match="already holds a run"):
        recipe.train(tmp_path, **quick)
    with pytest.raises(WinnowError, match="cannot go on"):
        recipe.train(tmp_path, resume=True, seed=1, **quick)
    with pytest.raises(WinnowError, match="other sizes"):
        recipe.train(tmp_path, resume=True, **{**quick, "sizes": text.config(width=64, heads=4, groups=2)})
    with pytest.raises(WinnowError, match="scale"):
        recipe.train(tmp_path / "new", scale=0)


def test_the_tokenizer_says_what_the_ids_say(tmp_path):
    text.make_tokenizer().save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    sample = draw("several", 0, 128)
    assert tuple(tokenizer(words(sample.context)).input_ids) == sample.context
    assert tokenizer.decode(list(sample.asked[0].question)) == words(sample.asked[0].question)
    assert len(tokenizer) == len(VOCABULARY)
