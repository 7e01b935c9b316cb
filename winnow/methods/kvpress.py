"""kvpress (arXiv 2510.00636): keeps the cache slots that a scorer of NVIDIA's kvpress, or one written like it, prefers.

Looks at: what the scorer looks at: the attention module and its inputs, keys and values. Cost: that of the scorer.

Departs from the paper: the library's own methods are not among this; each that is built has its own slug.

Departs from the released code: slots stay in the order in which they were read; padding is never seen, and samples of
unequal length are scored apart; the budget is what is kept, and that of the scorer (`compression_ratio`) is not read.
"""

from typing import Any

from torch import Tensor

from winnow.contract import (
    Action,
    CacheMethod,
    KVBudget,
    KVStep,
    KVView,
    ModelInfo,
    Observe,
    State,
    WinnowError,
    register,
)


class KeyNorm:
    """A scorer like those of kvpress: keys of a small norm are kept (arXiv 2406.11430)."""

    def score(
        self, module: Any, hidden_states: Any, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
    ) -> Tensor:
        return -keys.float().norm(dim=-1)


_presses: dict[str, Any] = {"key-norm": KeyNorm()}


def add_press(name: str, press: Any) -> None:
    """Give a scorer a name, by which plans know it.

    Args:
        press: an object with `score(module, hidden_states, keys, values, attentions, kwargs)`, which returns
            `[b, G, N]`. `attentions` is None: nothing of heads × N × N is made.

    Raises:
        WinnowError: it has no such method, or the name is no word.
    """
    if not callable(getattr(press, "score", None)):
        raise WinnowError(
            f"a press has a method score(module, hidden_states, keys, values, attentions, kwargs); got "
            f"{type(press).__name__}."
        )
    if not name.replace("_", "a").replace("-", "a").isalnum():
        raise WinnowError(f"the name of a press is a word of letters, digits, - and _; got {name!r}.")
    _presses[name] = press


@register("kvpress")
class KVPress(CacheMethod):
    """Keeps the slots that a scorer with the interface of kvpress prefers.

    Args:
        press: the name under which `winnow.methods.kvpress.add_press` was given the scorer.
        keep: slots of a head.
    """

    released = {"keep": "50%"}

    press: str = "key-norm"
    keep: KVBudget = KVBudget("50%")

    def steps(self, info: ModelInfo) -> tuple[KVStep, ...]:
        if self.press not in _presses:
            known = ", ".join(sorted(_presses)) or "none"
            raise WinnowError(
                f"kvpress: no scorer was added under the name {self.press!r}; added: {known}. Call "
                f"winnow.methods.kvpress.add_press({self.press!r}, press) first."
            )
        return tuple(KVStep(step.at, self.evict, calls=True) for step in super().steps(info))

    def evict(self, view: KVView, state: State) -> tuple[Action, State]:
        """The prompt is cut as it is read; what later turns read stays, as in kvpress."""
        return super().evict(view, state) if view.fresh == view.n else (Observe(), state)

    def score(self, view: KVView) -> Tensor:
        module, called = view.call or (None, {})
        hidden = called.get("hidden_states")
        try:
            scores = _presses[self.press].score(module, hidden, view.keys, view.values, None, called)
        except Exception as error:
            raise WinnowError(
                f"kvpress: the scorer {self.press!r} failed with {type(error).__name__}: {error}"
            ) from error
        if not isinstance(scores, Tensor) or scores.shape != view.keys.shape[:3]:
            shape = tuple(getattr(scores, "shape", ())) or type(scores).__name__
            raise WinnowError(f"kvpress: {self.press!r} returned {shape}; expected {tuple(view.keys.shape[:3])}.")
        return scores
