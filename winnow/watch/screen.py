"""What people see of a stream: answers line by line, and in a terminal the newest reads below them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from winnow.watch.questions import Typed
from winnow.watch.record import Answer, Record

REFRESH = 8  # a second
COLUMNS = ("frame", "seconds", "tokens", "kept", "held by a head", "cache", "ms")


class Screen:
    """Where a record is drawn.

    Args:
        console: None: nowhere.
        title: the line above all.
        typed: shown below as it is typed; None where nobody can type.
        number: writes a number with its unit.
    """

    def __init__(
        self,
        console: Console | None,
        title: str,
        record: Record,
        typed: Typed | None,
        number: Callable[[float | None, str], str],
    ) -> None:
        self.console, self.title, self.record, self.typed, self.number = console, title, record, typed, number

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """While it is entered, a terminal shows the newest reads; they are gone afterwards."""
        if self.console is None:
            yield
            return
        self.console.print(Text(self.title, style="bold"))
        if not self.console.is_terminal:
            yield
            return
        with Live(get_renderable=self._now, console=self.console, refresh_per_second=REFRESH, transient=True):
            yield

    def answered(self, found: Answer) -> None:
        """An answer, which stays."""
        truth = "" if found.truth is None else f"   [dim](right answer: {escape(found.truth)})[/]"
        self._say(
            f"{found.time:8.2f} s  {escape(found.question)}  [bold]{escape(found.answer or '(empty)')}[/]{truth}"
            f"   [dim]{found.ms:.0f} ms[/]"
        )

    def refused(self, question: str, why: str) -> None:
        """What cannot be asked, while the stream goes on."""
        self._say(f"{self.record.last[1]:8.2f} s  {escape(question)}  [red]{escape(why)}[/]")

    def told(self, text: str) -> None:
        """A line of ours."""
        self._say(f"[dim]{escape(text)}[/]")

    def summary(self) -> None:
        """What the whole has cost."""
        if self.console is None or not self.record.reads:
            return
        record, newest = self.record, self.record.reads[-1]
        self._say(
            f"{record.frames} frames, {record.last[1]:.1f} s; {record.kept} of {record.given} tokens entered; at the "
            f"end a head held {newest.held:.0f} slots, the cache {self.number(newest.kv_bytes, 'B')}; "
            f"{record.ms / record.frames:.1f} ms a frame"
        )

    def _say(self, line: str) -> None:
        if self.console is not None:
            self.console.print(line, soft_wrap=True)

    def _now(self) -> RenderableType:
        table = Table(*COLUMNS, box=None, pad_edge=False, header_style="dim")
        for column in table.columns:
            column.justify = "right"
        for read in tuple(self.record.reads):
            table.add_row(
                str(read.frame), f"{read.time:.2f}", str(read.given), str(read.kept), f"{read.held:.0f}",
                self.number(read.kv_bytes, "B"), f"{read.ms:.1f}",
            )  # fmt: skip
        if self.typed is None:
            return table
        return Group(table, Text(f"ask ▸ {self.typed.text}"))
