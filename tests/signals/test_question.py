"""Signals of the question: which of its tokens count, and what is compared with them, on models."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
import zoo
from torch.nn.functional import normalize

import winnow
from winnow.contract import (
    Method,
    Observe,
    Point,
    QuestionCosine,
    QuestionTokens,
    Reduction,
    Step,
    UnsupportedError,
    WinnowError,
)
from winnow.core.plan import Plan
from winnow.engine.question import INSTRUCTIONS, QuestionReader, special_ids

WORDS = ["what", " color", " is", " the", " ci", "rcle", "?", "\n", *INSTRUCTIONS[0].replace(" ", "| ").split("|")]


class Tokenizer:
    """Pieces of text by number; 99 is a special token."""

    all_special_ids = (99,)

    def decode(self, ids, **options):
        assert options == {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return "".join(WORDS[i] for i in ids)


READER = QuestionReader({50}, Tokenizer())
LINE = list(range(len(WORDS)))


def said(places, ids):
    return "".join(WORDS[ids[i]] for i in places)


def test_special_tokens_never_count():
    assert READER.kept([99, 0, 50, 1], "all") == [1, 3]
    assert READER.kept([99, 50], "all") == [0, 1]  # nothing else is there


def test_the_question_is_what_stands_there_without_instructions_how_to_answer():
    assert said(READER.kept(LINE, "all"), LINE) == "".join(WORDS)
    assert said(READER.kept(LINE, "question"), LINE) == "what color is the circle?"


def test_content_is_what_can_be_seen():
    ids = [99, *LINE]
    kept = READER.kept(ids, "content")
    assert said([i - 1 for i in kept], LINE) == " color circle"
    assert READER.kept([0, 2], "content") == [0, 1]  # "what is": nothing would be left


def test_without_a_tokenizer_or_ids_all_tokens_count():
    assert QuestionReader({50}).kept([50, 1, 2], "content") == [1, 2]
    assert READER.kept([-1, -1, 50], "content") == [0, 1, 2]


def test_special_ids_are_those_that_the_configuration_names():
    config = {"eos_token_id": [1, 2], "text_config": {"bos_token_id": 7, "pad_token_id": None}, "image_token_index": 9}
    assert special_ids(config) == {1, 2, 7, 9}


SIGNALS = (QuestionTokens(), QuestionCosine(), QuestionCosine(pool="mean"))


@dataclass(frozen=True)
class Ear(Method):
    """Keeps what it sees, and changes nothing but what it cuts before."""

    point: str = "projected"
    layer: int | None = None
    cut: int = 0
    heard: list = field(default_factory=list, compare=False, metadata={"setting": False})

    slug: ClassVar[str] = "ear"

    def steps(self, info):
        first = Step(
            Point("projected"), lambda view, state: Reduction.select(torch.arange(self.cut).expand(view.b, -1), view.n)
        )
        return (*((first,) if self.cut else ()), Step(Point(self.point, self.layer), self._hear, SIGNALS))

    def _hear(self, view, state):
        self.heard.append(view)
        return Observe()


@pytest.fixture(autouse=True)
def _no_template():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", winnow.WinnowWarning)
        yield


def spoken(model, sample):
    """By hand: embeddings of what stands behind the picture, and rows of the picture."""
    ids = sample["input_ids"][0]
    last = int((ids == zoo.IMAGE).nonzero()[-1])
    named = special_ids(model.config)
    behind = [i for i in range(last + 1, len(ids)) if int(ids[i]) not in named]
    return model.get_input_embeddings()(ids[behind])


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_batch_gives_each_picture_its_own_question_bit_for_bit(build):
    model, samples = zoo.model(build), zoo.samples(build, ("3 A 6", "3 A 9", "11", "3 A 6"))
    with torch.no_grad():
        together, alone = Ear(), []
        with winnow.compress(model, Plan((together,))):
            model(**zoo.collate(samples))
        for sample in (s for s in samples if "pixel_values" in s):
            own = Ear()
            with winnow.compress(model, Plan((own,))):
                model(**sample)
            alone.append((own.heard[0], spoken(model, sample)))
    assert sorted(view.b for view in together.heard) == [1, 2]  # two questions of one length, and a longer one
    lanes = [(view, i) for view in together.heard for i in range(view.b)]
    assert len(lanes) == 3
    for view, words in alone:
        tokens, cosine, mean = (view[s][0] for s in SIGNALS)
        assert torch.equal(tokens, words)
        want = normalize(view.tokens[0], dim=-1) @ normalize(words, dim=-1).T
        torch.testing.assert_close(cosine, want)
        torch.testing.assert_close(mean, normalize(view.tokens[0], dim=-1) @ normalize(words.mean(0), dim=-1)[:, None])
        same = [own for own, i in lanes if torch.equal(own[QuestionTokens()][i], tokens)]
        assert len(same) == 1
    found = {
        (tuple(own[QuestionTokens()][i].flatten().tolist()), tuple(own[QuestionCosine()][i].flatten().tolist()))
        for own, i in lanes
    }
    wanted = {
        (tuple(v[QuestionTokens()][0].flatten().tolist()), tuple(v[QuestionCosine()][0].flatten().tolist()))
        for v, _ in alone
    }
    if build in ("llava_clip", "llava_siglip"):
        assert found == wanted  # where the towers' own batches give the bits of single pictures


@pytest.mark.parametrize("point", [("layers", 2), ("projected", None)])
def test_values_follow_their_tokens_through_an_earlier_step(point):
    model, (sample,) = zoo.model("llava_clip"), zoo.samples("llava_clip", zoo.SINGLE)
    with torch.no_grad():
        whole, late = Ear(), Ear(*point, 7)
        for ear in (whole, late):
            with winnow.compress(model, Plan((ear,))):
                model(**sample)
    assert late.heard[0].n == 7
    assert torch.equal(late.heard[0][QuestionCosine()], whole.heard[0][QuestionCosine()][:, :7])
    assert torch.equal(late.heard[0][QuestionTokens()], whole.heard[0][QuestionTokens()])


def test_the_question_can_be_told_by_spans_and_by_embeddings_alone():
    model, (sample,) = zoo.model("llava_clip"), zoo.samples("llava_clip", zoo.SINGLE)
    length = sample["input_ids"].shape[1]
    ear = Ear()
    with winnow.compress(model, Plan(())) as handle, torch.no_grad():
        with handle.using(Plan((ear,)), spans=[(length - 3, length - 1)]):
            model(**sample)
        want = model.get_input_embeddings()(sample["input_ids"][0, -3:-1])
        assert torch.equal(ear.heard[0][QuestionTokens()][0], want)
        embeds = model.get_input_embeddings()(sample["input_ids"])
        with handle.using(Plan((ear,)), spans=[(length - 3, length - 1)]):
            model(**{**sample, "input_ids": None, "inputs_embeds": embeds})
        assert torch.equal(ear.heard[1][QuestionTokens()][0], want)


def test_beams_have_the_question_of_their_row():
    model, samples = zoo.model("llava_clip"), zoo.samples("llava_clip", ("3 A 6", "3 A 9"))
    ear = Ear()
    with winnow.compress(model, Plan((ear,))), torch.no_grad():
        model.generate(**zoo.collate(samples), max_new_tokens=2, num_beams=2, do_sample=False)
    for view in ear.heard:
        rows = {tuple(own.flatten().tolist()) for own in view[QuestionTokens()]}
        wanted = {tuple(spoken(model, sample).flatten().tolist()) for sample in samples}
        assert rows <= wanted


def test_no_step_before_the_language_model_sees_the_question():
    model = zoo.model("llava_clip")
    with pytest.raises(WinnowError, match="before the question is known; act at projected"):
        winnow.compress(model, Plan((Ear("features"),)))


def test_prepared_inputs_keep_what_compress_keeps():
    plan = "cdpruner:keep=9"
    for build in ("llava_clip", "llava_next"):
        model, samples = zoo.model(build), zoo.samples(build, ("3 A 6", "3 B 9"))
        inputs = zoo.collate(samples)
        prepared = winnow.prepare(model, inputs, plan)
        with winnow.compress(model, plan) as handle, torch.no_grad():
            model(**inputs)
            kept = [item.kept.tolist() for item in handle.last.items]
        assert [item.kept.tolist() for item in prepared.ledger.items] == kept


def test_clip_is_refused_where_it_was_not_handed_over():
    model = zoo.model("llava_clip")
    for plan in ("cdpruner:text=clip", "recoverable-compression:text=clip"):
        with pytest.raises(UnsupportedError, match="text_encoder="):
            winnow.compress(model, plan)


def test_the_words_of_a_question_as_the_shipped_model_reads_them():
    from winnow import reference, world
    from winnow.models.inputs import model_inputs

    model, processor = reference.load("small")
    inputs = model_inputs(model, processor, world.scene(54, split="test").image, "what word is near the scissors?")
    with winnow.compress(model, "full", processor=processor) as handle:
        reader = QuestionReader.of(handle.bound, processor)
    ids = inputs["input_ids"][0].tolist()
    start = max(i for i, token in enumerate(ids) if token == model.config.image_token_id) + 1
    line = ids[start:]
    assert reader.text([line[i] for i in reader.kept(line, "content")]).split()[:3] == ["word", "near", "scissors"]
    assert reader.text([line[i] for i in reader.kept(line, "question")]).startswith("what word is near the scissors?")
