"""The words of the reference models: the tokenizer, its fast twin, and what is not known."""

from __future__ import annotations

import pytest

from winnow import reference, world
from winnow.reference.build import make_processor
from winnow.reference.presets import preset
from winnow.reference.vocabulary import TOKEN_ID, UNKNOWN, VOCABULARY, token_ids


@pytest.fixture(scope="module")
def processor():
    return make_processor(preset("micro"))


def test_every_question_and_answer_is_known_and_reads_back(processor):
    for split in world.SPLITS:
        for seed in range(120):
            for question in world.scene(seed, split=split, per_type=2).questions:
                assert reference.in_world(question.text)
                for text in (question.text, question.answer):
                    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
                    assert tuple(ids) == token_ids(text)
                    assert TOKEN_ID[UNKNOWN] not in ids
                    assert processor.tokenizer.decode(ids) == text


def test_tokens_are_distinct_and_few():
    assert len(set(VOCABULARY)) == len(VOCABULARY) <= 512


def test_numbers_are_two_tokens_and_counts_one():
    assert len(token_ids("42")) == 2
    assert len(token_ids("4")) == 1
    assert token_ids("42")[0] == token_ids("4")[0] != token_ids("24")[1]


def test_unknown_words_are_named():
    assert reference.unknown_words("is there a zeppelin near the dog?") == ("zeppelin",)
    assert not reference.in_world("What is this?")
    assert reference.unknown_words("<image> USER: dog") == ("<image>", "USER", ":")


def test_the_prompt_has_one_token_per_patch(processor):
    drawn = world.scene(0)
    inputs = processor(images=drawn.image, text=reference.prompt("is there a dog?"), return_tensors="pt")
    assert (inputs["input_ids"] == TOKEN_ID["<image>"]).sum() == preset("micro").visual_tokens
    assert inputs["pixel_values"].shape == (1, 3, 224, 224)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is there a dog?"}]}]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == reference.prompt("is there a dog?")
