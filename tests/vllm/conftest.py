"""What tests of the plug-in share. Those that need vLLM need `make venv-vllm`; engines run in this process."""

from __future__ import annotations

import gc
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# The stub lets vLLM be imported where there are no CUDA libraries; engines are small and stay in this process.
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
HERE = Path(__file__).resolve().parent
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "block_size": 32,
    "disable_log_stats": True,
}


def has_vllm() -> bool:
    """Whether vLLM is installed, and not only this folder of the same name found."""
    installed = {name.lower() for name in importlib.metadata.packages_distributions().get("vllm", ())}
    return bool(installed & {"vllm", "vllm-cpu"})


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Tests that ask for an engine are skipped where there is no vLLM."""
    if has_vllm():
        return
    skip = pytest.mark.skip(reason="vLLM is not installed: make test-vllm")
    for item in (own for own in items if own.path.parent == HERE):
        if {"engine", "checkpoint", "vllm"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def vllm() -> Any:
    import vllm

    return vllm


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Where the checkpoint of a name lies."""
    from checkpoints import write

    folder = tmp_path_factory.mktemp("checkpoints")
    written: dict[str, str] = {}

    def path(name: str) -> str:
        if name not in written:
            written[name] = str(write(name, folder))
        return written[name]

    return path


@pytest.fixture(scope="module")
def engine(checkpoint: Callable[[str], str]) -> Iterator[Callable[..., Any]]:
    """Starts an engine on a checkpoint, by name or folder, under the operator's settings; the one before it ends."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    running: list[Any] = []

    def stop() -> None:
        while running:
            running.pop().llm_engine.engine_core.shutdown()
        gc.collect()
        cleanup_dist_env_and_memory()

    def start(name: str, winnow: Any, **settings: Any) -> Any:
        stop()
        limits = {"image": 4, "video": 0} if name in WITH_VIDEO else {"image": 4}
        overrides = {} if winnow is None else {"winnow": winnow}
        given = ENGINE | {"limit_mm_per_prompt": limits, "hf_overrides": overrides} | settings
        running.append(LLM(name if os.sep in name else checkpoint(name), **given))
        return running[0]

    yield start
    stop()


WITH_VIDEO = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
