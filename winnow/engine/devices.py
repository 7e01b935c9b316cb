"""Where a module computes, also where accelerate brings its weights from elsewhere for each call."""

import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module computes; the CPU where nothing says so.

    Weights that accelerate has offloaded are on `meta` between calls; its hooks know where they will be.
    """
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for own in getattr(hook, "hooks", (hook,)):
            place = getattr(own, "execution_device", None)
            if place is not None:
                return torch.device(place)
    found = (p.device for p in module.parameters() if p.device.type != "meta")
    return next(found, torch.device("cpu"))
