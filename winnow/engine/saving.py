"""The plan beside the weights: how a compressed model is saved, and where its plan is found again."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from winnow.core.errors import WinnowError
from winnow.engine.encoder import plain_method

PLAN_FILE, TENSOR_FILE = "winnow.json", "winnow.safetensors"


class SaveMethod:
    """Stands in for `save_pretrained` of one model: saves as always, and what winnow adds beside it.

    A copy or a pickle of the model gets the plain method back.

    Args:
        handle: of the compressed model; it writes winnow's files.
        owner: whose method it is.
    """

    name = "save_pretrained"

    def __init__(self, handle: Any, owner: nn.Module) -> None:
        self.handle, self.owner = handle, owner
        self.plain = getattr(owner, self.name)
        functools.update_wrapper(self, self.plain)

    def __call__(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("push_to_hub"):
            raise WinnowError(
                "save_pretrained(push_to_hub=True) of a compressed model would upload the weights without their plan; "
                "call model.push_to_hub(repository), which uploads both."
            )
        saved = self.plain(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self.handle.save(save_directory)
        return saved

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return plain_method(memo.get(id(self.owner), self.owner), self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        return plain_method, (self.owner, self.name)


def savers(model: Any, inner: nn.Module) -> Iterator[nn.Module]:
    """The model inside, and the wrappers around it that save in their own way (PEFT's, but not torch.compile's)."""
    yield inner
    while model is not inner:
        if hasattr(type(model), SaveMethod.name):
            yield model
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.get_base_model()


def write(folder: str | Path, plan: str, tensors: dict[str, Tensor]) -> Path:
    """Write a plan, and the tensors of what its methods built, where there are any."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / PLAN_FILE).write_text(json.dumps({"plan": plan}) + "\n", encoding="utf-8")
    if tensors:
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, target / TENSOR_FILE)
    else:
        (target / TENSOR_FILE).unlink(missing_ok=True)  # of another plan that was saved here before
    return target


def read_plan(folder: str | Path) -> str:
    """The plan that a folder holds."""
    try:
        plan = json.loads((Path(folder) / PLAN_FILE).read_text(encoding="utf-8"))["plan"]
    except (OSError, ValueError, KeyError, TypeError):
        plan = None
    if not isinstance(plan, str):
        raise WinnowError(f"{folder} holds no readable {PLAN_FILE}; give a folder that handle.save wrote.")
    return plan


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of what the methods of its plan built."""
    try:
        return load_file(Path(folder) / TENSOR_FILE)
    except (OSError, SafetensorError):
        pass
    raise WinnowError(f"{folder} has no readable {TENSOR_FILE} beside its plan.")
