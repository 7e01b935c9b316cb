"""Devices that are not there: tensors that say they lie on one, and refuse to meet tensors of another.

The numbers are on the CPU. Under `Devices`, every call of torch is checked as a GPU would check it: all tensors of a
call lie on one device, but for scalars, for indices on the CPU, and for calls that copy from one device to another.
`maia` is a name of a device that torch knows and that needs no driver.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

FIRST, SECOND, THIRD = (torch.device("maia", index) for index in range(3))
CPU = torch.device("cpu")

# What may take tensors of two devices: the first is written to, or says where to go.
_COPIES = {"to", "copy_", "type_as"}
_INDEXED = {"__getitem__", "__setitem__", "index_put_", "index_put"}
_HOST_ONLY = {"numpy", "__array__"}


class Placed(Tensor):
    """A tensor that lies on a device."""

    place: torch.device

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Placed:
        return data if isinstance(data, Placed) else place(data, CPU)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(function, args, kwargs or {})


def place(data: Tensor, device: torch.device) -> Placed:
    with torch._C.DisableTorchFunctionSubclass():
        made = data.as_subclass(Placed)
    made.place = device
    return made


class Devices(TorchFunctionMode):
    """While it is on, the devices are there."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(function, args, kwargs or {})


def device_of(tensor: Tensor) -> torch.device:
    return tensor.place if isinstance(tensor, Placed) else CPU


def call(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = getattr(function, "__name__", "")
    if function is torch.device:
        return function(*args, **kwargs)
    if name == "__get__":
        if getattr(function, "__self__", None) is Tensor.device:
            return device_of(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
        if not isinstance(result, Tensor):  # most calls ask for a shape or a dtype
            return result
    leaves = tree_flatten((args, kwargs))[0]
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    if name in _HOST_ONLY and device_of(args[0]) != CPU:
        raise TypeError(f"can't convert a tensor on {device_of(args[0])} to numpy; copy it to the host first")
    wanted = [device for x in leaves if (device := _named(x)) is not None]
    if name == "cpu":
        wanted = [CPU]
    where = _common(name, args, tensors)
    target = wanted[0] if wanted else where
    if name in ("to", "type_as") and len(tensors) > 1:
        target = device_of(tensors[1])
    if wanted:
        args, kwargs = tree_map(lambda x: x if _named(x) is None else CPU, (args, kwargs))
    with torch._C.DisableTorchFunctionSubclass():
        result = function(*args, **kwargs)

    def settle(x: Any) -> Any:
        if not isinstance(x, Tensor) or any(x is given for given in tensors):
            moved = isinstance(x, Tensor) and device_of(x) != target and name in ("to", "cpu", "type_as")
            return place(x.detach().clone(), target) if moved else x
        if tensors and target != where and name in ("to", "cpu", "type_as"):
            with torch._C.DisableTorchFunctionSubclass():
                x = x.detach().clone()  # a copy on another device shares nothing
        return x if target == CPU and type(x) is Tensor else place(x, target)

    return settle(result) if isinstance(result, Tensor) else tree_map(settle, result)


def _named(x: Any) -> torch.device | None:
    """The device that an argument names."""
    if isinstance(x, torch.device):
        return x
    if isinstance(x, str) and (x == "cpu" or x.startswith("maia")):
        return torch.device(x)
    return None


def _common(name: str, args: Any, tensors: list[Tensor]) -> torch.device:
    """Where a call computes; raises where its tensors do not lie together."""
    if not tensors:
        return CPU
    if name in _COPIES:
        return device_of(tensors[0])
    with torch._C.DisableTorchFunctionSubclass():
        heavy = [x for x in tensors if x.dim()] or tensors[:1]
    if name in _INDEXED:
        heavy = [x for x in heavy if x is args[0] or device_of(x) != CPU]
    places = {device_of(x) for x in heavy}
    if len(places) > 1:
        raise RuntimeError(f"{name}: expected all tensors on one device, found {sorted(map(str, places))}")
    return places.pop()
