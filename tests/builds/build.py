"""Build: a tiny random-weight model of a real transformers class, and inputs for it.

A row of a batch is written as a string: `"3 A 6 B 2"` is three text tokens, picture A, six text tokens, picture B and
two text tokens. The letters differ in size where the class allows it, so rows are ragged; V is a video, U is a sound.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from quick import Mould
from torch import Tensor, nn

VOCABULARY, PAD, EOS, BOS = 256, 0, 1, 2
TEXT = (10, 200)  # ids of text; what is special to a class lies from 200 on
DEPTH = 4

Inputs = dict[str, Tensor]
Picture = tuple[list[int], Inputs]


def by_name(items: Sequence[Inputs]) -> Inputs:
    """Items one after the other, of several kinds: each kind has tensors of its own."""
    names = dict.fromkeys(name for item in items for name in item)
    return {name: torch.cat([item[name] for item in items if name in item]) for name in names}


@dataclass(frozen=True, eq=False)
class Build:
    """A tiny model of a real class.

    Attributes:
        name: of the build; one class can have several.
        model_type: of its configuration, as in transformers' table of image-text-to-text classes.
        make: the model from the settings of its language model (`text()`), of which a class may rename or drop some.
        picture: for a letter and a generator, the ids that stand for the item in a prompt (with what the class's
            processor puts around it) and the tensors of the item (pixels, sizes, grids), as the processor makes them.
        letters: the items that it knows; A, B and C are pictures of different sizes where the class allows it.
        joined: the tensors of all items of a batch together, in order.
        completed: adds the per-token inputs that the class's processor makes (token types) to the ids of one sample.
        per_token: the names of those inputs; a batch pads them with 0.
        padding: the side on which the class's batches are padded; None where it takes no padded batches.
        cannot: why the class takes no picture into a language model's sequence, where it does not.
    """

    name: str
    model_type: str
    make: Callable[[dict[str, Any]], nn.Module]
    picture: Callable[[str, torch.Generator], Picture]
    letters: str = "ABC"
    joined: Callable[[Sequence[Inputs]], Inputs] = by_name
    completed: Callable[[Inputs], Inputs] = lambda inputs: inputs
    per_token: tuple[str, ...] = ()
    padding: str | None = "left"
    cannot: str = ""

    def model(self, *, dtype: torch.dtype = torch.float32, seed: int = 0, **text: Any) -> nn.Module:
        """A new copy in evaluation mode; `text` overrides settings of the language model."""
        return _mould(self, dtype, seed, tuple(sorted(text.items()))).copy()

    def sample(self, row: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Inputs:
        """The inputs of one row alone, unpadded. Equal rows and seeds give equal inputs."""
        generator = torch.Generator().manual_seed(1000 * seed + sum(map(ord, row)))
        ids: list[int] = []
        pictures: list[Inputs] = []
        for word in row.split():
            if word.isdigit():
                ids += torch.randint(*TEXT, (int(word),), generator=generator).tolist()
            else:
                own, picture = self.picture(word, generator)
                ids += own
                pictures.append({k: v.to(dtype) if v.is_floating_point() else v for k, v in picture.items()})
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
        return self.completed(inputs) | self.joined(pictures)

    def samples(self, rows: Sequence[str], *, seed: int = 0, **options: Any) -> list[Inputs]:
        """One sample for each row; equal rows at different places differ."""
        return [self.sample(row, seed=seed + i, **options) for i, row in enumerate(rows)]

    def collate(self, parts: Sequence[Inputs], *, side: str | None = None, extra: int = 0) -> Inputs:
        """One batch from samples, padded to the longest row and `extra` more."""
        side = side or self.padding or "left"
        names = ("input_ids", "attention_mask", *self.per_token)
        width = max(part["input_ids"].shape[1] for part in parts) + extra
        batch = {}
        for name in names:
            gaps = [width - part[name].shape[1] for part in parts]
            pads = [(gap, 0) if side == "left" else (0, gap) for gap in gaps]
            rows = [nn.functional.pad(part[name], pad, value=0) for part, pad in zip(parts, pads, strict=True)]
            batch[name] = torch.cat(rows)
        pictures = [{k: v for k, v in part.items() if k not in names} for part in parts]
        return batch | self.joined([picture for picture in pictures if picture])

    def batch(self, rows: Sequence[str], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Inputs:
        """A padded batch of rows."""
        return self.collate(self.samples(rows, seed=seed, dtype=dtype))


def text(**overrides: Any) -> dict[str, Any]:
    """The settings that tiny language models share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    } | overrides


@functools.cache
def _mould(build: Build, dtype: torch.dtype, seed: int, overrides: tuple[tuple[str, Any], ...]) -> Mould:
    return Mould(_filled(build, dtype, seed, overrides))


def _filled(build: Build, dtype: torch.dtype, seed: int, overrides: tuple[tuple[str, Any], ...]) -> nn.Module:
    torch.manual_seed(seed)
    made = build.make(text(**dict(overrides)))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in made.named_parameters():
        fill(name, weight.data, generator)
    head: Any = made.get_output_embeddings()
    if head is not None and head.weight.shape[0] >= TEXT[1]:
        head.weight.data[TEXT[1] :] = 0  # below the largest logit, so that no placeholder is ever said
    if getattr(made, "generation_config", None) is not None:
        made.generation_config.eos_token_id = None
        made.generation_config.pad_token_id = PAD
    return made.to(dtype).eval()


def fill(name: str, weight: Tensor, generator: torch.Generator) -> None:
    """Weights that are larger than at the start of training: attention is peaky and no argmax hangs on rounding."""
    if weight.ndim == 1:
        if "norm" not in name.lower() and "scale" not in name:
            weight.normal_(0, 0.2, generator=generator)
    elif "embed_tokens" in name or "position_embedding" in name:
        weight.normal_(0, 0.5, generator=generator)
    else:
        # The experts of a layer lie in one tensor; each is a matrix of its own.
        inputs = weight.shape[-1] if weight.ndim == 3 and "experts" in name else weight[0].numel()
        weight.normal_(0, 1 / math.sqrt(inputs), generator=generator)
