"""The handle that the sessions of one model share: it is attached for them, and detached with the last of them."""

import threading
import weakref
from typing import Any

from winnow.core.plan import FULL
from winnow.engine.attach import attach
from winnow.engine.handle import Handle, handle_of

_sessions: "weakref.WeakKeyDictionary[Handle, int]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def shared_handle(model: Any) -> Handle:
    """The handle of a model, attached for sessions alone where it is not compressed."""
    with _lock:
        handle = handle_of(model)
        if handle is None:
            handle = attach(model, FULL)
            _sessions[handle] = 0
        if handle in _sessions:
            _sessions[handle] += 1
        return handle


def release(handle: Handle) -> None:
    with _lock:
        if handle not in _sessions:  # it belongs to the user
            return
        _sessions[handle] -= 1
        if _sessions[handle] <= 0:
            del _sessions[handle]
            handle.detach()
