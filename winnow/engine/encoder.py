"""The encoder pass: from pixels to what the language model is given, with steps at `features` on the way."""

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.layout import CONTENT, Layout
from winnow.core.ledger import ItemLedger, add_notes
from winnow.core.reduction import Reduction
from winnow.core.signal import Signal, Site
from winnow.engine.bound_model import BoundModel
from winnow.engine.encoding import EncoderRecord, Reading, mark
from winnow.engine.item_tokens import TowerTokens
from winnow.engine.request import Request
from winnow.engine.runner import StepRunner
from winnow.engine.tower_pass import TowerPass
from winnow.models.family import seam
from winnow.signals.tap import scaling_of
from winnow.signals.vision import Pixels, TowerAttention


class EncoderMethod:
    """Stands in for `base.get_image_features` on one model: notes what is encoded, and calls the original.

    Args:
        open_request: the request that is running in this context, or a new one.
        base, name: the module and its method.
        modality: what it encodes.

    A copy or a pickle of the model gets the plain method back.
    """

    def __init__(self, open_request: Callable[[], Any], base: nn.Module, name: str, modality: str) -> None:
        self.open_request, self.base, self.name, self.modality = open_request, base, name, modality
        self.plain = getattr(base, name)
        functools.update_wrapper(self, self.plain)
        self._eager = torch.compiler.disable(self._encode)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Hooks and context variables are not traced: the encoder runs eagerly inside compiled code.
        return (self._eager if torch.compiler.is_compiling() else self._encode)(*args, **kwargs)

    def _encode(self, *args: Any, **kwargs: Any) -> Any:
        with self.open_request() as request:
            # An encoder may call another one for its own work.
            if request is None or request.encoding is not None or not request.plan.listens(self.modality):
                return self.plain(*args, **kwargs)
            given = inspect.signature(self.plain).bind_partial(*args, **kwargs).arguments
            beside = {n: request.called[n] for n in request.bound.family.beside if n in request.called}
            record = EncoderRecord(self.modality, {**beside, **given, **given.pop("kwargs", {})}, plan=request.plan)
            request.encoding = record
            try:
                with request.clock.phase("encoder"):
                    output = self.plain(*args, **kwargs)
            finally:
                request.encoding = None
            return finish(request, record, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return plain_method(memo.get(id(self.base), self.base), self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return plain_method, (self.base, self.name)


def methods_of(bound: BoundModel, open_request: Callable[[], Any]) -> list[EncoderMethod]:
    """What stands in for each method that encodes; of a part of the model, where it is written with a dot."""
    made = []
    for path, modality, _ in bound.family.encoders:
        part, _, name = path.rpartition(".")
        owner = seam(bound.base, part, bound.model) if part else bound.base
        made.append(EncoderMethod(open_request, owner, name, modality))
    return made


def plain_method(base: nn.Module, name: str) -> Any:
    """The method of the class, bound to this object."""
    return types.MethodType(getattr(type(base), name), base)


def finish(request: Request, record: EncoderRecord, output: Any) -> Any:
    """The encoder's output with its record; rows that steps at `features` made stand where they belong."""
    pooled = request.bound.family.rows(output)
    if pooled is None:
        if request.plan.plan.methods:
            raise WinnowError(
                "the encoder of a compressed model was called for a tuple (return_dict=False), which cannot say what "
                "was kept; call it with return_dict=True, or inside handle.using('full')."
            )
        return output
    record.undivided = isinstance(pooled, Tensor) and pooled.shape[0] == 1
    record.lengths = request.bound.family.lengths(request.bound.model, record, pooled)
    record.layouts = request.bound.family.layouts(request.bound.model, record)
    if record.items:
        settle(record)
    if record.reduced:
        reduced = [
            placed(x, item, layout) for x, item, layout in zip(pooled, record.items, record.layouts, strict=True)
        ]
        output.pooler_output = torch.stack(reduced) if isinstance(pooled, Tensor) else type(pooled)(reduced)
    record.times = request.clock.times
    record.tower = record.tower_output = None
    request.encodings[record.modality] = record
    made = request.outputs[record.modality] = mark(output, record)
    return made


def read(request: Request, site: Site, seen: Any) -> None:
    """Let the signals of a site read what passes there."""
    record = request.encoding
    wanted = request.plan.listeners.get(site, ())
    if record is None or not wanted:
        return
    prefix = getattr(seen, "prefix", 0)
    with torch.no_grad(), request.clock.phase("select"):
        for signal in wanted:
            value = signal.read(seen).to(request.bound.device)  # the parts of the encoder may be on several
            reading = record.readings.setdefault(signal, Reading())
            shown = seen.q.shape[2] if isinstance(seen, TowerAttention) else seen.before.shape[1]
            reading.prefix = prefix if value.shape[1] == shown else 0
            reading.calls.append(value)


def read_attention(request: Request, site: Site, module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Let the signals of a tower block read its attention, window by window."""
    bound, record = request.bound, request.encoding
    if record is None:
        return
    windows = bound.family.windows(bound.model, record, q.shape[2])
    scaling, prefix = scaling_of(module, q), int(bound.info.has_cls)
    for parts in zip(q.split(windows, 2), k.split(windows, 2), v.split(windows, 2), strict=True):
        read(request, site, TowerAttention(*parts, scaling, prefix))


def lm_signal(bound: BoundModel, record: EncoderRecord, number: int, signal: Signal) -> Tensor:
    """`[V, …]` a signal of the encoder for the content tokens of an item, in their order in the LM's sequence."""
    cells = cells_of(bound, record, signal)
    layout = record.layouts[number]
    start = bound.family.cell_starts(bound.model, record)[number]
    index = torch.from_numpy(start + layout.cell[layout.kind == CONTENT]).to(cells.device)
    return cells[index]


def cells_of(bound: BoundModel, record: EncoderRecord, signal: Signal) -> Tensor:
    """`[cells, …]` a signal of the encoder, joined once for all items."""
    if signal.site(bound.info).stack == "pixels" and signal not in record.readings:
        patches = bound.family.patches(bound.model, record).to(bound.device)
        record.readings[signal] = Reading([signal.read(Pixels(patches))[None]])
    reading = record.calls_of(signal)
    if reading.joined is None:
        calls = [x[:, reading.prefix :] for x in reading.calls]
        pixels = signal.site(bound.info).stack == "pixels"
        reading.joined = calls[0][0] if pixels else bound.family.cells(bound.model, record, calls)
    return reading.joined


def enter_projector(request: Request, given: Tensor) -> Tensor | None:
    """Before the projector: what it reads instead, where steps of the tower have changed that; else None.

    Args:
        given: what the model gives it.
    """
    record: EncoderRecord = request.encoding  # type: ignore[assignment]
    tower: TowerPass | None = record.tower
    if tower is None and request.plan.first_block is not None:
        raise UnsupportedError(
            f"the blocks of the tower of {request.bound.info.model} did not run before its projector, or the hooks on "
            "them were removed; call detach() on the handle and compress again."
        )
    record.projected_shape = tuple(given.shape[:2]) if tower is None else tower.projected_shape(given)
    if tower is not None:
        tower.close()
        record.items = tower.items()
        record.notes.update(tower.notes)
        record.readings |= {signal: Reading(joined=cells) for signal, cells in tower.cells().items()}
    if request.plan.features:
        return run_features(request)
    return tower.projector_rows(given) if tower is not None and tower.reduced else None


def run_features(request: Request) -> Tensor | None:
    """Steps at `features`: before the projector, replace each item's tower tokens by the rows that are kept.

    Returns:
        `[1, ΣM, C]` rows of all items, which the projector maps instead; None if no step changed anything.
    """
    record, bound = request.encoding, request.bound
    if record is None or not request.plan.features:
        return None
    if record.tower_output is None:
        raise UnsupportedError(
            f"the tower of {bound.info.model} did not run before its projector: there is nothing to reduce at features."
        )
    with request.clock.phase("select"):
        _take_features(bound, record)
        note = functools.partial(add_notes, record.notes)
        runner = StepRunner(request.plan, note, request.train, request.memory)
        for number, step in request.plan.features:
            for item in record.items:
                for signal in step.needs:
                    item.signals.setdefault(signal, _of_tower(bound, record, item, signal))
            for change in runner.run(number, step, record.items, lambda group: torch.stack([i.rows for i in group])):
                _apply(change.item, change.reduction, change.rows, change.separators)  # type: ignore[arg-type]
    if not record.reduced:
        return None
    return torch.cat([item.rows for item in record.items])[None]


def _apply(item: TowerTokens, reduction: Reduction, rows: Tensor | None, separators: bool) -> None:
    item.rows = item.rows[reduction.representatives] if rows is None else rows
    item.in_place = item.in_place and reduction.is_selection and reduction.ordered
    item.separators = item.separators and separators
    item.reduced = True
    if not item.in_place and item.count > item.n_visual:
        raise UnsupportedError(
            f"{item.count} rows are kept of an item that has {item.n_visual} tokens in the language model."
        )


def _take_features(bound: BoundModel, record: EncoderRecord) -> None:
    """The items with their rows before the projector."""
    features = bound.family.features(bound.model, record, record.tower_output)
    if record.tower is None:
        record.items = _tower_items(bound, record, features.to(bound.device))
        return
    for item, rows in zip(record.items, record.tower.features(features), strict=True):
        item.rows = rows.to(item.ids.device)


def _tower_items(bound: BoundModel, record: EncoderRecord, features: Tensor) -> list[TowerTokens]:
    counts = bound.family.tile_counts(bound.model, record, features.shape[0])
    layouts = bound.family.tower_layouts(bound.model, record, counts)
    entries = bound.family.entries(bound.model, record, counts)
    items, start = [], 0
    for number, tiles in enumerate(counts):
        rows = features[start : start + tiles].flatten(0, 1)
        ids = torch.arange(rows.shape[0], device=rows.device)
        ledger = ItemLedger(-1, record.modality, layouts[number], entries[number])
        tiled = slice(start, start + tiles)
        item = TowerTokens(-1, number, layouts[number], ids, entries[number], ledger, rows=rows, tiles=tiled)
        items.append(item)
        start += tiles
    return items


def _of_tower(bound: BoundModel, record: EncoderRecord, item: TowerTokens, signal: Signal) -> Tensor:
    """A signal of the encoder for the tokens of one item at the tower's side, as its tiles gave them."""
    if record.tower is not None:
        return record.tower.signal(item.number, signal)
    if signal.site(bound.info).stack == "pixels":
        cells = int((item.layout.kind == CONTENT).sum())
        start = sum(int((other.layout.kind == CONTENT).sum()) for other in record.items[: item.number])
        return cells_of(bound, record, signal)[start : start + cells]
    return torch.cat(record.calls_of(signal).calls)[item.tiles].flatten(0, 1)


def take_projected(request: Request, projected: Tensor) -> Tensor:
    """After the projector: each item gets its rows back; the model goes on with the shape that it expects."""
    record: EncoderRecord = request.encoding  # type: ignore[assignment]
    if record.tower is None or request.plan.features:
        parts: Sequence[Tensor] = projected[0].split([item.count for item in record.items])
    else:
        parts = record.tower.projected(projected)
    for item, part in zip(record.items, parts, strict=True):
        item.rows = part.to(item.ids.device)
    return projected.new_zeros(()).expand(*record.projected_shape, projected.shape[-1])


def settle(record: EncoderRecord) -> None:
    """Bring the items from the tower's coordinates to those of the LM's sequence.

    Selected patches go back to their own places; those that unpadding removed have none and leave. Rows in an order of
    their own take the item's first places, at the position of their representative ([CLS]: of the item's first token).
    """
    for item, layout in zip(record.items, record.layouts, strict=True):
        content = torch.from_numpy(_content_of(item.layout, layout)).to(item.ids.device)  # tower token → content id
        item.record.to_content(content, layout)
        ids = content[item.ids]
        if item.in_place:
            order = ids.argsort(stable=True)[int((ids < 0).sum()) :]
            placed = Reduction.select(order, item.count)
            item.follow(placed)
            if record.reduced:
                item.rows = item.rows[order]
            if item.reduced:
                item.record.reductions.append(("features", "layout", placed))
            ids = ids[order]
            item.in_place = item.anchored
        item.ids, item.layout = ids.clamp_min(0), layout


def _content_of(tower: Layout, layout: Layout) -> np.ndarray:
    """`[n]` the content id, in the LM's sequence, of each token of the tower; −1 for those that are not there."""
    content = np.full(int(tower.cell.max()) + 1, -1)
    content[layout.cell[layout.kind == CONTENT]] = np.arange(layout.n_content)
    return np.where(tower.cell >= 0, content[np.clip(tower.cell, 0, None)], -1)


def places(item: TowerTokens) -> Tensor:
    """`[m]` the content places in which an item's rows stand: their own, or the item's first ones."""
    return item.ids if item.in_place else torch.arange(item.count, device=item.ids.device)


def placed(given: Tensor, item: TowerTokens, layout: Layout) -> Tensor:
    """An item's features with its rows in their places; nothing reads what stands elsewhere."""
    content = torch.from_numpy(layout.content).to(given.device)
    return given.index_copy(0, content[places(item).to(given.device)], item.rows.to(given))
