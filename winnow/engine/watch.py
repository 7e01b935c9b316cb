"""LayerWatch: shows what goes into an LM layer and its two modules, and what comes out."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from winnow.core.errors import UnsupportedError
from winnow.core.signal import Site
from winnow.engine.devices import device_of
from winnow.engine.hooks import Hook
from winnow.signals.language import LayerModules

_seen: ContextVar[dict[str, tuple[Tensor, Tensor]] | None] = ContextVar("winnow_layer", default=None)


def modules_seen() -> dict[str, tuple[Tensor, Tensor]] | None:
    """Inputs and outputs of the modules (`attention`, `mlp`) of the layer that runs; None where nobody looks at it."""
    return _seen.get()


class LayerWatch:
    """Hooks on a layer, its attention and its MLP, until it is removed.

    Args:
        running: the pass through the LM that is running in this context, or None.
        index: of the layer.
        norm: the norm behind the last layer; None where there is none that is known.
    """

    def __init__(self, layer: nn.Module, running: Callable[[], Any], index: int, norm: nn.Module | None) -> None:
        self.running, self.index = running, index
        self.norm = None if norm is None else lambda x: norm(x.to(device_of(norm))).to(x.device)
        parts = {"attention": getattr(layer, "self_attn", None), "mlp": getattr(layer, "mlp", None)}
        if None in parts.values():
            raise UnsupportedError(
                f"{type(layer).__name__} has no self_attn or no mlp, so what they do cannot be seen."
            )
        self.handles = [layer.register_forward_pre_hook(Hook(self._start))]
        for name, part in parts.items():
            hook = Hook(lambda module, args, kwargs, output, name=name: self._part(name, args, kwargs, output))
            self.handles.append(part.register_forward_hook(hook, with_kwargs=True))  # type: ignore[union-attr]
        self.handles.append(layer.register_forward_hook(Hook(self._end), with_kwargs=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _start(self, module: nn.Module, args: Any) -> None:
        lm = self.running()
        # The hooks stay from plan to plan: other plans do not look.
        looks = lm is not None and lm.items and Site("lm", self.index, "hidden") in lm.plan.listeners
        _seen.set({} if looks else None)

    def _part(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        seen = _seen.get()
        if seen is not None:
            seen[name] = (_hidden(args, kwargs), output[0] if isinstance(output, tuple) else output)

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen, lm = _seen.get(), self.running()
        _seen.set(None)
        if lm is not None and seen is not None:
            after = output[0] if isinstance(output, tuple) else output
            packing = lm.tokens.packing.to(after.device)
            before = _hidden(args, kwargs).to(after.device)  # the layer before may be on another
            parts = before, after, seen["attention"], seen["mlp"], packing.mask, packing, lm.spans(after.device)
            lm.hidden(self.index, LayerModules(*parts, self.norm))


def _hidden(args: Any, kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]
