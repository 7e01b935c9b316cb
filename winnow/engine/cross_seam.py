"""Where something is added to the rows of one layer of a language model: to what its heads give, or behind them."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from winnow.core.cross_read import Place
from winnow.core.errors import UnsupportedError
from winnow.engine.hooks import Hook

OUTPUT, NORM = "o_proj", "post_attention_layernorm"


class Adding(Protocol):
    """One pass through the layers.

    Attributes:
        entered: layer → the states that entered it.
        expected: layer → the states that its second norm must be given, if what is added arrives.
    """

    entered: dict[int, Tensor]
    expected: dict[int, Tensor]

    def added(self, layer: int, place: Place, carried: Tensor) -> Tensor | None:
        """`[B, P, W]` what is added to `carried`; None for nothing."""


class Seam:
    """Hooks on one layer, until they are removed.

    Args:
        attention: of the layer.
        passing: gives the pass that is running; None where nothing is added.

    Raises:
        UnsupportedError: the layer is built otherwise.
    """

    def __init__(
        self, layer: Any, attention: nn.Module, index: int, place: Place, passing: Callable[[], Adding | None]
    ) -> None:
        self.index, self.passing, self.checked = index, passing, False
        owner, name = (attention, OUTPUT) if place == "heads" else (layer, NORM)
        inner = getattr(owner, name, None)
        if not isinstance(inner, nn.Module):
            raise UnsupportedError(
                f"{type(owner).__name__} has no {name}, where rows that read beside the sequence get what they read "
                f"(place={place!r}); use a method that acts at projected."
            )
        if place == "heads":
            self.handles = [inner.register_forward_pre_hook(Hook(self._heads))]
        else:
            self.handles = [
                layer.register_forward_pre_hook(Hook(self._enter), with_kwargs=True),
                attention.register_forward_hook(Hook(self._attended)),
                inner.register_forward_pre_hook(Hook(self._arrived)),
            ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _heads(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        adding = self.passing()
        added = None if adding is None else adding.added(self.index, "heads", args[0])
        return None if added is None else (args[0] + added, *args[1:])

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        adding = self.passing()
        if adding is not None:
            adding.entered[self.index] = args[0] if args else kwargs["hidden_states"]

    def _attended(self, module: nn.Module, args: Any, output: Any) -> Any:
        adding = self.passing()
        if adding is None:
            return None
        given = output[0] if isinstance(output, tuple) else output
        before = adding.entered.pop(self.index).to(given.device)  # the layer before may be on another
        added = adding.added(self.index, "residual", before + given)
        if added is None:
            return None
        adding.expected[self.index] = before + (given + added)
        return (given + added, *output[1:]) if isinstance(output, tuple) else given + added

    def _arrived(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Once: a layer that scales or norms what its attention gives would change what is added as well."""
        adding = self.passing()
        expected = None if adding is None else adding.expected.pop(self.index, None)
        if expected is None or self.checked:
            return
        near: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-3, "equal_nan": True}
        if expected.shape != args[0].shape or not torch.allclose(args[0].to(expected), expected, **near):
            raise UnsupportedError(
                f"layer {self.index} does not add what its attention gives to its states as it is, so nothing can be "
                "added behind it; use a method that reads at the heads, or none that reads beside the sequence."
            )
        self.checked = True
