"""LoCoCo on a frozen text model: convolutions that mix the slots of a cache, for one layer each.

Rows of recall texts are read in chunks, and the cache is compressed after each. A convolution learns from the loss of
the chunk that follows its compression: what it mixed is not carried further, as keys and values are detached when the
next one mixes them again. The loss is that of answers, and with less weight that of filler.

Departs from the paper: the model alone is frozen and nothing of it is trained; one step follows the loss of all chunks
of a few rows, where the authors' makes one for each chunk.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from winnow.core.errors import UnsupportedError
from winnow.core.kv import KVView
from winnow.core.kv_budget import KVBudget
from winnow.core.step import KVReduce
from winnow.learn.fitting import Phase, Record
from winnow.learn.options import RunOptions
from winnow.learn.packing import IGNORED
from winnow.learn.recall import FILLER_WEIGHT, Texts, pack
from winnow.methods.lococo import LoCoCo
from winnow.models.fingerprint import fingerprint
from winnow.parts.convolved import Mixer
from winnow.parts.learned import SHIPPED_TEXT
from winnow.reference import text
from winnow.world.recall_words import PAD, WORD_ID

SLUG = "lococo"
SHIPPED = SHIPPED_TEXT / f"{SLUG}.safetensors"
CHUNK, SLOTS, KERNEL = 64, 32, 9
ROWS = 3200
FIRST = 1 << 60  # texts of the train split from this seed on: the shipped model has read none of them
APART = 1 << 32  # seeds of texts between two seeds of a run
TEXTS = Texts({"pairs": 4, "several": 4, "copy": 2, "needle": 1, "filler": 0.5}, (64, 96, 128), full=0.4, room=96)

Held = tuple[Tensor, Tensor]
Shorten = Callable[[KVView], KVReduce | None]


def train(
    out: str | Path | None = None,
    *,
    model: str | None = None,
    resume: bool = False,
    seed: int = 0,
    scale: float = 1.0,
    save: int = 50,
    quiet: bool = False,
) -> Path:
    """Train the convolutions, and return the file of their weights.

    Args:
        model: a folder of a Llama that knows the words of the recall texts; default: the shipped recall model.
        scale: share of the rows and steps.
    """
    options = RunOptions(SLUG, out, resume, seed, scale, model, save=save, quiet=quiet)
    options.begin()
    frozen = load(model)
    count, first = options.count(ROWS), FIRST + seed * APART

    def seeds(start: int, end: int) -> Iterable[int]:
        return range(first + start, first + end)

    facts = {"name": model or "recall model", "data": f"{count} recall texts of the train split from {first} on"}
    variant = {"model": fingerprint(frozen)}
    return options.made(Recipe(frozen, scale), seeds, count, variant=variant, facts=facts)


def load(model: str | None = None) -> LlamaForCausalLM:
    """The text model, in float32 and frozen."""
    path = text.path() if model is None else Path(model)
    found = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    if found.config.vocab_size < max(WORD_ID.values()):
        raise UnsupportedError(
            f"{path} does not know the words of the recall texts; give a model of `winnow train recall`."
        )
    return found.eval().requires_grad_(False)


class Recipe:
    def __init__(self, frozen: LlamaForCausalLM, scale: float) -> None:
        self.frozen, self.scale = frozen, scale
        self.method = LoCoCo(keep=KVBudget(SLOTS))
        self.sizes = {"mixtures": SLOTS // 2, "kernel": KERNEL}
        self.settings = {"keep": SLOTS, "chunk": CHUNK}

    def make(self) -> nn.Module:
        config: Any = self.frozen.config
        return nn.ModuleList(Mixer(2 * config.head_dim, **self.sizes) for _ in range(config.num_hidden_layers))

    def record(self, seed: int) -> Record:
        rows = row_of(seed)
        return {"ids": rows.ids[0].short(), "labels": rows.labels[0].short(), "kind": rows.kind[0].short()}

    def phases(self, records: Sequence[Record]) -> list[Phase]:
        def loss(module: nn.Module, batch: list[int]) -> Tensor:
            rows = together([records[i] for i in batch])
            lost = losses(self.frozen, rows, self.method, module)
            answers, filler = rows["kind"] >= 0, (rows["kind"] < 0) & (rows["labels"] != IGNORED)
            parts = [lost[own].sum() / own.sum().clamp_min(1) for own in (answers, filler)]
            return parts[0] + FILLER_WEIGHT * parts[1]

        return [Phase("mixers", round(360 * self.scale), 12, 4e-3, loss)]

    @torch.no_grad()
    def measure(self, module: nn.Module, records: Sequence[Record]) -> dict[str, float]:
        """Loss of an answer's token with this module, with heavy hitters alone, and with the whole cache."""
        others = {"": self.method, "_of_heavy_hitters": self.method.replace(alpha=0), "_of_the_whole_cache": None}
        return {
            f"loss{name}": answer_losses(self.frozen, records, own, module).mean().item()
            for name, own in others.items()
        }


def row_of(seed: int) -> Any:
    """One row of a recall text with its questions."""
    rng = random.Random(seed)
    return pack([TEXTS.sample(seed, rng.choice(TEXTS.lengths), rng)])


def together(records: Sequence[Record]) -> Record:
    """Rows as one batch, filled up on the right."""
    fills = {"ids": WORD_ID[PAD], "labels": IGNORED, "kind": -1}
    return {
        name: nn.utils.rnn.pad_sequence([own[name].long() for own in records], batch_first=True, padding_value=fill)
        for name, fill in fills.items()
    }


@torch.no_grad()
def answer_losses(
    model: LlamaForCausalLM, records: Sequence[Record], method: LoCoCo | None, module: nn.Module | None, batch: int = 32
) -> Tensor:
    """The mean loss of the answers' tokens of each row that has any."""
    found = []
    for start in range(0, len(records), batch):
        rows = together(records[start : start + batch])
        lost, answers = losses(model, rows, method, module), rows["kind"] >= 0
        found.append((lost * answers).sum(1)[answers.any(1)] / answers.sum(1)[answers.any(1)])
    return torch.cat(found)


def losses(model: LlamaForCausalLM, rows: Record, method: LoCoCo | None, module: nn.Module | None) -> Tensor:
    """`[B, T]` the loss of each label, 0 where there is none; None for a method leaves the cache whole."""
    shorten = None if method is None else lambda view: method.shorten(view, method.keep)
    found = []
    for logits, at in zip(
        read(model, rows["ids"], shorten, module), range(0, rows["ids"].shape[1], CHUNK), strict=True
    ):
        labels = rows["labels"][:, at : at + CHUNK]
        found.append(cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none"))
    return torch.cat(found, 1)


def read(
    model: LlamaForCausalLM, ids: Tensor, shorten: Shorten | None, module: nn.Module | None, chunk: int = CHUNK
) -> Iterator[Tensor]:
    """Logits `[B, chunk, V]` of one chunk after the other, with a cache that is compressed in between."""
    depth = model.config.num_hidden_layers
    held: list[Held | None] = [None] * depth
    for at in range(0, ids.shape[1], chunk):
        part = ids[:, at : at + chunk]
        logits, cache, queries = forward(model, part, at, held)
        yield logits
        if at + chunk >= ids.shape[1]:
            return
        held = []
        for layer, (own, asked) in enumerate(zip(cache, queries, strict=True)):
            keys, values = (x.detach() for x in own)
            known = {
                "layer": layer,
                "depth": depth,
                "fresh": part.shape[1],
                "seen": at + part.shape[1],
                "module": module,
            }
            action = None if shorten is None else shorten(KVView.of(keys, values, asked.detach(), **known))
            held.append((keys, values) if action is None else (action.k.apply(keys), action.v.apply(values)))


def forward(
    model: LlamaForCausalLM, ids: Tensor, at: int, held: Sequence[Held | None]
) -> tuple[Tensor, list[Held], list[Tensor]]:
    """A Llama on tokens that stand from `at` on: logits, the cache, and queries with their phase, of each layer.

    What is held is read by all of them, whatever its length, and gradients flow into it.
    """
    b, n = ids.shape
    x = model.model.embed_tokens(ids)
    turn = model.model.rotary_emb(x, torch.arange(at, at + n)[None])
    cache, asked = [], []
    for layer, old in zip(model.model.layers, held, strict=True):
        attention, y = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (
            project(y).view(b, n, -1, attention.head_dim).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *turn)
        if old is not None:
            k, v = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
        seen = torch.ones(n, k.shape[2], dtype=torch.bool).tril(k.shape[2] - n)
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=attention.scaling, enable_gqa=True)
        x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        cache.append((k, v))
        asked.append(q)
    return model.lm_head(model.model.norm(x)), cache, asked
