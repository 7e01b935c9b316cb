"""What steps record of a request, added up over steps."""

from typing import Any

from torch import Tensor


def add_notes(total: dict[str, Any], new: dict[str, Any]) -> None:
    """Take what a step recorded: counts add up, anything else replaces what was there."""
    for name, value in new.items():
        known = total.get(name)
        adds = known is not None and isinstance(value, int | Tensor) and not isinstance(value, bool)
        total[name] = known + value if adds else value
