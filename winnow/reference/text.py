"""The recall model: a small Llama that reads winnow's recall texts, for measuring what a KV cache still holds.

A measuring instrument like the reference models for pictures: it knows the words of `winnow.world.recall_words` and
answers the questions of `winnow.world.recall`, nothing else.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from winnow.core.errors import WinnowError
from winnow.reference import starts
from winnow.world.recall_words import BOS, PAD, VOCABULARY, WORD_ID

FOLDER = Path(__file__).parent / "recall"
ROPE_THETA = 1e6  # slow turns: a name in a question must match a token hundreds of positions before it
PLACES = 2048  # the most positions


def path() -> Path:
    """The folder of the shipped model, for `from_pretrained`."""
    if not (FOLDER / "config.json").exists():
        raise WinnowError("the recall model is not in this installation. Train it with `winnow train recall`.")
    return FOLDER


def load() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The shipped model in float32, ready to answer, and its tokenizer. Plain transformers classes."""
    folder = path()
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def config(width: int = 256, layers: int = 4, heads: int = 8, groups: int = 4, inner: int = 384) -> LlamaConfig:
    """The model's configuration: `heads` query heads share `groups` heads of keys and values."""
    return LlamaConfig(
        vocab_size=-(-len(VOCABULARY) // 16) * 16,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=PLACES,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=WORD_ID[BOS],
        eos_token_id=None,
        pad_token_id=WORD_ID[PAD],
    )


def make_model(sizes: LlamaConfig, seed: int = 0) -> LlamaForCausalLM:
    """A freshly initialised model that begins as `starts` says."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(sizes)
    starts.begin(model)
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words between spaces. It adds nothing: contexts begin with `<s>` where they are drawn."""
    tokenizer = Tokenizer(models.WordLevel(vocab=dict(WORD_ID), unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, pad_token=PAD, padding_side="left")
