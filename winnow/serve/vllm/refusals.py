"""What is refused when a server starts, each with a clear text."""

from __future__ import annotations

import re
from typing import Any

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.engine.bound_plan import BoundPlan
from winnow.serve.vllm.settings import KEY, Settings

TESTED = ("0.32",)
"""The releases of vLLM on which the tests pass."""


class NotSupported:
    """Mixed into classes that have no adapter: they start only without winnow."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        if Settings.of(vllm_config.model_config.hf_config) is not None:
            raise UnsupportedError(
                f"winnow has no adapter for {type(self).__mro__[2].__name__} under vLLM; docs/vllm.md lists the "
                f"classes that it has. Leave {KEY!r} out of --hf-overrides to serve the model as it is."
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]


def check_version() -> None:
    """Refuse a version of vLLM that the tests do not cover."""
    import vllm

    check_release(vllm.__version__)


def check_release(version: str) -> None:
    """The same for a version that somebody names."""
    if ".".join(re.findall(r"\d+", version)[:2]) not in TESTED:
        raise UnsupportedError(
            f"winnow was tested with vLLM {', '.join(TESTED)}, and this is {version}; it uses seams that vLLM may "
            "change. Install a tested version."
        )


def check_engine(vllm_config: Any, plans: list[BoundPlan]) -> None:
    """Refuse settings of the engine under which a plan would be ignored or wrong."""
    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mm_encoder:
        raise UnsupportedError(
            "cudagraph_mm_encoder replays the vision encoder past winnow, so that nothing would be dropped; switch it "
            "off in --compilation-config."
        )
    lora = vllm_config.lora_config
    if lora is not None and lora.enable_tower_connector_lora:
        raise UnsupportedError(
            "LoRA of the tower or the connector counts patches from the placeholders that are left; leave "
            "--enable-tower-connector-lora out."
        )
    multimodal = vllm_config.model_config.multimodal_config
    if KEY in (multimodal.mm_processor_kwargs or {}):
        raise WinnowError(
            f"{KEY} in --mm-processor-kwargs is not read; the operator's settings go into --hf-overrides, where all "
            "processes of vLLM see them."
        )
    looking = [str(plan.plan) for plan in plans if any(site.stack == "vision" for site in plan.listeners)]
    if not looking:
        return
    if multimodal.mm_encoder_tp_mode == "data":
        raise UnsupportedError(
            f"{looking[0]} looks inside the vision tower, and mm_encoder_tp_mode='data' shows each rank other "
            "pictures; use the mode 'weights', or a method that looks at the projected tokens alone."
        )
    if (ranks := vllm_config.parallel_config.tensor_parallel_size) > 1:
        raise UnsupportedError(
            f"{looking[0]} looks inside the vision tower, whose heads {ranks} ranks share; that is not tested. Use one "
            "rank, or a method that looks at the projected tokens alone."
        )
    if compilation.compile_mm_encoder:
        raise UnsupportedError(
            f"{looking[0]} looks inside the vision tower, which compile_mm_encoder compiles; switch it off in "
            "--compilation-config, or use a method that looks at the projected tokens alone."
        )
