"""winnow makes a vision-language model read fewer tokens and keep its answer, and proves both.

    import winnow
    handle = winnow.compress(model, "hiprune:keep=64")      # or winnow.HiPrune(keep=64)
    model.generate(**inputs)          # the model that you already have, unchanged
    print(handle.last)                # what was kept, and what it cost
    handle.detach()

Importing winnow patches nothing and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from winnow._version import __version__
from winnow.core.errors import UnsupportedError, WinnowError, WinnowWarning

if TYPE_CHECKING:
    from winnow.core.budget import Budget
    from winnow.core.method import Method
    from winnow.core.plan import Plan
    from winnow.core.reduction import Reduction
    from winnow.core.registry import entries as list_methods
    from winnow.core.registry import register
    from winnow.core.view import View
    from winnow.engine.calibrate import calibrate
    from winnow.engine.compress import compress
    from winnow.engine.handle import Handle, handle_of
    from winnow.engine.load import load
    from winnow.engine.prepare import prepare, prepare_many
    from winnow.engine.prepared import Prepared
    from winnow.engine.stream import Session, stream
    from winnow.methods.divprune import DivPrune
    from winnow.methods.fastervlm import FasterVLM
    from winnow.methods.fastv import FastV
    from winnow.methods.hiprune import HiPrune
    from winnow.methods.pyramiddrop import PyramidDrop
    from winnow.methods.todre import ToDRE
    from winnow.methods.visionzip import VisionZip
    from winnow.methods.vtc_cls import VtcCls
    from winnow.models.families import register_family
    from winnow.tuning.result import Tuned
    from winnow.tuning.search import tune
    from winnow.video import Sampling, Video, VideoLimits, open_video
    from winnow.video.thumbnail import with_thumbnail

    plan = Plan.of

_LAZY = {
    "Budget": "winnow.core.budget:Budget",
    "Handle": "winnow.engine.handle:Handle",
    "Method": "winnow.core.method:Method",
    "Plan": "winnow.core.plan:Plan",
    "Prepared": "winnow.engine.prepared:Prepared",
    "Reduction": "winnow.core.reduction:Reduction",
    "Sampling": "winnow.video:Sampling",
    "Session": "winnow.engine.stream:Session",
    "Tuned": "winnow.tuning.result:Tuned",
    "Video": "winnow.video:Video",
    "VideoLimits": "winnow.video:VideoLimits",
    "View": "winnow.core.view:View",
    "calibrate": "winnow.engine.calibrate:calibrate",
    "compress": "winnow.engine.compress:compress",
    "handle_of": "winnow.engine.handle:handle_of",
    "list_methods": "winnow.core.registry:entries",
    "load": "winnow.engine.load:load",
    "open_video": "winnow.video:open_video",
    "plan": "winnow.core.plan:Plan.of",
    "prepare": "winnow.engine.prepare:prepare",
    "prepare_many": "winnow.engine.prepare:prepare_many",
    "register": "winnow.core.registry:register",
    "register_family": "winnow.models.families:register_family",
    "stream": "winnow.engine.stream:stream",
    "tune": "winnow.tuning.search:tune",
    "with_thumbnail": "winnow.video.thumbnail:with_thumbnail",
}
_METHODS = [
    "DivPrune",
    "FastV",
    "FasterVLM",
    "HiPrune",
    "PyramidDrop",
    "ToDRE",
    "VisionZip",
    "VtcCls",
]

__all__ = [
    "Budget",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "Handle",
    "HiPrune",
    "Method",
    "Plan",
    "Prepared",
    "PyramidDrop",
    "Reduction",
    "Sampling",
    "Session",
    "ToDRE",
    "Tuned",
    "UnsupportedError",
    "Video",
    "VideoLimits",
    "View",
    "VisionZip",
    "VtcCls",
    "WinnowError",
    "WinnowWarning",
    "__version__",
    "calibrate",
    "compress",
    "handle_of",
    "list_methods",
    "load",
    "open_video",
    "plan",
    "prepare",
    "prepare_many",
    "register",
    "register_family",
    "stream",
    "tune",
    "with_thumbnail",
]


def __getattr__(name: str) -> Any:
    if name in _METHODS:
        from winnow.core.registry import entries, method_class

        slug = next(entry.slug for entry in entries() if entry.name == name)
        return method_class(slug)
    if name not in _LAZY:
        raise AttributeError(f"module 'winnow' has no attribute {name!r}")
    module, _, path = _LAZY[name].partition(":")
    value: Any = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
