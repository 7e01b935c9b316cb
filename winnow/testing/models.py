"""check_on_models: a method on small builds of real model classes, compared with what was worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from winnow.core.ledger import Ledger
from winnow.core.method import Method
from winnow.engine.compress import compress
from winnow.testing.subject import expect

STEPS = 5  # decoded tokens, so that the reduced cache is used
TOLERANCE = 1e-5  # of logits: two orders of the same sums in float32

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Build:
    """A small model of a real class, and what it is asked.

    Attributes:
        model: makes it, with the same weights each time.
        samples: the inputs of each row alone, unpadded. Take rows of unequal lengths; with one picture, two, and none.
        batch: joins them into one left-padded batch.
    """

    model: Callable[[], nn.Module]
    samples: Sequence[Inputs]
    batch: Callable[[Sequence[Inputs]], Inputs]


@dataclass(frozen=True, eq=False)
class Worked:
    """What a sample gives by hand.

    Attributes:
        logits: `[T, vocabulary]` behind the prompt, and behind each of the tokens that are forced.
        kept: for each picture, the content ids that the last layer still reads, ascending.
        layer_tokens: tokens that each LM layer reads in prefill.
    """

    logits: Tensor
    kept: Sequence[Sequence[int]]
    layer_tokens: Sequence[int]


ByHand = Callable[..., Worked]
"""`by_hand(model, sample, forced, **settings)`: the plain model, one sample alone, the tokens that it goes on with."""


def check_on_models(
    kind: type[Method],
    by_hand: ByHand,
    *,
    builds: Mapping[str, Build],
    settings: Mapping[str, Any] | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """Run a method on models: keeping all, a batch by hand and sample by sample, and detaching.

    Args:
        kind: the class of the method.
        by_hand: works out one sample with these settings.
        builds: at least two, of classes that differ; the whole check runs on each.
        settings: of the method. On every build they must change what the model says, or nothing is shown.

    Raises:
        AssertionError: the first check that fails, with the build and what came.
    """
    given = dict(settings or {})
    for name, build in builds.items():
        run = _Run(f"{kind.slug} on {name}", build)
        if kind.identity is not None:
            run.check_identity(kind.configured(**{**given, **kind.identity}))
        run.check_by_hand(kind.configured(**given), lambda *args: by_hand(*args, **given), tolerance)
        run.check_restored()


class _Run:
    """One model, before and after it is compressed."""

    def __init__(self, where: str, build: Build) -> None:
        self.where, self.samples = where, list(build.samples)
        self.model: Any = build.model()
        self.inputs = build.batch(self.samples)
        self.plain, self.said = self._forward(self.inputs), self._generate(self.inputs)
        self.before = _state(self.model)

    @torch.no_grad()
    def _forward(self, inputs: Inputs) -> Tensor:
        return self.model(**inputs).logits

    @torch.no_grad()
    def _generate(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """`[B, T]` new tokens and `[B, T, vocabulary]` the logits of each."""
        options: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
        output = self.model.generate(**inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, **options)
        return output.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(output.logits, 1)

    def check_identity(self, method: Method) -> None:
        """Keeping everything changes no bit, although every item went through the method."""
        with compress(self.model, method) as handle:
            logits, (ids, steps) = self._forward(self.inputs), self._generate(self.inputs)
            ledger = handle.last
        where = f"{self.where}, {method.identity}"
        expect(torch.equal(logits, self.plain), f"{where}: the logits of a forward differ")
        expect(torch.equal(ids, self.said[0]) and torch.equal(steps, self.said[1]), f"{where}: `generate` differs")
        for item in ledger.items:  # type: ignore[union-attr]
            expect(len(item.reductions) > 0, f"{where}: no step of the method reduced {item}")
            expect(len(item.kept) == item.n_visual, f"{where}: {len(item.kept)} of {item.n_visual} tokens are left")

    def check_by_hand(self, method: Method, by_hand: Callable[..., Worked], tolerance: float) -> None:
        """A padded batch and each sample alone give what the sample gives by hand."""
        with compress(self.model, method) as handle:
            (ids, steps), ledger = self._generate(self.inputs), handle.last
            alone = []
            for sample in self.samples:
                alone.append((self._forward(sample)[0, -1], handle.last))
        changed = max(float((s[0] - p[0]).abs().max()) for s, p in zip(steps, self.said[1], strict=True))
        expect(changed > 100 * tolerance, f"{self.where}: {method} changes the logits by no more than {changed:.1e}")
        for row, sample in enumerate(self.samples):
            want = by_hand(self.model, sample, ids[row, :-1].tolist())
            where = f"{self.where}, row {row}"
            _compare(f"{where} of a batch", steps[row], ledger, row, want, tolerance)
            logits, own = alone[row]
            _compare(f"{where} alone", logits[None], own, 0, want, tolerance)

    def check_restored(self) -> None:
        """Detached, the model is what it was: hooks, attributes and numbers."""
        after = _state(self.model)
        left = sorted(name for name in self.before.keys() | after.keys() if self.before.get(name) != after.get(name))
        expect(not left, f"{self.where}: something is left on the model: {', '.join(left)}")
        expect(torch.equal(self._forward(self.inputs), self.plain), f"{self.where}: the model has changed")


def _compare(where: str, logits: Tensor, ledger: Ledger | None, row: int, want: Worked, tolerance: float) -> None:
    if ledger is None:
        raise AssertionError(f"{where}: there is no ledger")
    error = float((logits - want.logits[: len(logits)]).abs().max())
    expect(error <= tolerance, f"{where}: logits differ by {error:.1e}")
    read = tuple(layer[row] for layer in ledger.layer_tokens)
    expect(read == tuple(want.layer_tokens), f"{where}: layers read {read} tokens, by hand {tuple(want.layer_tokens)}")
    kept = [sorted(set(item.kept.tolist())) for item in ledger.items if item.row == row]
    expect(kept == [list(ids) for ids in want.kept], f"{where}: kept {kept}, by hand {want.kept}")


def _state(model: nn.Module) -> dict[str, Any]:
    """What attaching could leave behind: the hooks and the attributes of every module."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            hooks = "hook" in key and hasattr(value, "__len__")
            found[f"{name}.{key}"] = list(value) if hooks else id(value)
        found.pop(f"{name}.rope_deltas", None)  # some models write it in every forward
    return found
