"""Prepared: shortened inputs for a model that knows nothing of compression."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.ledger import Ledger, add_notes
from winnow.engine.features import joined_features

Bucket = int | Sequence[int] | None

# Inputs that have a value for each token, and what stands for it where a row is padded.
PER_TOKEN = {"token_type_ids": 0, "mm_token_type_ids": 0, "moe_mm_token_type_ids": 0, "labels": -100}
PADDED = PER_TOKEN | {"attention_mask": 0, "position_ids": 0}
AS_LONG = frozenset({"input_ids", *PADDED})  # as the prompt


@dataclass(frozen=True, eq=False)
class Prepared:
    """What `prepare` returns.

    Attributes:
        prompt: `[B, S]` the token ids as they were given.
        requests: for each row, the request that it belongs to (its own number, unless `prepare_many` grouped it).
        sizes: real tokens of each row that the model will read.
        ledger: what was kept. It has no bytes of a cache, because none is filled yet.
        pad: the id of padding.
    """

    prompt: Int[Tensor, "b s"]
    requests: tuple[int, ...]
    sizes: tuple[int, ...]
    ledger: Ledger
    pad: int
    _inputs: dict[str, Any]
    _first_positions: Tensor | None
    _fixed: dict[str, Any]

    @property
    def width(self) -> int:
        """Tokens of a row, padding included."""
        return self._inputs["input_ids"].shape[1]

    @property
    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of `model.generate(**prepared.inputs, …)`, made anew each time: it changes them.

        Where gapped positions need a cache, `use_cache=True` is among them, and `prefill_chunk_size=None` where the
        class or the version cannot read this prompt in chunks: giving another value beside them is a TypeError.
        """
        return self._fresh() | self._fixed

    @property
    def forward_inputs(self) -> dict[str, Any]:
        """The keyword arguments of `model(**prepared.forward_inputs)`: positions as `generate` would hand them on."""
        return self._fresh() | {"position_ids": self._first_positions}

    def _fresh(self) -> dict[str, Any]:
        made = dict(self._inputs)
        if "mm_encoder_outputs" in made:
            # generate expands what is in here in place, for beams
            made["mm_encoder_outputs"] = {k: type(v)(**v) for k, v in made["mm_encoder_outputs"].items()}
        return made

    def restore(self, sequences: Int[Tensor, "n t"]) -> Int[Tensor, "n u"]:
        """What `generate` returned, with the prompt as it was given before the new tokens.

        Args:
            sequences: its ids, one row or several (beams, returned sequences) for each row of the inputs.
        """
        repeats, rest = divmod(sequences.shape[0], self.prompt.shape[0])
        if rest or not repeats or sequences.shape[1] < self.width:
            raise WinnowError(
                f"restore takes what generate made of these inputs: a multiple of {self.prompt.shape[0]} rows of at "
                f"least {self.width} tokens; got {tuple(sequences.shape)}."
            )
        prompt = self.prompt.to(sequences.device).repeat_interleave(repeats, 0)
        return torch.cat([prompt, sequences[:, self.width :]], 1)

    def max_length(self, length: int) -> int:
        """The `max_length` for these inputs that stands for `length` tokens with the prompt as it was given."""
        return length + self.width - self.prompt.shape[1]


def bucketed(width: int, bucket: Bucket) -> int:
    """The width of the smallest bucket that holds `width` tokens.

    Args:
        bucket: a number, of whose multiples one is taken; or the widths that are allowed; None: as it is.
    """
    if bucket is None:
        return width
    if isinstance(bucket, int):
        if isinstance(bucket, bool) or bucket < 1:
            raise WinnowError(f"bucket={bucket!r}; give a number of tokens from 1, or a list of widths.")
        return -(-width // bucket) * bucket
    fitting = [own for own in bucket if own >= width]
    if not fitting:
        raise WinnowError(
            f"a prompt keeps {width} tokens, and the widest bucket of {sorted(bucket)} is too narrow; keep fewer, or "
            "add a wider one."
        )
    return min(fitting)


def widened(made: dict[str, Any], width: int, pad: int) -> dict[str, Any]:
    """Inputs with all rows padded on the left to a width."""
    fill = PADDED | {"input_ids": pad}
    return {k: _padded(x, width, fill[k]) if k in fill else x for k, x in made.items()}


def _padded(x: Tensor, width: int, value: int) -> Tensor:
    gap = width - x.shape[-1]
    return torch.nn.functional.pad(x, (gap, 0), value=value) if gap else x


def joined(parts: Sequence[Prepared], width: int) -> Prepared:
    """Requests as one batch, all rows padded on the left to a width."""
    pad = parts[0].pad
    wide = [widened(part._inputs, width, pad) for part in parts]
    names = {name for own in wide for name in own} - {"mm_encoder_outputs"}
    odd = sorted(name for name in names if any(not isinstance(own.get(name), Tensor) for own in wide))
    if odd:
        raise UnsupportedError(
            f"these requests cannot be one batch: not all of them have {', '.join(odd)}; prepare them one by one."
        )
    made = {name: torch.cat([own[name] for own in wide], -2 if name == "position_ids" else 0) for name in names}
    outputs = {
        modality: joined_features([own["mm_encoder_outputs"][modality] for own in wide if modality in _outputs(own)])
        for modality in dict.fromkeys(m for own in wide for m in _outputs(own))
    }
    longest = max(part.prompt.shape[1] for part in parts)
    full = all(size == width for part in parts for size in part.sizes)
    first = [_padded(p._first_positions, width, 0) for p in parts if p._first_positions is not None]
    fixed = {k: v for part in parts for k, v in part._fixed.items() if k != "use_cache" or full}
    return Prepared(
        prompt=torch.cat([_padded(part.prompt, longest, pad) for part in parts]),
        requests=tuple(number for part in parts for number in part.requests),
        sizes=tuple(size for part in parts for size in part.sizes),
        ledger=_joined_ledger([part.ledger for part in parts]),
        pad=pad,
        _inputs=made | ({"mm_encoder_outputs": outputs} if outputs else {}),
        _first_positions=torch.cat(first, -2) if len(first) == len(parts) else None,
        _fixed=fixed,
    )


def _outputs(made: dict[str, Any]) -> dict[str, Any]:
    return made.get("mm_encoder_outputs", {})


def _joined_ledger(ledgers: Sequence[Ledger]) -> Ledger:
    rows, items = 0, []
    for ledger in ledgers:
        items += [replace(item, row=item.row + rows) for item in ledger.items]
        rows += len(ledger.logical)
    notes: dict[str, Any] = {}
    for ledger in ledgers:
        add_notes(notes, {k: v for k, v in ledger.notes.items() if k != "read_in_full" or not items})
    return replace(
        ledgers[0],
        logical=tuple(n for ledger in ledgers for n in ledger.logical),
        items=tuple(items),
        layer_tokens=tuple(sum(own, ()) for own in zip(*(ledger.layer_tokens for ledger in ledgers), strict=True)),
        flops=sum(ledger.flops for ledger in ledgers),
        flops_full=sum(ledger.flops_full for ledger in ledgers),
        notes=notes,
    )
