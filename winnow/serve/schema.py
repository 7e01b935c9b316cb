"""The fields of a chat request, each checked by itself; what is not known is refused, as OpenAI does."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from winnow.serve.errors import ApiError, invalid
from winnow.serve.settings import Settings

STOPS = 4  # strings of `stop`
STOP_LENGTH = 256  # characters of one
SEED = 2**63

# Fields that are taken at these values only: elsewhere they would change the answer, and the server does not know how.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "store": (False,),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
}
# Fields that say something about the request, and nothing about the answer.
IGNORED = (
    "user",
    "metadata",
    "parallel_tool_calls",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
READ = (
    "model",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "winnow",
)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when an answer ends.

    Attributes:
        temperature: 0 is greedy.
        seed: None: drawn anew for each request.
    """

    max_tokens: int
    temperature: float
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatRequest:
    """A chat request whose fields are of the right kind; its messages and its plan are not yet read.

    Attributes:
        max_tokens: that the request asked for; None: as many as there is room for.
        plan: the text of the plan; None: the server's own.
        stream, include_usage: whether pieces are sent as they come, and the usage behind them.
    """

    model: str
    messages: list[Any]
    max_tokens: int | None
    sampling: Sampling
    plan: str | None
    stream: bool
    include_usage: bool

    def within(self, length: int) -> Sampling:
        """How to sample an answer of at most so many tokens."""
        return replace(self.sampling, max_tokens=length)


def chat_request(given: Mapping[str, Any], settings: Settings) -> ChatRequest:
    """Read the fields of a request.

    Raises:
        ApiError: one is missing, unknown, of the wrong kind or out of bounds; `param` names it.
    """
    _check_names(given)
    model = given.get("model")
    if not isinstance(model, str):
        raise invalid("model must be the name of the model, as /v1/models gives it.", "model")
    if model != settings.name:
        raise invalid("This server has no such model; /v1/models names what it has.", "model", "model_not_found", 404)
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise invalid("messages must be a list of at least one message.", "messages")
    asked = _length(given, settings)
    sampling = Sampling(
        max_tokens=asked if asked is not None else settings.max_tokens,
        temperature=_number(given, "temperature", settings.temperature, 0, 2),
        top_p=_number(given, "top_p", 1.0, 0, 1, above=True),
        seed=_whole(given, "seed", -SEED, SEED - 1),
        stop=_stop(given.get("stop")),
    )
    stream = _flag(given, "stream", "stream")
    return ChatRequest(model, messages, asked, sampling, _plan(given.get("winnow")), stream, _usage(given, stream))


def _check_names(given: Mapping[str, Any]) -> None:
    known = {*READ, *NEUTRAL, *IGNORED}
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name[:64], known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise invalid(f"Unknown parameter: {name[:64]!r}.{hint}", name[:64], "unknown_parameter")
        if name in NEUTRAL and value is not None and not any(_same(value, own) for own in NEUTRAL[name]):
            allowed = ", or ".join(map(repr, NEUTRAL[name]))
            only = f"only {allowed} is taken" if allowed else "leave it out"
            raise invalid(f"{name} is not supported by this server: {only}.", name, "unsupported_parameter")


def _same(value: Any, own: Any) -> bool:
    return value == own and isinstance(value, bool) == isinstance(own, bool)


def _length(given: Mapping[str, Any], settings: Settings) -> int | None:
    old, new = (_whole(given, n, 1, settings.max_tokens) for n in ("max_tokens", "max_completion_tokens"))
    if old is not None and new is not None and old != new:
        raise invalid("max_tokens and max_completion_tokens differ: give one of them.", "max_completion_tokens")
    return old if new is None else new


def _whole(given: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise invalid(f"{name} must be a whole number from {least} to {most}.", name, "invalid_value")
    return value


def _number(
    given: Mapping[str, Any], name: str, default: float, least: float, most: float, *, above: bool = False
) -> float:
    value = given.get(name)
    if value is None:
        return default
    good = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    if not good or (above and value == least):
        bounds = f"above {least:g} and at most {most:g}" if above else f"from {least:g} to {most:g}"
        raise invalid(f"{name} must be a number {bounds}.", name, "invalid_value")
    return float(value)


def _flag(given: Mapping[str, Any], name: str, param: str) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise invalid(f"{param} must be true or false.", param, "invalid_value")
    return bool(value)


def _stop(value: Any) -> tuple[str, ...]:
    found = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(found, list) or len(found) > STOPS:
        raise invalid(f"stop must be a string, or a list of at most {STOPS}.", "stop", "invalid_value")
    if not all(isinstance(own, str) and 0 < len(own) <= STOP_LENGTH for own in found):
        raise invalid(f"Each string of stop must have 1 to {STOP_LENGTH} characters.", "stop", "invalid_value")
    return tuple(found)


def _usage(given: Mapping[str, Any], stream: bool) -> bool:
    options = given.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or not set(options) <= {"include_usage", "include_obfuscation"}:
        raise invalid('stream_options must be {"include_usage": true or false}.', "stream_options", "invalid_value")
    if not stream:
        raise invalid("stream_options goes with stream=true only.", "stream_options", "invalid_value")
    _flag(options, "include_obfuscation", "stream_options.include_obfuscation")
    return _flag(options, "include_usage", "stream_options.include_usage")


def _plan(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not set(value) <= {"plan"}:
        raise invalid('winnow must be {"plan": "SLUG:keep=64"}.', "winnow", "invalid_value")
    plan = value.get("plan")
    if plan is not None and not isinstance(plan, str):
        raise invalid("winnow.plan must be a plan string, such as 'SLUG:keep=64'.", "winnow.plan", "invalid_value")
    return plan


def room(request: ChatRequest, prompt: int, context: int) -> int:
    """Tokens that the answer may have behind a prompt, of which all is counted, compressed or not.

    Raises:
        ApiError: there is no room for it.
    """
    left = context - prompt
    wanted = request.max_tokens
    if left < (wanted or 1):
        raise _no_room(prompt, wanted or 1, context)
    return min(request.sampling.max_tokens, left)


def _no_room(prompt: int, wanted: int, context: int) -> ApiError:
    text = (
        f"The messages have {prompt} tokens before compression, and {wanted} are asked for; this model holds {context} "
        "together."
    )
    return invalid(text, "messages", "context_length_exceeded")
