"""DeepStack: features of inner blocks of the tower, which some language models add to the rows of a picture between
their first layers (arXiv 2406.04334). They go with the rows: dropped with them, and merged as they were."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from winnow.core.packing import Packing
from winnow.engine.encoder import plain_method
from winnow.engine.item_tokens import Merged

NAME = "_deepstack_process"


class DeepstackMethod:
    """Stands in for the method of one language model that adds the features to its hidden states.

    Args:
        running: the pass through the LM that is running in this context, or None.
        lm: the language model.

    A copy or a pickle of the model gets the plain method back.
    """

    name = NAME

    def __init__(self, running: Callable[[], Any], lm: nn.Module) -> None:
        self.running, self.lm, self.plain = running, lm, getattr(lm, NAME)
        functools.update_wrapper(self, self.plain)

    def __call__(self, hidden: Tensor, mask: Tensor, features: Tensor) -> Tensor:
        lm = self.running()
        if lm is None or not lm.tokens.touched:
            return self.plain(hidden, mask, features)
        return self.plain(hidden, *followed(mask, features, lm.merged, lm.tokens.packing))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return plain_method(memo.get(id(self.lm), self.lm), NAME)

    def __reduce__(self) -> tuple[Any, ...]:
        return plain_method, (self.lm, NAME)


def followed(
    mask: Bool[Tensor, "b s"], features: Float[Tensor, "v d"], merged: Iterable[Merged], packing: Packing
) -> tuple[Bool[Tensor, "b p"], Float[Tensor, "w d"]]:
    """The features of the rows that are left.

    Args:
        mask: the logical positions that have features.
        features: theirs, row by row.
        merged: the rows that were made anew so far, in order.
        packing: the slots that are left.
    """
    mask = mask.to(features.device)
    dense = features.new_zeros(*mask.shape, features.shape[-1])
    dense[mask] = features
    for step in merged:
        dense[step.row, step.at] = step.reduction.apply(dense[step.row, step.was]).to(dense.dtype)
    source = packing.source.to(features.device)
    left = mask.gather(1, source)  # also of tokens that the caller's mask hides, as in the plain model
    rows = dense.gather(1, source[..., None].expand(-1, -1, dense.shape[-1]))
    return left, rows[left]
