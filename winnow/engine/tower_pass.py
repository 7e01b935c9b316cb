"""The tower pass: one encoder call through the vision blocks, under a plan with steps at `blocks[i]`.

Each tile (crop, thumbnail, frame) is a lane of its own, as it is for the tower: views hold tiles of equal length. What
is left of them is joined to items before the projector, and goes on like tokens that steps at `features` left.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.layout import CONTENT
from winnow.core.ledger import ItemLedger, add_notes
from winnow.core.reduction import Reduction
from winnow.core.side_by_side import side_by_side
from winnow.core.signal import Signal, Site
from winnow.core.step import State
from winnow.engine.bound_model import BoundModel
from winnow.engine.bound_plan import BoundPlan, Steps
from winnow.engine.item_tokens import TowerTokens
from winnow.engine.runner import Change, StepRunner
from winnow.engine.tower_slots import PackedSlots, TileSlots, TileTokens
from winnow.models.family import Encoding
from winnow.signals.tap import scaling_of
from winnow.signals.vision import HiddenStates, Pixels, TowerAttention

# Whether a block adds the output of its MLP as it is to what came out of its attention; seen when it first ran.
_adds: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()

MASKED = ("sdpa", "eager")  # attention that takes an additive mask


@dataclass(frozen=True, eq=False)
class Half:
    """The second half of a block: what came out of its attention, the tokens left of it, and its MLP's output."""

    given: Tensor
    rows: Tensor
    made: Tensor | None = None


class TowerPass:
    """One encoder call through the blocks.

    Args:
        bound: the model.
        plan: with steps at blocks.
        encoding: the encoder call.
        hidden: what enters the first block.
        train: whether gradients flow through steps.
    """

    def __init__(self, bound: BoundModel, plan: BoundPlan, encoding: Encoding, hidden: Tensor, train: bool) -> None:
        self.bound, self.plan, self.encoding = bound, plan, encoding
        family, model = bound.family, bound.model
        family.check_tower_call(model, encoding)
        self.counts = family.tile_counts(model, encoding, hidden.shape[0])
        self.layouts = family.tower_layouts(model, encoding, self.counts)
        self.entries = family.entries(model, encoding, self.counts)
        self.starts = [sum(self.counts[:i]) for i in range(len(self.counts))]
        self.ledgers = [
            ItemLedger(-1, encoding.modality, layout, entry)
            for layout, entry in zip(self.layouts, self.entries, strict=True)
        ]
        self.tiles = self._tiles(hidden.device)
        self.packed = family.packed
        self.prefix = 0 if family.packed else int(bound.info.has_cls)
        self.slots: TileSlots | PackedSlots = (
            PackedSlots(self.tiles, bound.info.merge**2) if family.packed else TileSlots(self.tiles)
        )
        self.width = sum(tile.count for tile in self.tiles) if family.packed else hidden.shape[1]
        self.notes: dict[str, Any] = {}
        self.runner = StepRunner(plan, lambda notes: add_notes(self.notes, notes), train)
        self._bias: Tensor | None = None
        self._at = 0  # keys of this block whose attention has been computed
        self._half: Half | None = None
        self._kept_prefix: list[tuple[str, Tensor]] = []

    def _tiles(self, device: torch.device) -> list[TileTokens]:
        family, model = self.bound.family, self.bound.model
        order = family.packed_order(model, self.encoding) if family.packed else None
        home = None if order is None else order.argsort().to(device)
        tiles: list[TileTokens] = []
        first = 0
        for number, layout in enumerate(family.tile_layouts(model, self.encoding, self.counts)):
            for _ in range(self.counts[number]):
                ids = torch.arange(layout.n, device=device)
                at = ids + first if home is None else home[ids + first]
                record = ItemLedger(-1, self.encoding.modality, layout, layout.n_content)
                # Rows of the batch are not known yet: the item stands for its row, so that streams stay apart.
                tiles.append(
                    TileTokens(number, number, layout, ids, layout.n_content, record, place=len(tiles), home=at)
                )
                first += layout.n
        return tiles

    def enter(self, block: int, hidden: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Before a block: run its steps, then give it what belongs to the tokens that are left."""
        self._check_masked(block)
        hidden = self._run(block, self.plan.blocks.get(block, ()), hidden)
        self._bias, self._at = self.slots.key_bias(), 0
        return hidden, self.slots.arguments(arguments)

    def _check_masked(self, block: int) -> None:
        """What was to be hidden from the block before was hidden: its attention came by with all its keys."""
        if self._bias is not None and self._at != self._bias.shape[1]:
            raise UnsupportedError(
                f"block {block - 1} of the tower of {self.bound.info.model} did not attend through transformers' "
                "attention functions, so that merged tokens cannot be weighted there."
            )

    def attend(self, block: int, module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """One attention call of a block: let signals read it; what is to be added to its logits, if anything."""
        keys = k.shape[2]
        bias = None if self._bias is None else self._bias[:, self._at : self._at + keys]
        self._at += keys
        wanted = self.plan.listeners.get(Site("vision", block), ())

        def show(signal: Signal) -> Any:
            def seen(cut: Callable[[Tensor], Tensor]) -> TowerAttention:
                own = None if bias is None else cut(bias[:, :, None])[..., 0]
                return TowerAttention(cut(q), cut(k), cut(v), scaling_of(module, q), self._prefix_of(signal), own)

            return seen

        with torch.no_grad():
            self.slots.read(wanted, show)
        if bias is None:
            return None
        config: Any = module.config
        implementation = config._attn_implementation
        if implementation not in MASKED:
            raise UnsupportedError(
                f"tokens of the vision tower that are weighted by their size, or tiles of unequal length, need an "
                f"additive mask, which {implementation!r} does not take. Call "
                "model.set_attn_implementation('sdpa'), or give the method settings without proportional attention."
            )
        return bias.to(q.dtype)[:, None, None].expand(-1, -1, q.shape[2], -1)

    def _prefix_of(self, signal: Signal) -> int:
        """At `blocks` a signal has a value for each token of the tower, elsewhere for what stands behind [CLS]."""
        return 0 if signal in self.plan.block_signals else self.prefix

    def watch(self, block: int, before: Tensor, after: Tensor) -> None:
        """What went into a block and what came out of it."""
        wanted = self.plan.listeners.get(Site("vision", block, "hidden"), ())
        if self.packed:
            before, after = before[None], after[None]
        with torch.no_grad():
            self.slots.read(
                wanted,
                lambda signal: (
                    lambda cut: HiddenStates(cut(before), cut(after), self._prefix_of(signal), self.plan.text_encoder)
                ),
            )

    def enter_half(self, block: int, hidden: Tensor) -> Tensor:
        """Between attention and MLP: what the norm before the MLP is given."""
        self._half = Half(hidden, self._run(block, self.plan.halves[block], hidden))
        return self._half.rows

    def leave_mlp(self, made: Tensor) -> Tensor:
        """Behind the MLP: kept until the block ends; one is added to the old rows, which nobody reads any more."""
        if self._half is not None:
            self._half = replace(self._half, made=made)
        return made.new_ones(())

    def leave(self, block: int, output: Tensor) -> Tensor:
        """Behind a block: the tokens that are left, as its second half made them."""
        half, self._half = self._half, None
        if half is None or half.made is None:
            raise UnsupportedError(
                f"block {block} of the tower of {self.bound.info.model} did not run its {self._names}, so steps at "
                f"blocks[{block}].mlp cannot act; act at blocks[i]."
            )
        module = self.bound.blocks[block]
        if module not in _adds:
            _adds[module] = torch.equal(output, half.given + 1)
        if not _adds[module]:
            raise UnsupportedError(
                f"block {block} of the tower of {self.bound.info.model} does more than to add the output of its MLP, "
                f"so steps at blocks[{block}].mlp are not defined there; act at blocks[i]."
            )
        return half.rows + half.made

    @property
    def _names(self) -> str:
        return " and ".join(self.bound.family.halves)

    def _run(self, block: int, steps: Steps, hidden: Tensor) -> Tensor:
        for number, step in steps:
            for signal in step.needs:
                if signal.site(self.bound.info).stack == "pixels":
                    self._show_pixels(signal)
            rows = dict(zip(map(id, self.tiles), self.slots.rows(hidden), strict=True))

            def tokens(group: list[TileTokens], rows: dict[int, Tensor] = rows) -> Tensor:
                return torch.stack([rows[id(tile)] for tile in group])

            changes = self.runner.run(number, step, self.tiles, tokens)
            if changes:
                slug = self.plan.resolved.methods[number].slug
                made = {id(change.item): self._taken(change, rows[id(change.item)], number, slug) for change in changes}
                self._write(str(step.at), slug, {id(change.item): change.reduction for change in changes})
                hidden = self.slots.hidden([made.get(id(tile), rows[id(tile)]) for tile in self.tiles])
        return hidden

    def _taken(self, change: Change, before: Tensor, number: int, slug: str) -> Tensor:
        """The tile's new rows; it learns what the action said of it."""
        tile: TileTokens = change.item  # type: ignore[assignment]
        reduction = change.reduction
        if not reduction.m:
            raise WinnowError(f"{slug} left a tile without tokens; keep at least one in each tile of the tower.")
        if change.log_bias is not None:
            tile.biases = {**tile.biases, number: change.log_bias}
        tile.separators = tile.separators and change.separators
        if self.prefix:
            first = reduction.representatives[: self.prefix]
            kept = (first == torch.arange(self.prefix, device=first.device)).all() & (reduction.m >= self.prefix)
            self._kept_prefix.append((slug, kept))
        return before[reduction.representatives] if change.rows is None else change.rows.to(before.dtype)

    def _write(self, point: str, slug: str, reductions: dict[int, Reduction]) -> None:
        """In the ledger of each item stands one map of all its tiles."""
        for number in range(len(self.counts)):
            own = [(tile, reductions.get(id(tile))) for tile in self._of(number)]
            if any(reduction is not None for _, reduction in own):
                parts = [_nothing(tile) if reduction is None else reduction for tile, reduction in own]
                self.ledgers[number].reductions.append((point, slug, side_by_side(parts)))

    def _of(self, number: int) -> Sequence[TileTokens]:
        """The tiles of an item."""
        return self.tiles[self.starts[number] : self.starts[number] + self.counts[number]]

    def _show_pixels(self, signal: Signal) -> None:
        """Pixels need no block: they are read when a step first asks, and follow reductions from then on."""
        if signal in self.tiles[0].signals:
            return
        with torch.no_grad():
            values = signal.read(Pixels(self.bound.family.patches(self.bound.model, self.encoding)))
        at = 0
        for tile in self.tiles:
            content = tile.layout.n_content
            own, at = values[at : at + content], at + content
            prefix = own.new_zeros(tile.layout.n - content, *own.shape[1:])
            tile.signals[signal] = torch.cat([prefix, own]).to(tile.ids.device)[tile.ids]

    @property
    def reduced(self) -> bool:
        """Whether any step changed something."""
        return any(tile.reduced for tile in self.tiles)

    def close(self) -> None:
        """Behind the blocks: refuse what the rest of the tower and of the model would have misread."""
        self._check_masked(self.bound.info.vision_depth)
        self._bias = None
        if self._kept_prefix and not bool(torch.stack([kept for _, kept in self._kept_prefix]).all()):
            slugs = ", ".join(sorted({slug for slug, kept in self._kept_prefix if not bool(kept)}))
            raise WinnowError(
                f"{slugs} removed the tower's [CLS], or moved it from the first place of its tile; the blocks behind "
                "and the projector rely on it. Keep row 0 of the view as the first output of a reduction at blocks."
            )

    def items(self) -> list[TowerTokens]:
        """The items, with the tokens of their tiles one behind the other, in coordinates of the tower's layout."""
        return [self._joined(number) for number in range(len(self.counts))]

    def _joined(self, number: int) -> TowerTokens:
        tiles, layout = self._of(number), self.layouts[number]
        own = tiles[0].layout.n
        ids = torch.cat([tile.ids + place * own for place, tile in enumerate(tiles)])
        item = TowerTokens(
            -1, number, layout, ids, self.entries[number], self.ledgers[number],
            tiles=slice(self.starts[number], self.starts[number] + self.counts[number]),
            in_place=True,
            anchored=all(tile.anchored for tile in tiles),
            separators=all(tile.separators for tile in tiles),
            reduced=any(tile.reduced for tile in tiles),
        )  # fmt: skip
        item.states = _joined_states(tiles)
        return item

    def signal(self, number: int, signal: Signal) -> Tensor:
        """A signal for the tokens of an item that are left, as it is shown at `features`."""
        tiles = self._of(number)
        if signal.site(self.bound.info).stack == "pixels":
            self._show_pixels(signal)
        prefix = 0 if signal.covers_prefix else self.prefix
        return torch.cat([tile.signals[signal][prefix:] for tile in tiles])

    def cells(self) -> dict[Signal, Tensor]:
        """`[cells, …]` what was read in the tower, at the cells of the tokens that are left; zeros elsewhere."""
        ids = [tile.ids + place * tile.layout.n for place, tile in self._placed()]
        at = torch.cat([self._cells_of(tile, i) for (_, tile), i in zip(self._placed(), ids, strict=True)])
        total = sum(int((layout.kind == CONTENT).sum()) for layout in self.layouts)
        found = {}
        for signal in self.tiles[0].signals:
            values = torch.cat([tile.signals[signal] for tile in self.tiles])
            found[signal] = values.new_zeros(total, *values.shape[1:]).index_copy(0, at[at >= 0], values[at >= 0])
        return found

    def _placed(self) -> list[tuple[int, TileTokens]]:
        """Each tile with its place among those of its item."""
        return [(place, tile) for number in range(len(self.counts)) for place, tile in enumerate(self._of(number))]

    def _cells_of(self, tile: TileTokens, ids: Tensor) -> Tensor:
        """The cell, among those of the encoder call, of each token of a tile; −1 for [CLS]."""
        first = sum(int((layout.kind == CONTENT).sum()) for layout in self.layouts[: tile.number])
        cell = torch.from_numpy(self.layouts[tile.number].cell.copy()).to(ids.device)[ids]
        return torch.where(cell < 0, cell, cell + first)

    def projector_rows(self, given: Tensor) -> Tensor | None:
        """What the projector reads instead of padded tiles: `[1, ΣM, C]`; None where it is given no padding."""
        if not self.slots.ragged:
            return None
        cut = self._cut(given)
        return torch.cat([given[tile.place, : tile.count - cut] for tile in self.tiles])[None]

    def _cut(self, given: Tensor) -> int:
        """Tokens of each tile that the model has cut off in front before its projector."""
        return max(tile.count for tile in self.tiles) - given.shape[1]

    def projected_shape(self, given: Tensor) -> tuple[int, ...]:
        """The shape, but for its width, that the projector's output would have had without steps at blocks."""
        if self.packed:
            return (self.width,)
        return (given.shape[0], self.width - self._cut(given))

    def projected(self, made: Float[Tensor, "*shape d"]) -> list[Float[Tensor, "m d"]]:
        """The rows of each item behind the projector; [CLS], if the projector did not see it, has zeros."""
        if self.packed:
            rows = self.slots.rows_of_tokens(made)  # type: ignore[union-attr]
        elif self.slots.ragged:
            cut = (sum(tile.count for tile in self.tiles) - made.shape[1]) // len(self.tiles)
            rows = list(made[0].split([tile.count - cut for tile in self.tiles]))
        else:
            rows = list(made)
        gaps = [tile.count - own.shape[0] for tile, own in zip(self.tiles, rows, strict=True)]
        whole = [torch.cat([own.new_zeros(gap, own.shape[1]), own]) for gap, own in zip(gaps, rows, strict=True)]
        return [torch.cat(whole[a : a + n]) for a, n in zip(self.starts, self.counts, strict=True)]

    def features(self, output: Tensor) -> list[Tensor]:
        """The rows of each item at `features`, from the tower's output."""
        rows = self.slots.rows(output)
        return [torch.cat(rows[a : a + n]) for a, n in zip(self.starts, self.counts, strict=True)]

    def expanded(self, made: Tensor) -> Tensor:
        """What a merger beside the projector made (Qwen3-VL's deepstack), at the places of the whole sequence."""
        return self.slots.expanded(made) if self.reduced else made  # type: ignore[union-attr]


def _nothing(tile: TileTokens) -> Reduction:
    """The map that keeps all tokens of a tile."""
    return Reduction.select(torch.arange(tile.count, device=tile.ids.device), tile.count)


def _joined_states(tiles: Sequence[TileTokens]) -> dict[int, State]:
    """What methods remember of the tokens of an item; facts of a single tile are none of the item."""
    found: dict[int, State] = {}
    for number in set.intersection(*[set(tile.states) for tile in tiles]):
        states = [tile.states[number] for tile in tiles]

        def joined(name: str, states: list[State] = states) -> dict[str, Tensor]:
            fields = [getattr(state, name) for state in states]
            names = set.intersection(*map(set, fields))
            return {key: torch.cat([own[key] for own in fields], 1) for key in names}

        found[number] = State(joined("token"), {}, states[0].request, joined("summed"))
    return found
