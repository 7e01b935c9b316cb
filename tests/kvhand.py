"""The reference for compressed caches: nothing is dropped, and what was evicted is masked, head by head.

Nothing here imports winnow: an attention function written out by hand hides slots of the full cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "kvhand"

TEXTS: dict[str, Any] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "phi3": Phi3Config,
    "gemma3": Gemma3TextConfig,
}
# Classes that differ in how they attend: caps on logits, sinks, other rotations, experts, linear layers between.
OTHERS = ("cohere", "gemma2", "glm4", "gpt_oss", "gpt_neox", "mixtral", "olmo2", "phi", "qwen3_next", "starcoder2")


def text_model(name: str, layers: int = 3, seed: int = 0, **overrides: Any) -> nn.Module:
    """A tiny language model of a real class, with peaky attention."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if name == "gemma3":
        settings |= {
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"][:layers],
        }
    if name == "mistral":
        settings |= {"sliding_window": None}
    model = transformers.AutoModelForCausalLM.from_config(TEXTS[name](**(settings | overrides))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5.0)
    return model


def other_model(name: str) -> nn.Module:
    """A tiny language model of a class from `OTHERS`."""
    known = transformers.AutoConfig.for_model(name).to_dict()
    wanted = {**_SMALL, "layer_types": ["linear_attention", *["full_attention"] * 2] if "next" in name else None}
    if name in ("gemma2", "gpt_oss"):
        wanted["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    settings = {key: value for key, value in wanted.items() if key in known and value is not None}
    settings |= {"sliding_window": None} if name in ("mixtral", "starcoder2") else {}
    settings |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **settings)).eval()


_SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
}


def prompt(lengths: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """A left-padded batch of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        ids[row, longest - n :] = torch.randint(2, 120, (n,), generator=generator)
        mask[row, longest - n :] = 1
    return {"input_ids": ids, "attention_mask": mask}


class Forced(transformers.LogitsProcessor):
    """Lets `generate` write given tokens `[B, steps]`, so that two runs read the same."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced.scatter_(1, self.tokens[:, self.step % self.tokens.shape[1], None], 0.0)
        self.step += 1
        return forced


def written(model: Any, inputs: dict[str, Tensor], tokens: Tensor, forced: Forced | None = None, **options: Any) -> Any:
    """`generate` that writes the tokens; its `logits` are those of each step, before they were forced."""
    steps = tokens.shape[1]
    return model.generate(
        **inputs,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        logits_processor=[forced or Forced(tokens)],
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def _attention(
    hidden: Callable[[int, int], Tensor | None], sparse: bool, module: Any, query: Tensor, key: Tensor, value: Tensor,
    mask: Any, scaling: float | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        logits = logits + mask[..., : key.shape[2]]
    layer = getattr(module, "layer_idx", None)
    evicted = None if layer is None else hidden(layer, key.shape[2])
    if evicted is not None and (sparse or query.shape[2] < key.shape[2]):
        evicted = nn.functional.pad(evicted[..., : key.shape[2]], (0, max(0, key.shape[2] - evicted.shape[2])))
        evicted = evicted.repeat_interleave(group, 1)
        logits = logits.masked_fill(evicted[:, :, None], -torch.inf)
    if s_aux is not None:
        logits = torch.cat([logits, s_aux[None, :, None, None].expand(*logits.shape[:3], 1)], -1)
    weights = logits.float().softmax(-1).to(query.dtype)[..., : key.shape[2]]
    if evicted is not None and sparse:
        weights = weights.masked_fill(evicted[:, :, -query.shape[2] :, None], 0)
    return (weights @ value).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def evicting(model: Any, hidden: Callable[[int, int], Tensor | None], sparse: bool = False) -> Iterator[Any]:
    """The model with a full cache, some slots of which are masked once they lie in the past.

    Args:
        hidden: (layer, slots now) → `[B, G, n]` True for evicted ones of the first n; None: none.
        sparse: they are masked in their own prefill as well, and attend to nothing there.
    """

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        return _attention(hidden, sparse, module, query, key, value, attention_mask, **kwargs)

    with _attending(model, attention):
        yield model


@contextlib.contextmanager
def _attending(model: Any, attention: Callable[..., Any]) -> Iterator[None]:
    ALL_ATTENTION_FUNCTIONS.register(_NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


Held = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@contextlib.contextmanager
def holding(model: Any, held: Held) -> Iterator[Any]:
    """The model with a full cache, in the place of which decoded tokens read something else.

    Args:
        held: (layer, keys, values `[B, G, n, d]` of all tokens, the newest too) → keys and values `[B, G, m, d]`, and
            what is added to the logits of each, `[B, G, m]`: −inf hides one.
    """

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        if query.shape[2] == key.shape[2]:
            return _attention(lambda layer, n: None, False, module, query, key, value, attention_mask, **kwargs)
        group = query.shape[1] // key.shape[1]
        keys, values, added = (x.repeat_interleave(group, 1) for x in held(module.layer_idx, key, value))
        logits = query @ keys.transpose(2, 3) * kwargs["scaling"] + added[:, :, None]
        return (logits.softmax(-1) @ values).transpose(1, 2).contiguous(), None

    with _attending(model, attention):
        yield model


def evicted_of(cache: Any) -> dict[int, Tensor]:
    """`[B, G, n]` True for what each compressed layer of a cache no longer holds, of the tokens read by then."""
    found = {}
    for index, layer in enumerate(cache.layers):
        store = getattr(layer, "store", None)
        if store is None or not layer.changed or getattr(store, "slots", None) is None:
            continue
        if hasattr(store, "lengths"):
            lanes = [store.lane(i)[2].long() for i in range(len(store.lengths))]
            gone = torch.ones(len(lanes), layer.seen, dtype=torch.bool)
            for lane, kept in enumerate(lanes):
                gone[lane, kept] = False
            found[index] = gone.unflatten(0, (-1, store.heads))
            continue
        slots = store.slots.long()
        later = store.length - slots.shape[2]
        gone = torch.ones(*slots.shape[:2], layer.seen, dtype=torch.bool)
        real = torch.ones(slots.shape[0], slots.shape[2], dtype=torch.bool)
        if store.real is not None:
            real = store.real[:, : slots.shape[2]]
        for row in range(slots.shape[0]):
            for head in range(slots.shape[1]):
                gone[row, head, slots[row, head][real[row]]] = False
        if later:
            gone[:, :, -later:] = False
        found[index] = gone
    return found


@torch.no_grad()
def stepped(model: Any, inputs: dict[str, Tensor], tokens: Tensor, change: Callable[[Any], None]) -> list[Tensor]:
    """Logits before each token of one sample that writes `tokens`, whose plain cache is changed after every forward.

    Positions go on from the prompt, whatever the cache holds.
    """
    out = model(**inputs, use_cache=True)
    cache, start = out.past_key_values, inputs["input_ids"].shape[1]
    change(cache)
    found = [out.logits[:, -1]]
    for step, token in enumerate(tokens[:-1].tolist()):
        at = torch.tensor([[start + step]])
        out = model(input_ids=torch.tensor([[token]]), past_key_values=cache, position_ids=at, use_cache=True)
        change(cache)
        found.append(out.logits[:, -1])
    return found


def coding(codec: Any, kept: dict[int, Tensor] | None = None) -> Callable[[Any], None]:
    """What changes a plain cache of one sample as a codec would, layer by layer: the slots are what a block gives back.

    Args:
        codec: gives the codec of a layer, and None for the lower layer of a pair and for layers that stay.
        kept: `[G, m]` by layer the slots that an eviction leaves before that, of the prompt.
    """
    done: dict[int, int] = {}

    def change(cache: Any) -> None:
        for index, layer in enumerate(cache.layers):
            own = codec(index)
            if own is None:
                continue
            first = index not in done
            layers = [cache.layers[index - 1], layer] if own.pair else [layer]
            if first and kept is not None:
                at = kept[index][None, :, :, None].expand(-1, -1, -1, layer.keys.shape[3])
                layer.keys, layer.values = layer.keys.gather(2, at), layer.values.gather(2, at)
            n = layer.keys.shape[2]
            done.setdefault(index, 0)
            count = n - n % max(1, own.multiple) if first else own.every
            encode = own.encode if first else own.later or own.encode
            while count and count <= n - done[index] and (first or own.every):
                part = slice(done[index], done[index] + count)
                given = [x[:, :, part].clone() for one in layers for x in (one.keys, one.values)]
                made = encode(*given)
                for one, block in zip(layers, made if own.pair else (made,), strict=True):
                    one.keys[:, :, part], one.values[:, :, part] = block.read()
                done[index], first, count, encode = done[index] + count, False, own.every, own.later or own.encode

    return change
