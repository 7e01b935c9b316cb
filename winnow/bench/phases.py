"""Wall-clock times of one `generate`, phase by phase, read in the same way with and without compression."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from winnow.bench.clock import clocked, now
from winnow.models.families import family_of, unwrap
from winnow.models.family import seam

PHASES = ("encoder", "projector", "select", "prefill", "token", "total")


class Meter:
    """Reads the phases of `generate` by hooks on the model and its parts, while it is entered.

    Attributes:
        took: for each part, the milliseconds of each of its calls, less what was spent in other parts meanwhile.
            `head` is what the model does around its `base`: the LM head.
    """

    def __init__(self, model: Any) -> None:
        self.model: Any = unwrap(model)
        family = family_of(self.model)
        base: Any = self.model.base_model
        tower, projector = (seam(base, path, self.model) for path in (family.tower, family.projector))
        self.parts = {"head": self.model, "base": base, "tower": tower, "projector": projector}
        self.took: dict[str, list[float]] = {}
        self._open: list[
            list[float]
        ] = []  # of each part that is running: its start, and the milliseconds of parts inside it

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self.took, self._open = {name: [] for name in self.parts}, []
        handles = []
        try:
            for name, part in self.parts.items():
                handles.append(part.register_forward_pre_hook(self._enter))
                handles.append(part.register_forward_hook(functools.partial(self._leave, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, *_: Any) -> None:
        self._open.append([self._now(), 0.0])

    def _leave(self, name: str, *_: Any) -> None:
        start, inside = self._open.pop()
        whole = self._now() - start
        self.took[name].append(whole - inside)
        if self._open:
            self._open[-1][1] += whole

    def _now(self) -> float:
        return now(self.model.device)

    def phases(self, total: float, engine: Mapping[str, float]) -> dict[str, float | None]:
        """Milliseconds of each phase of the last run; no time is in two phases.

        Args:
            total: milliseconds from end to end.
            engine: the engine's own times, empty without compression. Part of the selection runs inside the tower and
                inside the language model, which only the engine can tell apart.
        """
        head, base = self.took["head"], self.took["base"]
        later = [around + inner for around, inner in zip(head[1:], base[1:], strict=True)]
        return {
            "encoder": engine.get("encoder", sum(self.took["tower"])),
            "projector": engine.get("projector", sum(self.took["projector"])),
            "select": engine.get("select", 0.0),
            "prefill": head[0] + engine.get("prefill", base[0]),
            "token": statistics.fmean(later) if later else None,
            "total": total,
        }


def answer(
    model: Any, processor: Any, inputs: dict[str, Any], *, max_new_tokens: int, runs: int, handle: Any = None
) -> tuple[str, dict[str, float | None]]:
    """The greedy answer through `model.generate`, and the median milliseconds of each phase after one warm-up.

    Args:
        handle: of the attached plan, with `timing` on; None without compression.
    """
    meter, timed = Meter(model), []
    for run in range(runs + 1):
        with meter(), torch.inference_mode():
            out, total = clocked(
                lambda: model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False), model.device
            )
        if run:
            timed.append(meter.phases(total, {} if handle is None else handle.last.times))
    text = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    known = {name: [took for phases in timed if (took := phases[name]) is not None] for name in PHASES}
    return text, {name: statistics.median(values) if values else None for name, values in known.items()}
