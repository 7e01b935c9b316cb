"""What a connector gives the language model in the place of a clip's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from winnow.core.errors import WinnowError
from winnow.core.reduction import Reduction
from winnow.core.step import Action, Emit, Observe, Reduce
from winnow.core.view import View
from winnow.learn.connectors.beside import RowMemory


@dataclass(frozen=True, eq=False)
class Output:
    """Tokens for b rows, in the order in which they are read.

    Attributes:
        at: the tokens of the clip whose positions they take.
        there: False for tokens that pad a row; None: none does.
        losses: what is added to the loss of the answers, weighted.
        memory: what each row reads beside these tokens; empty where nothing is.
    """

    tokens: Float[Tensor, "b m d"]
    at: Int[Tensor, "b m"]
    there: Bool[Tensor, "b m"] | None = None
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    memory: tuple[RowMemory, ...] = ()

    @staticmethod
    def of(action: Action, view: View) -> Output:
        """What the engine makes of a step's answer."""
        if isinstance(action, Observe):
            return Output(view.tokens, view.ids)
        if isinstance(action, Reduce):
            return Output._of(action.reduction.apply(view.tokens), action.reduction, view)
        if isinstance(action, Emit) and action.provenance is not None:
            return Output._of(action.tokens, action.provenance, view)
        raise WinnowError(
            f"a connector answers with a Reduction, or an Emit with its provenance; got {type(action).__name__}."
        )

    @staticmethod
    def _of(tokens: Tensor, reduction: Reduction, view: View) -> Output:
        at = view.ids.gather(1, reduction.representatives)
        return Output(tokens, at, None if reduction.counts is None else reduction.valid)

    @property
    def counts(self) -> Int[Tensor, " b"]:
        """Tokens of each row."""
        if self.there is None:
            return torch.full(self.at.shape[:1], self.at.shape[1])
        return self.there.sum(1)


def joined(parts: Sequence[tuple[Sequence[int], Output]]) -> Output:
    """Outputs of groups of rows as one, padded to the longest; losses are means over the rows.

    Args:
        parts: numbers of a group's rows, and their output.
    """
    longest = max(output.at.shape[1] for _, output in parts)
    rows = [number for own, _ in parts for number in own]
    tokens, at, there = [], [], []
    memory: list[RowMemory] = []
    losses: dict[str, Tensor] = {}
    for own, output in parts:
        short = longest - output.at.shape[1]
        real = torch.ones_like(output.at, dtype=torch.bool) if output.there is None else output.there
        tokens.append(pad(output.tokens, (0, 0, 0, short)))
        at.append(pad(output.at, (0, short)))
        there.append(pad(real, (0, short)))
        memory += output.memory
        for name, loss in output.losses.items():
            losses[name] = losses.get(name, loss.new_zeros(())) + loss * (len(own) / len(rows))
    order = torch.tensor(rows).argsort()
    whole = torch.cat(there)[order]
    read = tuple(memory[i] for i in order.tolist()) if memory else ()
    return Output(torch.cat(tokens)[order], torch.cat(at)[order], None if bool(whole.all()) else whole, losses, read)
