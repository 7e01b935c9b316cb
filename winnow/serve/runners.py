"""How a request runs under a plan: as shortened inputs, which can be batched, or under hooks, alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from winnow.core.errors import UnsupportedError
from winnow.core.ledger import Ledger
from winnow.core.plan import Plan
from winnow.engine.compress import compress
from winnow.engine.handle import Handle
from winnow.engine.preparation import Preparation
from winnow.engine.prepared import Prepared, bucketed, joined
from winnow.engine.prompt_items import on_made_inputs
from winnow.engine.twin import twin
from winnow.models.inputs import moved
from winnow.serve.job import Job, Started
from winnow.serve.messages import NOUNS

PLANS = 16  # that are kept ready


@dataclass(frozen=True)
class Ready:
    """A job whose prompt can be read.

    Attributes:
        prepared: its shortened inputs; None: it runs under the hooks of `handle`, alone, on `inputs`.
        width: jobs of one width can be one batch; 0 for those that run alone.
    """

    job: Job
    plan: Plan
    prepared: Prepared | None = None
    handle: Handle | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    width: int = 0


class Runners:
    """What runs the plans of requests on one model, the latest ones kept.

    A plan that acts inside the language model cannot be had by shortened inputs, nor can some prompts; those run under
    `compress`, on a twin of the model.
    """

    def __init__(self, model: Any, processor: Any, default: Plan, bucket: int) -> None:
        self.model, self.processor, self.default, self.bucket = model, processor, default, bucket
        self._preparations: OrderedDict[str, Preparation | None] = OrderedDict()
        self._handles: OrderedDict[str, Handle] = OrderedDict()

    def ready(self, job: Job) -> Ready:
        """Encode a job's pictures and choose among their tokens, or leave it as it is for the hooks.

        Raises:
            WinnowError: its plan does not run on this model.
        """
        plan = job.plan or self.default
        inputs = moved(job.inputs, self.model)
        preparation = _kept(self._preparations, plan.key, lambda: self._preparation(plan))
        if preparation is not None:
            try:
                prepared = preparation.of(inputs)
                return Ready(job, plan, prepared=prepared, width=bucketed(prepared.width + 1, self.bucket))
            except UnsupportedError:
                pass  # this prompt cannot be shortened, a window reaches too far, say
        handle = _kept(self._handles, plan.key, lambda: self._handle(plan))
        return Ready(job, plan, handle=handle, inputs=inputs)

    def _preparation(self, plan: Plan) -> Preparation | None:
        try:
            return Preparation(self.model, plan, processor=self.processor)
        except UnsupportedError:
            return None

    def _handle(self, plan: Plan) -> Handle:
        made = compress(twin(self.model), plan, processor=self.processor)
        on_made_inputs(made.bind(plan))
        return made


def _kept(known: OrderedDict[str, Any], key: str, make: Callable[[], Any]) -> Any:
    """The value of a key, made where it is not there; the one that was longest not asked for is forgotten."""
    if key not in known:
        known[key] = make()
        if len(known) > PLANS:
            known.popitem(last=False)
    known.move_to_end(key)
    return known[key]


def batch_inputs(batch: Sequence[Ready]) -> dict[str, Any]:
    """What `generate` takes for jobs of one width: rows padded to it, or a single job as it is.

    Raises:
        UnsupportedError: they cannot be one batch.
    """
    parts = [ready.prepared for ready in batch if ready.prepared is not None]
    if not parts:
        return batch[0].inputs
    return parts[0].inputs if len(parts) == 1 else joined(parts, batch[0].width).inputs


def model_of(ready: Ready, runners: Runners) -> Any:
    """The model that answers a job: the one that is served, or its twin with hooks."""
    return runners.model if ready.handle is None else ready.handle.model


def started(ready: Ready, ledger: Ledger) -> Started:
    """What a job's ledger says of its prompt."""
    given = sum(item.layout.n_content for item in ledger.items)
    kept = sum(0 if item.ids is None else int(item.ids.shape[0]) for item in ledger.items)
    prompt = max((layer[0] for layer in ledger.layer_tokens), default=ledger.logical[0])
    return Started(int(prompt), given, kept, str(ready.plan))


def placeholder_tokens(model: Any, family: Any) -> frozenset[int]:
    """The ids that stand for pictures and videos in a prompt."""
    found = (getattr(model.config, name, None) for _, modality, name in family.encoders if modality in NOUNS)
    return frozenset(token for token in found if isinstance(token, int))


def empty_cache() -> None:
    """Give back what torch keeps for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
