"""Twins: a second set of module objects around the weights of a model, so that hooks on it never touch the model."""

from typing import Any

from torch import nn


def twin(model: nn.Module) -> Any:
    """The model again, with the same classes, configurations and weights, and with hooks and attributes of its own.

    What was compiled in place, or wrapped by `torch.compile`, is plain in the twin. It is made anew for each use, which
    takes milliseconds, so that it never holds weights that the model has exchanged since.
    """
    return _twin(model, {})


def _twin(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    while "_orig_mod" in module._modules:  # what torch.compile has wrapped
        module = module._modules["_orig_mod"]  # type: ignore[assignment]
    if id(module) in made:
        return made[id(module)]
    new: nn.Module = object.__new__(type(module))
    made[id(module)] = new
    # Weights, buffers and hooks lie in private tables: the tables are copied, what they hold is shared.
    tables = {k: v.copy() for k, v in module.__dict__.items() if k.startswith("_") and isinstance(v, dict | set)}
    new.__dict__.update(module.__dict__ | tables)
    new.__dict__.pop("_compiled_call_impl", None)
    new.__dict__["_modules"] = {
        name: child if child is None else _twin(child, made) for name, child in module._modules.items()
    }
    return new
