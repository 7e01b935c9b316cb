"""A matplotlib figure as SVG that belongs to the page around it: its colours, its type, and its curves by name."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from xml.etree import ElementTree

from winnow.bench.charts import LIGHT, Curve, Figure, drawing

NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # nor links to what describes such words

SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
INK = {color: f"var(--{ink})" for ink, color in LIGHT.items()}


def svg(figure: Figure, prefix: str, title: str = "", curves: Sequence[Curve] = (), class_: str = "chart") -> str:
    """Inline SVG in the colours and the type of the page around it.

    Args:
        prefix: of ids inside the drawing, which nothing else on the page may have.
        title: for readers who cannot see it.
        curves: those that were drawn: what belongs to one is a group with its name in `data-curve`.
    """
    buffer = io.StringIO()
    with drawing():
        figure.savefig(buffer, format="svg", metadata=NO_METADATA)
    ElementTree.register_namespace("", SVG[1:-1])
    ElementTree.register_namespace("xlink", XLINK[1:-1])
    root = ElementTree.fromstring(buffer.getvalue())  # noqa: S314 - matplotlib has written it just now
    size = root.get("viewBox", "")
    root.attrib = {"class": class_, "viewBox": size, "role": "img"} if title else {
        "class": class_, "viewBox": size, "aria-hidden": "true"}  # fmt: skip
    used = {href[1:] for element in root.iter() if (href := element.get(f"{XLINK}href"))}
    names = {name: f"{prefix}-{i}" for i, name in enumerate(sorted(used))}
    root[:] = [part for child in root for part in _cleaned(child, names, curves)]
    if title:
        root.insert(0, _element("title", title))
    return ElementTree.tostring(root, encoding="unicode")


def _cleaned(
    element: ElementTree.Element, names: dict[str, str], curves: Sequence[Curve]
) -> Iterator[ElementTree.Element]:
    """An element for the page, or its children alone: a group or a list of definitions that says nothing goes.

    Ids become the page's only ones, curves have their names, colours are variables, and the type is the page's.
    """
    name, ident = element.tag.removeprefix(SVG), element.attrib.pop("id", "")
    if name in ("style", "clipPath") or ident == "paper":
        return  # a style here would be the whole page's, and nothing is drawn outside its axes
    element[:] = [part for child in element for part in _cleaned(child, names, curves)]
    for unused in ("clip-path", "transform") if "(-0 " in element.get("transform", "") else ("clip-path",):
        element.attrib.pop(unused, None)
    if ident in names:
        element.set("id", names[ident])
    if href := element.get(f"{XLINK}href"):
        element.set(f"{XLINK}href", f"#{names[href[1:]]}")
    if ident.startswith("curve ") and curves:
        curve, *mark = (curves[int(ident.split()[1])], *ident.split()[2:])
        element.set("data-curve", curve.name)
        if mark and curve.marks[int(mark[0])].note:
            element.insert(0, _element("title", curve.marks[int(mark[0])].note))
    if style := ";".join(filter(None, map(_style, element.attrib.pop("style", "").split(";")))):
        element.set("style", style)
    for attribute in ("d", "x", "y", "transform"):
        if value := element.get(attribute):
            element.set(
                attribute, re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.4g}", value).replace("  ", " ")
            )
    element.tail = None
    if name in ("g", "defs"):
        element.text = None
    if name == "g" and not element.attrib:
        yield from element
    elif name != "defs" or len(element):
        yield element


def _style(text: str) -> str:
    """One declaration as the page wants it."""
    name, _, value = text.strip().partition(": ")
    if name != "font":
        return f"{name}:{INK.get(value, value)}" if name not in ("", "font-family", "font-style") else ""
    bold = "font-weight:600;" if "bold" in value or "700" in value else ""
    return bold + "font-size:" + next(part for part in value.split() if part.endswith("px"))


def _element(name: str, text: str) -> ElementTree.Element:
    made = ElementTree.Element(f"{SVG}{name}")
    made.text = text
    return made
