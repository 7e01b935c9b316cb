"""TowerHooks: what passes the vision tower and the projector of a compressed model, shown to signals and to steps."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from winnow.core.errors import UnsupportedError
from winnow.core.signal import Site
from winnow.engine import encoder
from winnow.engine.bound_model import BoundModel
from winnow.engine.bound_plan import BoundPlan
from winnow.engine.hooks import Hook
from winnow.engine.request import Request
from winnow.engine.tower_pass import TowerPass
from winnow.models.family import seam
from winnow.signals.tap import scaling_of
from winnow.signals.vision import HiddenStates, TowerAttention


class TowerHooks:
    """The hooks on the tower's side.

    Args:
        bound: the model.
        mine: the request that is running in this context on this model, or None.
    """

    def __init__(self, bound: BoundModel, mine: Callable[[], Request | None]) -> None:
        self.bound, self.mine = bound, mine
        self._blocks_hooked = False
        self._halves_hooked: set[int] = set()

    def install(self) -> list[Any]:
        """The hooks that every plan needs; their handles."""
        made, bound = [], self.bound
        if bound.tower is not None:
            made.append(bound.tower.register_forward_hook(Hook(self.leave_tower)))
        if bound.projector is not None:
            made.append(bound.projector.register_forward_pre_hook(Hook(self.enter_projector)))
            made.append(bound.projector.register_forward_hook(Hook(self.leave_projector)))
        return made

    def forget(self) -> None:
        """All hooks are removed."""
        self._blocks_hooked = False
        self._halves_hooked.clear()

    def hook_blocks(self, plan: BoundPlan) -> list[Any]:
        """The hooks of steps at blocks that are not there yet; their handles."""
        made, bound = [], self.bound
        if not self._blocks_hooked:
            self._blocks_hooked = True
            for index, block in enumerate(bound.blocks):
                # First in line: other hooks see what the block is given, and what is left of its output.
                enter = Hook(functools.partial(self.enter_block, index))
                made.append(block.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            for path in bound.family.side_mergers:
                for module in seam(bound.base, path, bound.model):
                    made.append(module.register_forward_hook(Hook(self.leave_side_merger), prepend=True))
        for index in set(plan.halves) - self._halves_hooked:
            self._halves_hooked.add(index)
            block = bound.blocks[index]
            norm, mlp = (seam(block, name, bound.model) for name in bound.family.halves)
            before = Hook(functools.partial(self.enter_half, index))
            made.append(norm.register_forward_pre_hook(before, prepend=True))
            for module, leave in ((mlp, self.leave_mlp), (block, self.leave_block)):
                made.append(module.register_forward_hook(Hook(functools.partial(leave, index)), prepend=True))
        return made

    def _pass(self) -> TowerPass | None:
        request = self.mine()
        return None if request is None or request.encoding is None else request.encoding.tower

    def enter_block(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a vision block. Hidden states stay positional: transformers records the first argument."""
        request = self.mine()
        if request is None or request.encoding is None or request.plan.first_block is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        rest = kwargs if args else {k: v for k, v in kwargs.items() if k != "hidden_states"}
        with request.clock.phase("select"):
            if request.encoding.tower is None:
                request.encoding.tower = TowerPass(self.bound, request.plan, request.encoding, hidden, request.train)
            hidden, rest = request.encoding.tower.enter(index, hidden, rest)
        return (hidden, *args[1:]), rest

    def enter_half(self, index: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Before the norm that leads to a block's MLP."""
        request, tower = self.mine(), self._pass()
        if request is None or tower is None or index not in request.plan.halves:
            return None
        with request.clock.phase("select"):
            return (tower.enter_half(index, args[0]), *args[1:])

    def leave_mlp(self, index: int, module: nn.Module, args: Any, output: Tensor) -> Any:
        tower = self._pass()
        return None if tower is None or index not in tower.plan.halves else tower.leave_mlp(output)

    def leave_block(self, index: int, module: nn.Module, args: Any, output: Any) -> Any:
        tower = self._pass()
        if tower is None or index not in tower.plan.halves:
            return None
        if isinstance(output, tuple):
            return (tower.leave(index, output[0]), *output[1:])
        return tower.leave(index, output)

    def leave_side_merger(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        tower = self._pass()
        return None if tower is None else tower.expanded(output)

    def see_attention(self, site: Site, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor | None:
        """A tapped block shows its attention; what it returns is added to the logits."""
        request, tower = self.mine(), self._pass()
        if tower is not None:
            return tower.attend(site.index, module, q, k, v)
        if request is not None:
            encoder.read_attention(request, site, module, q, k, v)
        return None

    def see_sound(self, site: Site, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> None:
        """A tapped layer of the encoder of sounds shows its attention, of one stretch at a time."""
        if (request := self.mine()) is not None:
            encoder.read(request, site, TowerAttention(q, k, v, scaling_of(module, q), 0))

    def see_block(self, site: Site, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        request, tower = self.mine(), self._pass()
        if request is not None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            if tower is not None:
                tower.watch(site.index, before.to(after.device), after)
                return
            prefix, text_encoder = int(self.bound.info.has_cls), request.plan.text_encoder
            encoder.read(request, site, HiddenStates(before.to(after.device), after, prefix, text_encoder))

    def leave_tower(self, module: nn.Module, args: Any, output: Any) -> None:
        request = self.mine()
        if request is not None and request.encoding is not None and request.plan.features:
            request.encoding.tower_output = output

    def enter_projector(self, module: nn.Module, args: Any) -> Any:
        request = self.mine()
        if request is None or request.encoding is None:
            return None
        rows = None
        if request.plan.acts_in_tower:
            rows = encoder.enter_projector(request, args[0])
        request.clock.start("projector")
        return None if rows is None else (rows, *args[1:])

    def leave_projector(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        request = self.mine()
        if request is None or request.encoding is None:
            return None
        request.clock.stop()
        site = Site("projector", 0, "hidden")
        if request.encoding.reduced:
            if request.plan.listeners.get(site):
                raise UnsupportedError("a signal of the projector cannot be read where a step reduces in the tower.")
            return encoder.take_projected(request, output)
        if request.plan.listeners.get(site):
            before, after = (x[None] if x.ndim == 2 else x for x in (args[0], output))
            encoder.read(request, site, HiddenStates(before.to(after.device), after))
        return None
