"""winnow makes a vision-language model read fewer tokens and keep its answer, and proves both.

    import winnow
    handle = winnow.compress(model, "fastervlm:keep=64")
    model.generate(**inputs)          # the model that you already have, unchanged
    print(handle.last)                # what was kept, and what it cost
    handle.detach()

Importing winnow patches nothing and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from winnow._version import __version__
from winnow.core.errors import UnsupportedError, WinnowError

if TYPE_CHECKING:
    from winnow.core.budget import Budget
    from winnow.core.method import Method
    from winnow.core.plan import Plan
    from winnow.core.reduction import Reduction
    from winnow.core.registry import entries as list_methods
    from winnow.core.registry import register
    from winnow.core.view import View
    from winnow.engine.compress import compress
    from winnow.engine.handle import Handle
    from winnow.models.load import load

    plan = Plan.of

_LAZY = {
    "Budget": "winnow.core.budget:Budget",
    "Handle": "winnow.engine.handle:Handle",
    "Method": "winnow.core.method:Method",
    "Plan": "winnow.core.plan:Plan",
    "Reduction": "winnow.core.reduction:Reduction",
    "View": "winnow.core.view:View",
    "compress": "winnow.engine.compress:compress",
    "list_methods": "winnow.core.registry:entries",
    "load": "winnow.models.load:load",
    "plan": "winnow.core.plan:Plan.of",
    "register": "winnow.core.registry:register",
}

__all__ = [
    "Budget",
    "Handle",
    "Method",
    "Plan",
    "Reduction",
    "UnsupportedError",
    "View",
    "WinnowError",
    "__version__",
    "compress",
    "list_methods",
    "load",
    "plan",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'winnow' has no attribute {name!r}")
    module, _, path = _LAZY[name].partition(":")
    value: Any = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value
