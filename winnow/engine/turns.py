"""Later turns: what a cache keeps of its conversation, so that pictures can be selected again for a new question."""

import dataclasses
import inspect
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.engine.encoding import EncoderRecord, Reading, mark, record_of
from winnow.engine.request import Request

TURNS = ("first", "again")
PLACES = ("device", "cpu")
TYPES = ("token_type_ids", "mm_token_type_ids")

FIRST = "kept from the first question (turns='first')"
AGAIN = "selected again for the question of this turn (turns='again')"


@dataclass(frozen=True)
class Turns:
    """What a later turn does with pictures that were selected for an earlier question.

    Attributes:
        again: select again; else the first selection stays.
        on_cpu: what selecting again needs waits in the memory of the CPU.
    """

    again: bool = False
    on_cpu: bool = False

    @staticmethod
    def of(turns: str, keep_features: str) -> "Turns":
        if turns not in TURNS:
            raise WinnowError(f"turns={turns!r}; use one of {', '.join(map(repr, TURNS))}.")
        if keep_features not in PLACES:
            raise WinnowError(f"keep_features={keep_features!r}; use one of {', '.join(map(repr, PLACES))}.")
        return Turns(turns == "again", keep_features == "cpu")


@dataclass(eq=False)
class Conversation:
    """What a cache remembers of the requests that filled it.

    Attributes:
        outputs: modality → the encoder's output with its record; where it waits.
        types: per-token inputs of the first turn.
        ids, positions, masks: of each forward so far; positions as the language model was given them.
        lost: why it cannot be read again; None while it can.
    """

    outputs: dict[str, Any]
    types: dict[str, Tensor]
    ids: list[Tensor] = field(default_factory=list)
    positions: list[Tensor | None] = field(default_factory=list)
    mask: Tensor | None = None
    lost: str | None = None

    @property
    def length(self) -> int:
        return sum(ids.shape[1] for ids in self.ids)

    def lengths(self, modality: str) -> tuple[int, ...] | None:
        """Tokens of each picture that was kept."""
        record = record_of(self.outputs.get(modality))
        return None if record is None else record.lengths

    def copy(self) -> "Conversation":
        return dataclasses.replace(self, ids=list(self.ids), positions=list(self.positions))

    def add(self, request: Request) -> None:
        """Note the tokens of a forward."""
        ids = request.called.get("input_ids")
        if ids is None:
            self.lost = self.lost or "it went on with inputs_embeds, which are not kept"
            return
        self.ids.append(ids)
        self.positions.append(request.positions)

    def crop(self, count: int) -> None:
        """Forget the last tokens."""
        self.ids = [torch.cat(self.ids, 1)[:, :-count]] if self.ids else []
        joined = self._positions()
        self.positions = [None if joined is None else joined[..., :-count]]

    def _positions(self, *more: Tensor | None) -> Tensor | None:
        given = (*self.positions, *more)
        parts = [part for part in given if part is not None]
        if len(parts) < len(given):
            return None
        axes = min(part.ndim for part in parts) == 3
        # With 3-D positions, the row of text positions that may stand before the three is made anew.
        own = [part[-3:] if axes else part for part in parts]
        rows = max(part.shape[-2] for part in own)
        return torch.cat([part.expand(*part.shape[:-2], rows, -1) for part in own], -1)

    def whole(self, request: Request, called: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward that reads the conversation anew, the new turn at its end."""
        new = called["input_ids"]
        total = self.length + new.shape[1]
        outputs = {modality: moved(output, request.bound.device) for modality, output in self.outputs.items()}
        request.encodings = {modality: record_of(output) for modality, output in outputs.items()}  # type: ignore[misc]
        request.question_from = self.length
        mask = called.get("attention_mask")
        if mask is None and self.mask is not None:
            ones = self.mask.new_ones(len(self.mask), total - self.mask.shape[1])
            mask = torch.cat([self.mask, ones], 1)
        made = {
            "input_ids": torch.cat([*self.ids, new], 1),
            "attention_mask": mask,
            "position_ids": self._positions(called.get("position_ids")),
            "mm_encoder_outputs": outputs,
        }
        for name, first in self.types.items():
            given = called.get(name)
            late = first.new_zeros(len(first), total - first.shape[1])
            if given is not None:
                late[:, -given.shape[1] :] = given[:, -late.shape[1] :]
            made[name] = torch.cat([first, late], 1)
        return {**called, **made}


class Rereading:
    """A forward that reads a conversation again, from its first token on, in place of the new turn alone.

    Args:
        request: of the new turn.
        state: on its cache.
    """

    def __init__(self, request: Request, state: Any, cache: Any) -> None:
        self.request, self.state, self.cache = request, state, cache
        self.talk: Conversation | None = state.talk
        self.new = 0
        self.done = False

    def whole(self, called: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the forward; the cache is emptied for it."""
        talk = self._checked(called)
        self.new = called["input_ids"].shape[1]
        made = talk.whole(self.request, called)
        self.cache.reset()
        talk.lost = "reading it again failed"  # until it has not
        self.state.talk = talk
        return made

    def _checked(self, called: dict[str, Any]) -> Conversation:
        request, ids = self.request, called.get("input_ids")
        if self.talk is None:
            reason: str | None = "nothing was kept for it when it was filled"
        elif self.talk.lost is not None:
            reason = self.talk.lost
        elif any(record_of(output).plan is not request.plan for output in self.talk.outputs.values()):  # type: ignore[union-attr]
            reason = "its pictures were encoded under another plan"
        elif ids is None:
            reason = "this turn came as inputs_embeds"
        elif is_drafted():
            reason = "assisted decoding hands over drafted tokens as a turn does"
        elif any(bool((ids == token).any()) for token in request.bound.token_ids.values()):
            reason = "this turn brings another picture"
        elif "mm_encoder_outputs" not in inspect.signature(type(request.bound.base).forward).parameters:
            reason = f"{request.bound.info.model} takes no features that were made before"
        elif any(record.lengths != self.talk.lengths(name) for name, record in request.encodings.items()):
            reason = "the pixels that came with this turn are not those of its pictures"
        else:
            reason = None
        if reason is not None:
            raise UnsupportedError(
                f"turns='again' cannot select again on this cache: {reason}; give the whole conversation with its "
                "pictures and no cache, or use turns='first'."
            )
        return self.talk  # type: ignore[return-value]

    def finish(self) -> None:
        """After the forward: the conversation is what was read."""
        talk: Conversation = self.talk  # type: ignore[assignment]
        talk.lost, talk.ids, talk.positions = None, [], []
        talk.add(self.request)
        self.state.talk = talk


def finish_turn(turns: Turns, request: Request, state: Any, turn: bool, held: bool, read: Rereading | None) -> None:
    """After a forward: what a later turn needs is noted on its cache, and the ledger says which selection holds.

    Args:
        turn: whether the forward brought a new turn.
        held: whether it went on from what the cache held.
    """
    before = state.ledger
    if request.ledger is not None and request.ledger.items:
        state.ledger = request.ledger
    if read is not None:
        read.finish()
        request.ledger.notes.update(selection=AGAIN, read_again=state.logical - read.new)  # type: ignore[union-attr]
        return
    if state.talk is not None:
        state.talk.add(request)
    elif turns.again and request.encodings and request.plan.reads_text:
        state.talk = _started(turns, request)
        if held:
            state.talk.lost = "its picture came behind other turns"
    if turn and before is not None and request.plan.reads_text and not is_drafted():
        request.ledger = dataclasses.replace(
            request.ledger or before, notes={**(request.ledger or before).notes, "selection": FIRST}
        )


def _started(turns: Turns, request: Request) -> Conversation:
    called = request.called
    outputs = {**request.outputs, **(called.get("mm_encoder_outputs") or {})}
    place = torch.device("cpu") if turns.on_cpu else request.bound.device
    kept = {modality: moved(output, place) for modality, output in outputs.items() if output is not None}
    types = {name: called[name] for name in TYPES if called.get(name) is not None}
    talk = Conversation(kept, types, mask=called.get("attention_mask"))
    talk.add(request)
    return talk


def moved(output: Any, device: torch.device) -> Any:
    """An encoder's output with no more than the language model and the plan's steps need of it, on a device."""
    record = record_of(output)
    fields = {f.name: None for f in dataclasses.fields(output)}
    for name in ("pooler_output", "deepstack_features"):
        if name in fields:
            fields[name] = _to(getattr(output, name), device)
    del fields["winnow"]
    plain: Any = type(output).__mro__[1]
    return mark(plain(**fields), _moved_record(record, device))  # type: ignore[arg-type]


def _moved_record(record: EncoderRecord, device: torch.device) -> EncoderRecord:
    readings = {
        signal: Reading(_to(reading.calls, device), reading.prefix, _to(reading.joined, device))
        for signal, reading in record.readings.items()
    }
    items = [dataclasses.replace(item, rows=item.rows[:0]) for item in record.items]
    return dataclasses.replace(record, readings=readings, items=items, times={})


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(_to(part, device) for part in value)
    return value


def is_turn(state: Any, called: dict[str, Any]) -> bool:
    """Whether a forward brings a new turn on a cache: several tokens, and none of them drafted."""
    new = called.get("input_ids")
    new = called.get("inputs_embeds") if new is None else new
    # A conversation whose rereading failed has no tokens in its cache, and is none the less no new one.
    goes_on = state is not None and (state.logical > 0 or state.talk is not None)
    return goes_on and new is not None and new.shape[1] > 1


def is_drafted() -> bool:
    """Whether assisted decoding calls: it hands over several tokens at once, and its own frame alone tells."""
    frame: Any = sys._getframe(1)
    while frame is not None and "candidate_generator" not in frame.f_locals:
        frame = frame.f_back
    return frame is not None


def shortened(output: Any, count: int) -> Any:
    """The output of a forward over a whole conversation, for the tokens of its last turn."""
    if isinstance(output, tuple):
        return (output[0][:, -count:], *output[1:])
    output["last_hidden_state"] = output.last_hidden_state[:, -count:]
    states = getattr(output, "hidden_states", None)
    if states is not None:
        output["hidden_states"] = tuple(h if h is None else h[:, -count:] for h in states)
    return output
