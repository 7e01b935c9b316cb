"""EncodedItem: an item as the encoder gave it, on its way into shortened inputs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from winnow.core.errors import UnsupportedError
from winnow.core.ledger import ItemLedger
from winnow.core.reduction import Reduction
from winnow.engine.encoder import places
from winnow.engine.encoding import EncoderRecord
from winnow.engine.item_signals import item_signal
from winnow.engine.item_tokens import ItemTokens, Span, carried, content_mask
from winnow.engine.question import Questions
from winnow.engine.runner import Change, StepRunner


@dataclass(eq=False)
class EncodedItem(ItemTokens):
    """An item at `projected`, whose rows are those that the model would put at its placeholders.

    Attributes:
        where: `[t]` logical positions of its placeholders.
        content, separators: `[…]` which of its placeholders hold content, and separators.
        rows: `[n, D]` its content rows of now.
        deep: for each deepstack layer `[n, D]`, what is added to these rows there.
        places: `[n]` content ids of the placeholders at which its rows stand.
        seen: how many of its placeholders the caller's mask shows.
        changed: whether it is anything else than what the encoder gave.
    """

    where: Int[Tensor, " t"] = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    content: Int[Tensor, " c"] = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    separators: Int[Tensor, " s"] = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    deep: list[Tensor] = field(default_factory=list)
    places: Int[Tensor, " n"] = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    seen: int = 0
    changed: bool = False

    @staticmethod
    def of(
        span: Span, record: EncoderRecord, given: Tensor, deep: Sequence[Tensor], seen: Bool[Tensor, " t"]
    ) -> "EncodedItem":
        """The item of a span.

        Args:
            given: `[t, D]` its rows as the encoder gave them, separators included.
            deep: for each deepstack layer `[t, D]`.
            seen: which of its placeholders the caller's mask shows, on the host.
        """
        layout, device = record.layouts[span.number], given.device
        mask = content_mask(layout)
        content = mask.nonzero()[:, 0].to(device)
        separators = (~mask & seen).nonzero()[:, 0].to(device)
        ids = seen[mask].nonzero()[:, 0].to(device)
        hidden = not bool(seen.all())
        if hidden and record.reduced:
            raise UnsupportedError(
                "the attention_mask hides tokens of a picture that was reduced at features; unmask them, or use a "
                "method that acts at projected."
            )
        ledger = ItemLedger(span.row, record.modality, layout, layout.n_content)
        item = EncodedItem(
            span.row, span.number, layout, ids, layout.n_content, ledger,
            where=span.where.to(device), content=content, separators=separators,
            places=ids, seen=int(seen.sum()), changed=hidden,
        )  # fmt: skip
        if record.items:
            item._after_features(record, hidden)
        at = content[item.places]
        item.rows, item.deep = given[at], [x.to(device)[at] for x in deep]
        return item

    def _after_features(self, record: EncoderRecord, hidden: bool) -> None:
        """What steps at `features` left; the rows that they made stand at their places already."""
        tower = record.items[self.number]
        self.states = dict(tower.states)
        self.record.reductions += tower.record.reductions
        if hidden:
            seen = Reduction.select(self.ids, self.layout.n_content)
            self.states = {number: carried(state, seen) for number, state in self.states.items()}
        elif record.reduced:
            self.ids, self.places, self.changed = tower.ids, places(tower), True
            self._keep_separators(tower.separators)

    def apply(self, change: Change) -> None:
        """Rows after a step: new ones stand at the places of their representatives, or at the item's first places."""
        reduction, was = change.reduction, self.places
        unique = reduction.is_selection or reduction.representative is not None
        self.places = was[reduction.representatives].sort().values if unique else was[: reduction.m]
        self.rows = self.rows[reduction.representatives] if change.rows is None else change.rows.to(self.rows.dtype)
        self.deep = [reduction.apply(x) for x in self.deep]
        self.changed = self.changed or change.rows is not None or reduction.m < reduction.n
        self._keep_separators(change.separators)

    def _keep_separators(self, kept: bool) -> None:
        if not kept or not self.count:
            self.changed = self.changed or bool(self.separators.shape[0])
            self.separators = self.separators[:0]

    @property
    def left(self) -> Int[Tensor, " m"]:
        """Which of its placeholders stay, in order."""
        return torch.cat([self.content[self.places], self.separators]).sort().values

    def features(self, given: Tensor, rows: Tensor) -> Tensor:
        """`[m, D]` what belongs to the placeholders that stay.

        Args:
            given: `[t, D]` what the encoder gave.
            rows: `[n, D]` the content rows of now, or what a deepstack layer adds to them.
        """
        return given.index_copy(0, self.content[self.places], rows.to(given.dtype))[self.left]


def run_projected(
    runner: StepRunner,
    bound: Any,
    items: list[EncodedItem],
    records: dict[str, EncoderRecord],
    questions: Questions | None = None,
) -> None:
    """The steps at `projected`, on what the encoder gave."""
    for number, signal in {(n, signal) for n, step in runner.plan.projected for signal in step.needs}:
        for item in items:
            if not runner.plan.acts_on(number, item.record.modality):
                continue
            if signal in runner.plan.text_signals:
                item.signals[signal] = questions.read(signal, item.row, item.rows)  # type: ignore[union-attr]
                continue
            item.signals[signal] = item_signal(bound, item, items, lambda own: records[own.record.modality], signal)
    for number, step in runner.plan.projected:
        for change in runner.run(number, step, items, lambda group: torch.stack([item.rows for item in group])):
            change.item.apply(change)  # type: ignore[attr-defined]
    for item in items:
        item.n_lm, item.record.ids = item.count, item.ids
