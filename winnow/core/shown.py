"""Numbers as people read them."""

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits with a decimal prefix: 12.3 GFLOP."""
    if value is None:
        return "–"
    scale, prefix = next(((s, p) for s, p in UNITS if abs(value) >= s), (1, ""))
    shown = value / scale
    digits = 0 if prefix == "" and float(value).is_integer() else max(0, 2 - len(str(int(abs(shown)))) + 1)
    return f"{shown:.{digits}f} {prefix}{unit}".strip()
