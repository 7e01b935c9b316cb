"""Load on vLLM with the plug-in, on its build for CPUs: starts the server, measures it, and ends it.

The server is `winnow serve --engine vllm` in vLLM's own environment, on the bundled model with heads of 64 channels
instead of 48, because vLLM's attention on CPUs takes none of 48 (`winnow.reference.wider`). What is measured is `winnow
bench-serve`, in this environment; its options follow. Run with nothing else on the machine: `make bench-serve-vllm`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from winnow.bench.clock import busy
from winnow.core.errors import WinnowError
from winnow.reference.wider import write_wider

ROOT = Path(__file__).parents[1]
KEY = "WINNOW_API_KEY"
STARTS, CALM, ENDS = 600, 300, 60  # seconds that the server, and the machine behind it, may take
OPTIONS = ("--dtype", "float32", "--method", "full", "--allow", "hiprune", "--max-context", "1024")
OF_VLLM = ("--enforce-eager", "--block-size", "32")


@contextlib.contextmanager
def vllm_server(python: Path, model: Path) -> Iterator[tuple[str, str]]:
    """A server on loopback; its address and its key.

    Raises:
        WinnowError: it did not start; with the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(str(python), "-P", "-m", "winnow.cli", "serve", "--engine", "vllm", "--model", str(model)),
        *("--name", "winnow-reference", "--port", str(port), *OPTIONS, "--", *OF_VLLM),
    ]
    key = secrets.token_urlsafe(24)
    paths = [str(ROOT / "tests/vllm/stub"), os.environ.get("PYTHONPATH", "")]  # the stub: vLLM without CUDA libraries
    environment = {
        "VLLM_CACHE_ROOT": str(python.parents[1] / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with tempfile.NamedTemporaryFile("w+", suffix=".log", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(  # noqa: S603 - winnow itself
            command, stdout=log, stderr=log, start_new_session=True,
            env=os.environ | environment | {KEY: key, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )  # fmt: skip
        try:
            _wait(f"http://127.0.0.1:{port}/health", process, Path(log.name))
            yield f"http://127.0.0.1:{port}/v1", key
        finally:
            _end(process)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + STARTS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(url, timeout=2).close()  # noqa: S310 - on loopback
            return
        time.sleep(0.5)
    tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
    raise WinnowError(f"vLLM's server did not start in {STARTS} s, or ended:\n{tail}")


def _version(url: str) -> str:
    with urllib.request.urlopen(url.removesuffix("v1") + "version", timeout=30) as answer:  # noqa: S310 - on loopback
        return str(json.load(answer)["version"])


def _calm() -> None:
    """Wait until the start of the server is no load any more; if something else is, the bench says so."""
    end = time.monotonic() + CALM
    while busy() and time.monotonic() < end:
        time.sleep(5)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(ENDS)
    with contextlib.suppress(ProcessLookupError):  # an engine outlives a server that does not end by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-vllm/bin/python", help="of vLLM's environment")
    given, options = parser.parse_known_args()
    if not given.python.exists():
        raise SystemExit(f"{given.python} is not there: make venv-vllm")
    with tempfile.TemporaryDirectory() as folder:
        model = write_wider(Path(folder) / "reference")
        with vllm_server(given.python, model) as (url, key):
            print(f"vLLM {_version(url)}, float32, without compilation; the bundled model with heads of 64 channels\n")
            sys.stdout.flush()
            if "--allow-busy" not in options:
                _calm()
            told = subprocess.run(  # noqa: S603 - winnow itself
                [sys.executable, "-m", "winnow.cli", "bench-serve", "--url", url, *options],
                env=os.environ | {KEY: key},
            )
    raise SystemExit(told.returncode)


if __name__ == "__main__":
    main()
