"""What `winnow doctor` checks of compressed caches, with a method whose choice is known without looking."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from winnow.cache.layer import held_bytes
from winnow.core.errors import UnsupportedError
from winnow.core.kv import KVView
from winnow.core.kv_budget import KVBudget
from winnow.core.kv_method import CacheMethod
from winnow.engine.attach import attach as compress
from winnow.engine.doctor_checks import STEPS, Run, Subject, apart, told
from winnow.engine.doctor_reference import without
from winnow.engine.kv import held_layers
from winnow.engine.versions import cache_of

SEAM = (
    "the attention interface (ALL_ATTENTION_FUNCTIONS, _attn_implementation), the layers of the cache (DynamicLayer) "
    "and what they are asked (update, get_mask_sizes)"
)


@dataclass(frozen=True)
class EvenSlots(CacheMethod):
    """Keeps slots at equal distances, the same in every head."""

    keep: KVBudget = field(default_factory=lambda: KVBudget("50%"))
    slug: ClassVar[str] = "even-slots"

    def score(self, view: KVView) -> Tensor:
        chosen = torch.zeros(view.n, device=view.keys.device)
        chosen[self.index(view.n).to(chosen.device)] = 1
        return chosen.expand(view.b, view.heads, -1)

    def index(self, n: int) -> Tensor:
        """Which of n slots stay, ascending."""
        count = max(1, self.keep.of(n, n, layer=0, depth=1))
        return torch.arange(count) * n // count


def _where_it_can(check: Run) -> Run:
    """The check, on models whose cache can be compressed."""

    def checked(subject: Subject) -> tuple[bool, str]:
        if "layers" not in subject.points:
            return True, "not checked: the layers of this language model are left alone"
        try:
            compress(subject.model, EvenSlots()).detach()
        except UnsupportedError as error:
            return True, f"not checked: {error}"
        return check(subject)

    return checked


@_where_it_can
def full_budget(subject: Subject) -> tuple[bool, str]:
    with compress(subject.model, EvenSlots(KVBudget("100%"))):
        logits = torch.equal(subject.model(**subject.samples[0]).logits, subject.logits)
        ids = torch.equal(subject.answer(subject.samples[0])[0], subject.ids[:, -STEPS:])
    return logits and ids, f"logits {'equal' if logits else 'differ'}, ids {'equal' if ids else 'differ'}"


@_where_it_can
def evicted(subject: Subject) -> tuple[bool, str]:
    """Each decoded token against the plain model, in whose layers it cannot read what was evicted."""
    method, inputs, held = EvenSlots(), subject.samples[0], held_layers(subject.bound)
    with compress(subject.model, method):
        ids, got = subject.answer(inputs)
    n = inputs["input_ids"].shape[1]
    gone = torch.ones(n, dtype=torch.bool)
    gone[method.index(n)] = False
    want = without(subject.bound, subject.model, inputs, gone.nonzero()[:, 0], ids[0].tolist(), decoded_in=held)
    plain = without(subject.bound, subject.model, inputs, gone[:0].nonzero()[:, 0], ids[0].tolist(), decoded_in=held)
    ok, detail = told(apart(got[0], want), subject)
    return ok, f"{detail}; the eviction changes them by {apart(want, plain):.1e}"


@_where_it_can
def stored(subject: Subject) -> tuple[bool, str]:
    """Slots and bytes of the cache are those of the ledger, and what was evicted is not held."""
    method, inputs = EvenSlots(), subject.samples[0]
    held = held_layers(subject.bound)
    full = held_bytes(cache_of(subject.forward(**inputs)))
    with compress(subject.model, method) as handle:
        cache, ledger = cache_of(subject.forward(**inputs)), handle.last
        own = held_bytes(cache)
    kept = len(method.index(inputs["input_ids"].shape[1]))
    slots: Any = ledger.kv_slots  # type: ignore[union-attr]
    right = all(slots[i] == kept * cache.layers[i].store.heads for i in held)
    ok = right and own < full and (ledger.kv_bytes, ledger.kv_bytes_full) == (own, full)  # type: ignore[union-attr]
    return ok, (
        f"{kept} slots of a head in {len(held)} layers{'' if right else ' were asked for, and others are held'}; "
        f"{own:,} bytes (the ledger says {ledger.kv_bytes:,}) of {full:,}"  # type: ignore[union-attr]
    )


CACHE_CHECKS: tuple[tuple[str, Callable[[Subject], tuple[bool, str]], str], ...] = (
    ("a full budget of the cache changes nothing", full_budget, SEAM),
    ("what is evicted from the cache is as if masked", evicted, f"masks of single tokens, and {SEAM}"),
    ("a compressed cache holds what its ledger says", stored, SEAM),
)
