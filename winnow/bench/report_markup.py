"""HTML that is escaped unless it says otherwise: answers, file names and questions may contain anything."""

from __future__ import annotations

import html
from collections.abc import Iterable

VOID = {"br", "hr", "img", "input", "link", "meta"}


class Markup(str):
    """Text that is HTML already, and is not escaped again."""

    __slots__ = ()

    def __add__(self, other: str) -> Markup:
        return Markup(str.__add__(self, escaped(other)))


def escaped(child: object) -> Markup:
    """A child of an element: markup as it is, anything else as text. None is nothing."""
    if child is None:
        return Markup("")
    if isinstance(child, Markup):
        return child
    return Markup(html.escape(str(child), quote=True))


def join(children: Iterable[object], between: str = "") -> Markup:
    """Children one after the other."""
    return Markup(between.join(escaped(child) for child in children))


def el(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element: `el("td", "a < b", class_="wide", data_v=3)` is `<td class="wide" data-v="3">a &lt; b</td>`.

    Attributes that are None or False are left out; True stands alone.
    """
    shown = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        shown.append(f" {key}" if value is True else f' {key}="{escaped(value)}"')
    head = f"<{name}{''.join(shown)}>"
    return Markup(head if name in VOID else f"{head}{join(children)}</{name}>")
