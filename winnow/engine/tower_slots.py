"""Where the tokens of tiles lie in what a vision tower computes on: a row for each tile, or one packed sequence.

A tile is what the tower encodes by itself: a crop, a thumbnail, a frame. For both kinds of towers the same four things
are known: the rows of each tile, the hidden state that is made of other rows, what a block must be told of it, and what
is added to the logits of its keys.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from winnow.core.reduction import Reduction
from winnow.core.signal import Signal
from winnow.engine.item_tokens import ItemTokens

Show = Callable[[Callable[[Tensor], Tensor]], Any]
"""What a signal is shown of a module, given how to cut tensors `[calls, …, N, D]` to the tokens in question."""


@dataclass(eq=False)
class TileTokens(ItemTokens):
    """The tokens of one tile on their way through the tower. Its layout is that of a tile alone, whichever it is.

    Attributes:
        place: of the tile among those of the encoder call.
        home: `[n]` where each token stood in the tower's sequence before anything was reduced.
        biases: number of a method → `[n]` what it adds to the attention logits of each token as a key.
        anchored: whether no two tokens stand for one place.
        separators: whether no step has asked for the item's separators to go.
        reduced: whether any step changed something.
    """

    place: int = 0
    home: Int[Tensor, " n"] = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    biases: dict[int, Tensor] = field(default_factory=dict)
    anchored: bool = True
    separators: bool = True
    reduced: bool = False

    def follow(self, reduction: Reduction) -> None:
        """Homes and biases go with the representatives."""
        super().follow(reduction)
        at = reduction.representatives
        self.home = self.home[at]
        self.biases = {number: bias[at] for number, bias in self.biases.items()}
        self.anchored = self.anchored and (reduction.is_selection or reduction.representative is not None)
        self.reduced = True

    def bias(self) -> Tensor | None:
        """`[n]` the sum over methods; None where there is none."""
        return sum(self.biases.values()) if self.biases else None  # type: ignore[return-value]


class TileSlots:
    """A tower that takes `[tiles, N, C]`. A tile fills the first slots of its row; what is behind them is padding."""

    unit = 1

    def __init__(self, tiles: Sequence[TileTokens]) -> None:
        self.tiles = tiles

    def rows(self, hidden: Float[Tensor, "t n c"]) -> list[Tensor]:
        """`[tiles][n, C]` the tokens of each tile."""
        return [hidden[tile.place, : tile.count] for tile in self.tiles]

    def hidden(self, rows: Sequence[Tensor]) -> Float[Tensor, "t n c"]:
        """The hidden state that holds these tokens of each tile."""
        if not self.ragged:
            return torch.stack(list(rows))
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)

    @property
    def ragged(self) -> bool:
        return len({tile.count for tile in self.tiles}) > 1

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """What a block is called with beside the hidden state."""
        return given

    def key_bias(self) -> Float[Tensor, "t n"] | None:
        """What is added to the logits of each key; −∞ hides padding. None where nothing is to be added."""
        biases = [tile.bias() for tile in self.tiles]
        known = next((bias for bias in biases if bias is not None), None)
        if known is None and not self.ragged:
            return None
        zeros = torch.zeros(1, device=self.tiles[0].ids.device) if known is None else known
        own = [zeros.new_zeros(tile.count) if b is None else b for tile, b in zip(self.tiles, biases, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=-torch.inf)

    def read(self, signals: Iterable[Signal], show: Callable[[Signal], Show]) -> None:
        """Let signals read what passed through a module, tiles of equal length together."""
        groups: dict[int, list[TileTokens]] = {}
        for tile in self.tiles:
            groups.setdefault(tile.count, []).append(tile)
        for count, tiles in groups.items():
            at = torch.tensor([tile.place for tile in tiles])
            for signal in signals:
                seen = show(signal)(functools.partial(_cut, at, count))
                for tile, values in zip(tiles, signal.read(seen), strict=True):
                    tile.signals[signal] = _behind_prefix(values, count)


class PackedSlots:
    """A tower that takes all patches in one sequence `[ΣN, C]`, cut by `cu_seqlens`, where u patches make one token.

    Args:
        tiles: with their homes, in tokens.
        unit: patches that make a token.
    """

    def __init__(self, tiles: Sequence[TileTokens], unit: int) -> None:
        self.tiles, self.unit = tiles, unit
        self.total = sum(tile.count for tile in tiles)
        self._parts: dict[Signal, list[Tensor]] = {}
        self._order()

    def _order(self) -> None:
        """Tokens stand by their homes: a merged one in the segment of its representative, with its rotation."""
        homes = torch.cat([tile.home for tile in self.tiles])
        self._sorted = homes.argsort(stable=True)
        self._homes = homes[self._sorted]
        places = self._sorted.argsort()
        self._at = places.split([tile.count for tile in self.tiles])
        self._memo: dict[int, tuple[Any, Any]] = {}

    def rows(self, hidden: Float[Tensor, "p c"]) -> list[Tensor]:
        """`[tiles][n, u·C]` the tokens of each tile: the patches of a token side by side."""
        tokens = hidden.unflatten(0, (-1, self.unit)).flatten(1)
        return [tokens[at] for at in self._at]

    def rows_of_tokens(self, made: Float[Tensor, "m d"]) -> list[Tensor]:
        """The rows of each tile, from what has one row for each token."""
        return [made[at] for at in self._at]

    def hidden(self, rows: Sequence[Tensor]) -> Float[Tensor, "p c"]:
        """The sequence that holds these tokens of each tile."""
        self._order()
        tokens = torch.cat(list(rows))[self._sorted]
        return tokens.unflatten(1, (self.unit, -1)).flatten(0, 1)

    @property
    def ragged(self) -> bool:
        return False

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """A block is given the rotations of the tokens that are left, and where their segments end."""
        if not any(tile.reduced for tile in self.tiles):
            return given
        return {
            **given,
            "position_embeddings": self._once(given["position_embeddings"], self._rotations),
            "cu_seqlens": self._once(given["cu_seqlens"], self._ends),
        }

    def _once(self, value: Any, make: Callable[[Any], Any]) -> Any:
        """Blocks share their arguments; what was made of one is kept beside it, so that its id stays its own."""
        if id(value) not in self._memo:
            self._memo[id(value)] = (value, make(value))
        return self._memo[id(value)][1]

    def _rotations(self, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(x.unflatten(0, (-1, self.unit))[self._homes.to(x.device)].flatten(0, 1) for x in given)

    def _ends(self, given: Int[Tensor, " s"]) -> Int[Tensor, " r"]:
        """Where segments end now; empty ones vanish."""
        homes = self._homes.to(given.device)
        left = torch.searchsorted(homes, (given // self.unit).to(homes.dtype))
        return (left.unique_consecutive() * self.unit).to(given.dtype)

    def key_bias(self) -> Float[Tensor, "1 p"] | None:
        """What is added to the logits of each patch as a key; None where nothing is."""
        biases = [tile.bias() for tile in self.tiles]
        known = next((bias for bias in biases if bias is not None), None)
        if known is None:
            return None
        own = [known.new_zeros(tile.count) if b is None else b for tile, b in zip(self.tiles, biases, strict=True)]
        return torch.cat(own)[self._sorted].repeat_interleave(self.unit)[None]

    def read(self, signals: Iterable[Signal], show: Callable[[Signal], Show]) -> None:
        """Calls come one for each segment; a token has the mean over its patches once all have come."""
        for signal in signals:
            parts = self._parts.setdefault(signal, [])
            parts.append(signal.read(show(signal)(lambda x: x))[0])
            if sum(part.shape[0] for part in parts) == self._homes.shape[0] * self.unit:
                values = torch.cat(self._parts.pop(signal)).unflatten(0, (-1, self.unit)).mean(1)
                for tile, at in zip(self.tiles, self._at, strict=True):
                    tile.signals[signal] = values[at]

    def expanded(self, made: Float[Tensor, "m d"]) -> Float[Tensor, "n d"]:
        """A row for each place of the whole sequence, from those of the tokens that are left; zeros elsewhere."""
        return made.new_zeros(self.total, made.shape[-1]).index_copy(0, self._homes.to(made.device), made)


def _cut(at: Tensor, count: int, x: Tensor) -> Tensor:
    """`[tiles, …, N, D]` → some of the tiles and their first tokens."""
    return x[at.to(x.device), ..., :count, :]


def _behind_prefix(values: Tensor, count: int) -> Tensor:
    """Values of a tile for each of its tokens; those before the patches get zeros where the signal has none."""
    gap = count - values.shape[0]
    return torch.cat([values.new_zeros(gap, *values.shape[1:]), values]) if gap else values
