"""The options of `vllm serve` that mean what those of `winnow serve` say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.serve.vllm.settings import KEY

# What vLLM has another name for; only what the user gave is passed on, because vLLM's own defaults fit its engine.
RENAMED: dict[str, Callable[[Any], tuple[str, ...]]] = {
    "max_context": lambda n: ("--max-model-len", str(n)),
    "batch": lambda n: ("--max-num-seqs", str(n)),
    "grace": lambda seconds: ("--shutdown-timeout", str(math.ceil(seconds))),
    "frames": lambda n: ("--media-io-kwargs", json.dumps({"video": {"num_frames": n}})),
    "dtype": lambda name: ("--dtype", name),
    "revision": lambda name: ("--revision", name),
    "trust_remote_code": lambda wanted: ("--trust-remote-code",) if wanted else (),
}
# What it has not, and what to do instead.
MISSING = {
    "allow_host": "it answers any Host header; put a reverse proxy before it",
    "max_body": "bound the bodies in a reverse proxy before it",
    "queue": "it queues what comes; bound the requests in a reverse proxy before it",
    "time_limit": "bound the time in a reverse proxy before it",
    "device": "its build decides it, and CUDA_VISIBLE_DEVICES chooses GPUs",
    "device_map": "give --tensor-parallel-size behind --",
    "quantization": "give vLLM's own --quantization behind --",
}
OVERRIDES = "--hf-overrides"
# What must not come past winnow.
TAKEN = {
    "--api-key": "other users of the machine can read a command line; use --key-file",
    "--config": f"what the file says under {OVERRIDES[2:]} would be lost; give its options themselves",
}


@dataclass(frozen=True)
class Served:
    """What is served.

    Attributes:
        plan: its text, for requests that say nothing.
        plans: further plans that requests may name.
        least, most: what a request may keep of a picture or a video.
        temperature: of requests that say none.
    """

    model: str
    name: str
    host: str
    port: int
    plan: str
    plans: tuple[str, ...]
    least: Budget
    most: Budget
    temperature: float

    @property
    def overrides(self) -> dict[str, Any]:
        """The operator's settings, as the plug-in reads them."""
        plans = {"plans": list(self.plans)} if self.plans else {}
        return {KEY: {"plan": self.plan, **plans, "least": str(self.least), "most": str(self.most)}}


def arguments(served: Served, chosen: Mapping[str, Any], extra: Sequence[str]) -> list[str]:
    """What stands behind `vllm serve`.

    Args:
        chosen: the options that the user gave, by the names of `winnow serve`'s parameters.
        extra: for vLLM itself; it comes last, so that it has the last word.

    Raises:
        WinnowError: vLLM has no such option, or `extra` says what winnow says.
    """
    for name in chosen.keys() & MISSING.keys():
        raise WinnowError(f"--{name.replace('_', '-')} is not for --engine vllm: {MISSING[name]}.")
    if served.port == 0:
        raise WinnowError("--port 0 is not for --engine vllm, which does not say what it found; give a free port.")
    overrides, rest = _overrides(served, extra)
    pictures = {"image": chosen["max_pictures"]} if "max_pictures" in chosen else {}
    longest = {"max_new_tokens": chosen["max_tokens"]} if "max_tokens" in chosen else {}
    found = [
        served.model,
        *("--served-model-name", served.name, "--host", served.host, "--port", str(served.port)),
        *("--hf-overrides", json.dumps(overrides), "--trust-request-mm-kwargs"),
        *("--limit-mm-per-prompt", json.dumps(pictures | {"video": 1})),
        *("--override-generation-config", json.dumps({"temperature": served.temperature} | longest)),
    ]
    for name, renamed in RENAMED.items():
        if chosen.get(name) is not None:
            found += renamed(chosen[name])
    return [*found, *rest]


def _overrides(served: Served, extra: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """`--hf-overrides` of both, and what else is for vLLM: given twice, vLLM would read the second one alone."""
    found, rest, words = served.overrides, [], iter(extra)
    for word in words:
        option, _, value = word.partition("=")
        option = _whole(option.replace("_", "-"))
        if option in TAKEN:
            raise WinnowError(f"{option} behind --: {TAKEN[option]}.")
        if not option.startswith(OVERRIDES):
            rest.append(word)
            continue
        try:
            own = json.loads(value or next(words, ""))
        except ValueError:
            own = None
        if option != OVERRIDES or not isinstance(own, dict) or KEY in own:
            raise WinnowError(
                f"{option} behind --: winnow writes its plan there, so give the others as one JSON object without "
                f"{KEY!r}; the plan is what --method and --keep say."
            )
        found = own | found
    return found, rest


def _whole(option: str) -> str:
    """An option that is checked here, where this is a beginning of it that means no other: argparse takes that too."""
    for name, least in ((OVERRIDES, "--hf-o"), ("--api-key", "--api-k"), ("--config", "--config")):
        if option.startswith(least) and name.startswith(option):
            return name
    return option
