"""The encoder side: what the tower's attention says, and steps at `features`."""

from __future__ import annotations

import functools
import inspect
import threading
import types
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.layout import CONTENT, Layout
from winnow.core.reduction import Reduction
from winnow.core.signal import Signal, VisionAttention, VisionKeys
from winnow.core.step import State
from winnow.core.view import View
from winnow.engine import steps as stepping
from winnow.engine.current import encoding_now
from winnow.models.family import Encoding
from winnow.signals.attention import attention_rows, column_mean
from winnow.signals.tap import scaling_of

if TYPE_CHECKING:
    from winnow.engine.attach import Engine
    from winnow.engine.items import Item


@dataclass(frozen=True, eq=False)
class FeatureRows:
    """The rows of one item on their way from the tower into the LM.

    Attributes:
        tokens: `[M, C]` before the projector, `[M, D]` after it.
        ids: `[M]` tower tokens that they are or that anchor them; content ids once they are settled.
        in_place: whether they are selected tokens in their own order.
        record: (point, slug, Reduction) of the steps so far.
    """

    tokens: Tensor
    ids: Tensor
    in_place: bool = True
    record: tuple[tuple[str, str, Reduction], ...] = ()

    @staticmethod
    def of(tokens: Tensor) -> FeatureRows:
        """All tokens of an item as the tower gave them."""
        return FeatureRows(tokens, torch.arange(tokens.shape[0], device=tokens.device))

    def reduced(self, tokens: Tensor, reduction: Reduction, entry: tuple[str, str, Reduction]) -> FeatureRows:
        in_place = self.in_place and reduction.is_selection and reduction.ordered
        return FeatureRows(tokens, self.ids[reduction.anchors], in_place, (*self.record, entry))


class EncoderDoor:
    """Stands in for `base.get_image_features` on one model: notes what is encoded, and calls the original.

    A copy or a pickle of the model gets the plain method back.
    """

    def __init__(self, engine: Engine, base: nn.Module, name: str, modality: str) -> None:
        self.engine, self.base, self.name, self.modality = engine, base, name, modality
        self.plain = getattr(base, name)
        functools.update_wrapper(self, self.plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        compiled = self.engine.active()
        if self.engine.clock.on and self.engine.clock.idle:
            self.engine.clock.restart()
        inputs = inspect.signature(self.plain).bind_partial(*args, **kwargs).arguments
        encoding = Encoding(self.modality, {**inputs, **inputs.get("kwargs", {})}, compiled)
        running, me = self.engine.running, threading.get_ident()
        outside = me not in running  # `generate` encodes before its first forward
        running[me] = threading.current_thread()
        token = encoding_now.set(encoding)
        try:
            with self.engine.clock.phase("encoder"):
                output = self.plain(*args, **kwargs)
        finally:
            encoding_now.reset(token)
            if outside:
                running.pop(me, None)
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            return output
        encoding.lengths = tuple(x.reshape(-1, x.shape[-1]).shape[0] for x in pooled)
        encoding.layouts = self.engine.family.layouts(self.engine.model, encoding)
        if encoding.rows is not None:
            settle_rows(encoding)
        output._winnow = encoding
        self.engine.forward.encoded(self.modality, encoding)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _plain_method(memo.get(id(self.base), self.base), self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain_method, (self.base, self.name)


def _plain_method(base: nn.Module, name: str) -> Any:
    return types.MethodType(getattr(type(base), name), base)


def hear_tower(
    encoding: Encoding, signals: tuple[Signal, ...], has_cls: bool, module: nn.Module, q: Tensor, k: Tensor
) -> None:
    """A tapped tower block shows its queries and keys; what a step asked for is kept, per tile or per window."""
    scaling = scaling_of(module, q)
    skip = int(has_cls)
    with torch.no_grad():
        for signal in signals:
            if isinstance(signal, VisionKeys):
                value = k.to(torch.promote_types(k.dtype, torch.float32)).mean(1)
            elif isinstance(signal, VisionAttention):
                rows = (
                    attention_rows(q[:, :, :1], k, scaling)[:, :, 0]
                    if signal.query == "cls"
                    else column_mean(q, k, scaling)
                )
                value = (rows.sum(1) if signal.heads == "sum" else rows.mean(1))[:, skip:]
            else:
                raise TypeError(signal)
            encoding.heard.setdefault(signal, []).append(value)


def vision_signal(engine: Engine, item: Item, signal: Signal) -> Tensor:
    """`[V, …]` a tower signal for the content tokens of an item, in their order in the LM's sequence."""
    encoding = item.encoding
    heard = _heard(encoding, signal)
    if isinstance(signal, VisionKeys) and engine.info.has_cls:
        heard = [h[:, 1:] for h in heard]
    key = ("cells", signal)
    if key not in encoding.heard:
        encoding.heard[key] = [engine.family.cells(engine.model, encoding, heard)]
    cells = encoding.heard[key][0]
    layout = item.layout
    start = engine.family.cell_starts(engine.model, encoding)[item.number]
    index = torch.from_numpy(start + layout.cell[layout.kind == CONTENT]).to(cells.device)
    return cells[index]


def _heard(encoding: Encoding, signal: Signal) -> list[Tensor]:
    if signal not in encoding.heard:
        raise WinnowError(
            f"{signal} was not recorded: these encoder outputs were made without this plan. "
            "Encode under the plan (pass pixel_values), or make the outputs inside the same `using`."
        )
    return encoding.heard[signal]


def run_features(engine: Engine, encoding: Encoding) -> Tensor | None:
    """Steps at `features`: before the projector, replace each item's tower tokens by the rows that are kept.

    Returns:
        `[1, ΣM, C]` rows of all items, which the projector maps instead; None if no step changed anything.
    """
    if encoding.features is None:
        raise WinnowError("the tower gave no features to reduce")
    with engine.clock.phase("select"):
        counts = engine.family.tile_counts(engine.model, encoding, encoding.features.shape[0])
        encoding.towers = engine.family.tower_layouts(engine.model, encoding, counts)
        entries = engine.family.entries(engine.model, encoding, counts)
        starts = [sum(counts[:i]) for i in range(len(counts))]
        tiles = [encoding.features[s : s + n] for s, n in zip(starts, counts, strict=True)]
        rows = [FeatureRows.of(x.flatten(0, 1)) for x in tiles]
        for number, step in encoding.plan.features:
            slug = encoding.plan.plan.methods[number].slug
            for members in _equal(rows, encoding.towers, entries):
                signals = {
                    signal: torch.stack([_heard_of_tiles(encoding, signal, starts[i], counts[i]) for i in members])
                    for signal in step.needs
                }
                first = members[0]
                view = View(
                    torch.stack([rows[i].tokens for i in members]),
                    encoding.towers[first],
                    torch.stack([rows[i].ids for i in members]),
                    entries[first],
                    signals,
                    seed=encoding.plan.plan.seed,
                    module=encoding.plan.modules[number],
                )
                with torch.no_grad():
                    action, _ = stepping.act(step, slug, view, State(), encoding.notes.update)
                if action is None:
                    continue
                encoding.separators = action.separators
                made = action.reduction.apply(view.tokens)
                for lane, i in enumerate(members):
                    one = action.reduction.lane(lane)
                    rows[i] = rows[i].reduced(made[lane, : one.m], one, (str(step.at), slug, one))
                    if not rows[i].in_place and one.m > entries[i]:
                        raise UnsupportedError(
                            f"{slug} keeps {one.m} rows of an item of {entries[i]} tokens in the LM."
                        )
        if not any(r.record for r in rows):
            return None
        encoding.rows = rows
        return torch.cat([r.tokens for r in rows])[None]


def take_projected(encoding: Encoding, projected: Tensor) -> Tensor | None:
    """After the projector: keep the rows aside; the model goes on with empty tokens of the shape that it expects."""
    if encoding.rows is None:
        return None
    parts = projected[0].split([r.tokens.shape[0] for r in encoding.rows])
    encoding.rows = [replace(r, tokens=part) for r, part in zip(encoding.rows, parts, strict=True)]
    tiles, tokens = encoding.expected
    return projected.new_zeros(1, 1, 1).expand(tiles, tokens, projected.shape[-1])


def _equal(rows: list[FeatureRows], layouts: tuple[Layout, ...], entries: tuple[int, ...]) -> list[list[int]]:
    found: dict[Any, list[int]] = {}
    for i, r in enumerate(rows):
        found.setdefault((r.tokens.shape[0], layouts[i], entries[i]), []).append(i)
    return list(found.values())


def _heard_of_tiles(encoding: Encoding, signal: Signal, start: int, tiles: int) -> Tensor:
    """A tower signal of one item: attention per content token of the tower, keys per token with [CLS]."""
    return torch.cat(_heard(encoding, signal))[start : start + tiles].flatten(0, 1)


def settle_rows(encoding: Encoding) -> None:
    """Where the rows made at `features` belong in the LM's sequence.

    Selected patches go back to their own places; those that unpadding removed have none and leave. Rows in an order of
    their own take the item's first places, at the position of their anchor ([CLS]: of the item's first token).
    """
    for number, (layout, tower) in enumerate(zip(encoding.layouts, encoding.towers, strict=True)):
        content = np.full(int(tower.cell.max()) + 1, -1)
        content[layout.cell[layout.kind == CONTENT]] = np.arange(layout.n_content)
        of_token = torch.from_numpy(np.where(tower.cell >= 0, content[np.clip(tower.cell, 0, None)], -1))
        rows = encoding.rows[number]  # type: ignore[index]
        ids = of_token.to(rows.ids.device)[rows.ids]
        if rows.in_place:
            order = ids.argsort(stable=True)[int((ids < 0).sum()) :]
            rows = replace(rows, tokens=rows.tokens[order], ids=ids[order])
        else:
            rows = replace(rows, ids=ids.clamp_min(0))
        encoding.rows[number] = rows  # type: ignore[index]
