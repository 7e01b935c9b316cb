"""Still tokens of a stream inside a vision tower: what a block made of them for an earlier frame is used again.

A block of a reference frame leaves its keys, its values, and what its attention and its MLP added. For a later frame
all keys are computed; the tokens whose keys changed are computed in full, with the new keys and the values of the
moment, and the others add what they added in the reference frame (STC-Cacher, arXiv 2512.00891).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from winnow.core.errors import WinnowError
from winnow.core.select import comparable, ranked


class Left(NamedTuple):
    """What a block leaves of a reference frame, all `[N, D]`: projected keys and values, and what its halves added."""

    keys: Float[Tensor, "n d"]
    values: Float[Tensor, "n d"]
    attention: Float[Tensor, "n d"]
    mlp: Float[Tensor, "n d"]


class Parts(NamedTuple):
    """The parts of a pre-norm block of a vision transformer, as functions of rows `[…, D]`."""

    norm1: Callable[[Tensor], Tensor]
    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]
    out: Callable[[Tensor], Tensor]
    norm2: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    heads: int

    @staticmethod
    def of(block: Any) -> "Parts":
        """Of a block of transformers' CLIP or SigLIP.

        Raises:
            WinnowError: it has other parts.
        """
        own = getattr(block, "self_attn", None)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        found = [getattr(own, name, None) for name in names]
        norms = [getattr(block, name, None) for name in ("layer_norm1", "layer_norm2", "mlp")]
        heads = getattr(own, "num_heads", None)
        if None in found or None in norms or heads is None:
            raise WinnowError(
                f"{type(block).__name__} does not have the parts of a block of CLIP or SigLIP: layer_norm1, self_attn "
                f"with {', '.join(names)} and num_heads, layer_norm2 and mlp."
            )
        query, key, value, out = found
        norm1, norm2, mlp = norms
        return Parts(norm1, query, key, value, out, norm2, mlp, heads)  # type: ignore[arg-type]


def likeness(keys: Float[Tensor, "f n d"], reference: Float[Tensor, "n d"]) -> Float[Tensor, "f n"]:
    """The cosine of each key to the one at its place in the reference frame, all heads joined."""
    wide = torch.promote_types(keys.dtype, torch.float32)
    return cosine_similarity(keys.to(wide), reference.to(wide), dim=-1)


def changed(like: Float[Tensor, "f n"], ratio: float) -> Int[Tensor, "f u"]:
    """Of each frame the share of the tokens that changed most, at least one, ascending; the first among equals.

    A share is cut off: 0.25 of 197 tokens are 49. Broken keys have changed.
    """
    if not 0 <= ratio <= 1:
        raise WinnowError(f"ratio={ratio}; give a share of the tokens from 0 to 1.")
    n = like.shape[1]
    broken = like.isnan()
    return ranked(comparable((-like).masked_fill(broken, torch.inf)))[:, : max(1, int(n * ratio))].sort(1).values


def changed_below(like: Float[Tensor, "f n"], threshold: float) -> Bool[Tensor, "f n"]:
    """The tokens whose keys are less alike than a threshold; broken keys are among them."""
    return ~(like >= threshold)


def scene_cut(like: Float[Tensor, "f n"], threshold: float) -> Bool[Tensor, " f"]:
    """The frames that have so little of the reference in them that they must be computed in full, as a new one."""
    return ~(like.mean(1) >= threshold)


def whole_block(parts: Parts, hidden: Float[Tensor, "f n d"]) -> tuple[Float[Tensor, "f n d"], Left]:
    """All of a block for each frame, and what the last frame leaves."""
    x = parts.norm1(hidden)
    keys, values = parts.key(x), parts.value(x)
    attention = parts.out(_attend(parts, parts.query(x), keys, values))
    hidden = hidden + attention
    mlp = parts.mlp(parts.norm2(hidden))
    return hidden + mlp, Left(keys[-1], values[-1], attention[-1], mlp[-1])


def partial_block(
    parts: Parts, hidden: Float[Tensor, "f n d"], left: Left, ratio: float = 0.25
) -> tuple[Float[Tensor, "f n d"], Int[Tensor, "f u"]]:
    """A block for frames after a reference frame, and the tokens of each that were computed.

    Cost: keys for all tokens, and a share of `ratio` of all else.
    """
    if hidden.shape[1:] != left.keys.shape:
        raise WinnowError(
            f"frames of {tuple(hidden.shape[1:])} do not fit a reference frame of {tuple(left.keys.shape)}; compute "
            "the first frame of another size in full."
        )
    x = parts.norm1(hidden)
    keys = parts.key(x)
    rows = changed(likeness(keys, left.keys), ratio)
    at = rows[..., None].expand(-1, -1, hidden.shape[2])
    own = x.gather(1, at)
    values = _filled(left.values, at, parts.value(own))
    attended = parts.out(_attend(parts, parts.query(own), keys, values))
    hidden = hidden + _filled(left.attention, at, attended)
    return hidden + _filled(left.mlp, at, parts.mlp(parts.norm2(hidden.gather(1, at)))), rows


def _filled(reference: Float[Tensor, "n d"], at: Int[Tensor, "f u d"], rows: Float[Tensor, "f u d"]) -> Tensor:
    """`[f, N, D]` the reference with some rows of each frame in their places."""
    return reference.expand(at.shape[0], -1, -1).scatter(1, at, rows)


def _attend(parts: Parts, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    q, k, v = (x.unflatten(-1, (parts.heads, -1)).transpose(1, 2) for x in (query, keys, values))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
