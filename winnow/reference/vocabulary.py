"""The words of the reference models, and their tokenizer."""

from __future__ import annotations

import re
from functools import cache

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
    ids: list[int] = []
    for word in split_words(text):
        if len(word) == 2 and word.isdigit():
            ids += [TOKEN_ID[word[0]], TOKEN_ID["##" + word[1]]]
        else:
            ids.append(TOKEN_ID.get(word, TOKEN_ID[UNKNOWN]))
    return tuple(ids)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer (a word piece of whole words and second digits), left-padded for generation."""
    tokenizer = Tokenizer(models.WordPiece(vocab=dict(TOKEN_ID), unk_token=UNKNOWN, continuing_subword_prefix="##"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?:,.!]"), "isolated")]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, TOKEN_ID[BOS])]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )
