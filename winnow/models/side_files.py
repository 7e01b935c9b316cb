"""What may stand beside a checkpoint's weights: the plan of a compressed model, and the adapter of PEFT."""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import cached_file

from winnow.core.errors import WinnowError
from winnow.models.attempt import attempt

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PLAN_FILES = ("winnow.json", "winnow.safetensors")
PROCESSORS = ("processor_config.json", "preprocessor_config.json")


def found(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a folder, or of a repository of the Hub (in the local cache, if it is offline); None: it has none."""
    folder = Path(name)
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    at = attempt(
        f"There is no checkpoint {name}",
        lambda: cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        ),
    )
    return None if at is None else Path(at)


def side_folder(name: str, revision: str | None) -> Path | None:
    """Where the plan of a saved model, and the tensors of its methods, are on this machine."""
    plan, _ = (found(name, file, revision) for file in PLAN_FILES)
    return None if plan is None else plan.parent


@dataclass(frozen=True)
class Adapter:
    """An adapter that PEFT saved.

    Attributes:
        name, at: of the adapter: the Hub's id or the folder, and its revision.
        base, revision: of the model that it is for.
        has_processor: whether a processor was saved with it.
    """

    name: str
    at: str | None
    base: str
    revision: str | None
    has_processor: bool

    def attach(self, built: nn.Module) -> Any:
        """The model under the adapter."""
        if find_spec("peft") is None:
            raise WinnowError(f"{self.name} is an adapter of PEFT, which is not installed: pip install peft")
        from peft import PeftModel

        return attempt(
            f"The adapter {self.name} could not be put on {self.base}",
            lambda: PeftModel.from_pretrained(built, self.name, revision=self.at),
            "use one that was trained for this model, saved by save_pretrained.",
        )


def adapter_of(name: str, revision: str | None) -> Adapter | None:
    """The adapter that a folder or a repository holds. One that is pickled, or does not say its model, is refused."""
    path = found(name, ADAPTER, revision)
    if path is None:
        return None
    if found(name, ADAPTER_WEIGHTS, revision) is None:
        raise WinnowError(
            f"The adapter {name} has no {ADAPTER_WEIGHTS}: pickled weights run whatever code they hold, and winnow "
            "loads safetensors only. Save it again with save_pretrained where you trust it."
        )
    if found(name, "config.json", revision) is not None:
        return None  # a model and its adapter in one place: transformers puts them together
    settings = attempt(f"{path} could not be read", lambda: json.loads(path.read_text(encoding="utf-8")))
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not isinstance(base, str) or not base:
        raise WinnowError(f"The adapter {name} does not say for which model it is (base_model_name_or_path in {path}).")
    processor = any(found(name, file, revision) for file in PROCESSORS)
    return Adapter(name, revision, base, settings.get("revision"), processor)
