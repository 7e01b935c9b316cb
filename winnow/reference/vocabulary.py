"""The words of the reference models, and their tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from winnow.world.names import COLORS, GLYPHS, PLACES, SHAPES, WORDS

PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
USER, ASSISTANT = "USER:", "ASSISTANT:"
SPECIAL = (PAD, BOS, EOS, UNKNOWN, IMAGE, USER, ASSISTANT)
_FUNCTION_WORDS = """
? a above after are bar below bigger color how is left many more near no number of right shape shortest tallest than the
there what where which word yes
"""
FUNCTION_WORDS = tuple(_FUNCTION_WORDS.split())
DIGITS = tuple("0123456789")
# A two-digit number is two tokens, its second digit marked as a continuation; a count is one.
SECOND_DIGITS = tuple(f"##{digit}" for digit in DIGITS)
VOCABULARY = (*SPECIAL, *FUNCTION_WORDS, *DIGITS, *SECOND_DIGITS, *GLYPHS, *SHAPES, *COLORS, *PLACES, *WORDS)
TOKEN_ID = {token: index for index, token in enumerate(VOCABULARY)}

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% else %}ASSISTANT: {% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def split_words(text: str) -> list[str]:
    """Words and punctuation as the tokenizer cuts them: `"is there a dog?"` → `["is", "there", "a", "dog", "?"]`."""
    return re.findall(r"[?:,.!]|[^\s?:,.!]+", text)


@cache
def token_ids(text: str) -> tuple[int, ...]:
    """Token ids of a question or an answer, without special tokens; the same as the tokenizer gives."""
    return ids_from(TOKEN_ID, text)


def ids_from(table: Mapping[str, int], text: str) -> tuple[int, ...]:
    """Token ids from the ids of a vocabulary."""
    ids: list[int] = []
    for word in split_words(text):
        if len(word) == 2 and word.isdigit():
            ids += [table[word[0]], table["##" + word[1]]]
        else:
            ids.append(table.get(word, table[UNKNOWN]))
    return tuple(ids)


def make_tokenizer(
    table: Mapping[str, int] = TOKEN_ID,
    special: Sequence[str] = SPECIAL,
    template: str = CHAT_TEMPLATE,
    placeholders: Mapping[str, str] = MappingProxyType({"image_token": IMAGE}),
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer (a word piece of whole words and second digits), left-padded for generation."""
    tokenizer = Tokenizer(models.WordPiece(vocab=dict(table), unk_token=UNKNOWN, continuing_subword_prefix="##"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?:,.!]"), "isolated")]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, table[BOS])]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        pad_token=PAD,
        extra_special_tokens=dict(placeholders),
        padding_side="left",
        chat_template=template,
    )
