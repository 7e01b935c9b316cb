"""Attaching a plan to a model: hooks on the model's own seams, and nothing global."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.plan import Plan
from winnow.engine.clock import Clock
from winnow.engine.compiled import Compiled
from winnow.engine.current import chunk_now, encoding_now
from winnow.engine.encode import EncoderDoor, hear_tower, run_features, take_projected
from winnow.engine.forward import Forward, callers
from winnow.models.family import Family, seam
from winnow.signals.tap import Tap

_attached: dict[int, Engine] = {}
_attached_lock = threading.Lock()


class Hook:
    """A hook that lives in this process only: copies and pickles of a compressed model are plain models."""

    def __init__(self, call: Callable[..., Any] | None = None) -> None:
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if self.call is None else self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, ()


class Engine:
    """A model with a plan attached. State of requests lives on caches and in context variables, never here."""

    def __init__(self, model: nn.Module, family: Family, plan: Plan, suffix: tuple[int, ...] = ()) -> None:
        self.model, self.family, self.suffix = model, family, suffix
        self.base: nn.Module = model.base_model  # type: ignore[assignment]
        self.lm: Any = model.get_decoder()  # type: ignore[operator]
        self.info = family.info(model)
        self.clock = Clock()
        self.attached = False
        self.last: Any = None
        self.last_here: ContextVar[Any] = ContextVar("winnow_last", default=None)
        self.override: ContextVar[Compiled | None] = ContextVar("winnow_override", default=None)
        self.spans: ContextVar[Any] = ContextVar("winnow_spans", default=None)
        self.running: dict[int, threading.Thread] = {}
        self._lock = threading.RLock()
        self._compiled: dict[tuple[Any, ...], Compiled] = {}
        self._removers: list[Callable[[], None]] = []
        self._tapped: set[tuple[str, int]] = set()
        self._check_model()
        self.default = self.compiled(plan)
        self.forward = Forward(self)

    def _check_model(self) -> None:
        for path in ("layers", "norm", "rotary_emb"):
            seam(self.lm, path, self.model)
        for path in (self.family.blocks, self.family.projector):
            seam(self.base, path, self.model)
        other = set(getattr(self.lm.config, "layer_types", None) or ()) - {"full_attention"}
        if other or getattr(self.lm.config, "sliding_window", None):
            raise UnsupportedError(
                f"{type(self.model).__name__} has sliding-window or other special attention "
                f"({', '.join(sorted(other)) or 'sliding_window'}); this version compresses full attention only."
            )

    def compiled(self, plan: Plan) -> Compiled:
        """The plan, checked for this model, with its taps in place."""
        with self._lock:
            # Two classes may share a slug and settings (a variant that is tried): the key alone does not tell.
            key = (plan.key, *map(type, plan.methods))
            if key not in self._compiled:
                self._compiled[key] = Compiled.of(plan, self.info)
            made = self._compiled[key]
            if self.attached:
                self._tap(made)
            return made

    def active(self) -> Compiled:
        """The plan of this context: its override, else the model-wide one."""
        return self.override.get() or self.default

    def attach(self) -> None:
        with _attached_lock:
            if id(self.model) in _attached:
                raise WinnowError(
                    "this model is compressed already: call detach() on its handle first, or use handle.using(plan)."
                )
            _attached[id(self.model)] = self
        self.attached = True
        try:
            self._install()
            self._tap(self.default)
        except BaseException:
            self._remove()
            raise

    def detach(self) -> None:
        """Put everything back. A second call does nothing."""
        if not self.attached:
            return
        busy = [thread.name for i, thread in list(self.running.items()) if self._inside(i)]
        if busy:
            raise WinnowError(f"cannot detach: a request is running in {', '.join(busy)}; wait for it, then detach.")
        self._remove()

    def _inside(self, ident: int) -> bool:
        """Whether another thread is in the model's forward, or in its encoder, at this moment.

        `running` alone cannot tell: no hook runs after a KeyboardInterrupt, so a thread may have left without notice.
        """
        for frame in callers(None if ident == threading.get_ident() else sys._current_frames().get(ident)):
            if frame.f_code.co_name in ("forward", "__call__"):
                caller = frame.f_locals.get("self")
                if caller is self.base or (isinstance(caller, EncoderDoor) and caller.engine is self):
                    return True
        return False

    def _remove(self) -> None:
        self.attached = False
        while self._removers:
            self._removers.pop()()
        self._tapped.clear()
        with _attached_lock:
            _attached.pop(id(self.model), None)

    def _install(self) -> None:
        for name, modality, _ in self.family.encoders:
            setattr(self.base, name, EncoderDoor(self, self.base, name, modality))
            self._removers.append(functools.partial(self.base.__dict__.pop, name, None))
        forward = self.forward
        self._hook(self.base.register_forward_pre_hook(Hook(forward.base_enter), with_kwargs=True))
        self._hook(self.base.register_forward_hook(Hook(forward.base_leave), with_kwargs=True, always_call=True))
        self._hook(self.lm.register_forward_pre_hook(Hook(forward.lm_enter), with_kwargs=True))
        # First in line, so that hooks that record outputs see what the caller will see.
        self._hook(self.lm.register_forward_hook(Hook(forward.lm_leave), with_kwargs=True, prepend=True))
        for index, layer in enumerate(self.lm.layers):
            enter = functools.partial(forward.layer_enter, index)
            self._hook(layer.register_forward_pre_hook(Hook(enter), with_kwargs=True))
        tower, projector = (seam(self.base, path, self.model) for path in (self.family.tower, self.family.projector))
        self._hook(tower.register_forward_hook(Hook(self._tower_leave)))
        self._hook(projector.register_forward_pre_hook(Hook(self._projector_enter)))
        self._hook(projector.register_forward_hook(Hook(self._projector_leave)))

    def _hook(self, handle: Any) -> None:
        self._removers.append(handle.remove)

    def _tap(self, compiled: Compiled) -> None:
        """Listen to the attention modules that a plan needs; taps stay until detach."""
        blocks = seam(self.base, self.family.blocks, self.model)
        for block in compiled.vision:
            self._tap_one("vision", block, getattr(blocks[block], self.family.attention), self._hear_vision)
        for layer in {*compiled.lm, *compiled.probed}:
            self._tap_one("lm", layer, self.lm.layers[layer].self_attn, self._hear_lm)

    def _tap_one(self, side: str, index: int, module: nn.Module, listener: Callable[..., None]) -> None:
        if (side, index) not in self._tapped:
            self._tapped.add((side, index))
            self._removers.append(Tap(module, functools.partial(listener, index)).remove)

    def _hear_vision(self, block: int, module: nn.Module, q: Tensor, k: Tensor) -> None:
        encoding = encoding_now.get()
        if encoding is not None and block in encoding.plan.vision:
            with self.clock.phase("select"):
                hear_tower(encoding, encoding.plan.vision[block], self.info.has_cls, module, q, k)

    def _hear_lm(self, layer: int, module: nn.Module, q: Tensor, k: Tensor) -> None:
        chunk = chunk_now.get()
        if chunk is not None and chunk.engine is self and self.forward.inside():
            chunk.hear(layer, module, q, k)

    def _tower_leave(self, module: nn.Module, args: Any, output: Any) -> None:
        encoding = encoding_now.get()
        if encoding is not None and encoding.plan.features:
            layer = encoding.inputs.get("vision_feature_layer")
            if layer is None:
                layer = self.model.config.vision_feature_layer  # type: ignore[union-attr]
            encoding.features = output.hidden_states[layer]

    def _projector_enter(self, module: nn.Module, args: Any) -> Any:
        encoding = encoding_now.get()
        if encoding is None:
            return None
        rows = None
        if encoding.plan.features:
            encoding.expected = args[0].shape[:2]
            rows = run_features(self, encoding)
        self.clock.start("projector")
        return None if rows is None else (rows, *args[1:])

    def _projector_leave(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        encoding = encoding_now.get()
        if encoding is None:
            return None
        self.clock.stop()
        return take_projected(encoding, output)
