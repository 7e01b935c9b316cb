"""Asked: one call of a layer's attention, as its steps see it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from winnow.cache.groups import Group
from winnow.cache.masks import allowed
from winnow.core.errors import UnsupportedError
from winnow.signals.tap import scaling_of


@dataclass(frozen=True, eq=False)
class Asked:
    """One call.

    Attributes:
        module: the attention.
        query: `[B, H, q, d]`.
        mask: the model's own.
        kwargs: that attention functions are told.
        called: with which the module itself was called, where a step asks.
    """

    module: nn.Module
    query: Tensor
    mask: Any
    kwargs: dict[str, Any]
    called: dict[str, Any] | None = None

    @property
    def scaling(self) -> float:
        """What the logits are multiplied with."""
        given = self.kwargs.get("scaling")
        return scaling_of(self.module, self.query) if given is None else given

    def of(self, group: Group, store: Any, n: int, recent: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
        """Queries of a group's real tokens, what each reads where that is not all before it, and how many are new.

        Args:
            n: slots of the group.
            recent: queries of this and of earlier forwards, in the place of this one's.
        """
        query = self._rows(self.query if recent is None else recent, group, store)
        new = self.query.shape[2]
        if recent is not None or new == 1:
            return query[:, :, -n:], None, min(new, n)
        seen = allowed(self.mask)
        if seen is None:
            real = None if self.mask is None or group.index is None else group.index[:, -min(n, new) :]
            if real is None:
                return query[:, :, -n:], None, min(new, n)
            seen = torch.ones(1, new, new, dtype=torch.bool, device=query.device).tril()
        at = torch.tensor(group.rows, device=seen.device)
        own = (seen if seen.shape[0] == 1 else seen[at])[:, -new:, -new:].expand(len(group.rows), -1, -1)
        fresh = new
        if group.index is not None:
            start = store.length - new
            fresh = int((group.index[0] >= start).sum())
            columns = (group.index[:, n - fresh :] - start).to(own.device)
            own = own.gather(1, columns[:, :, None].expand(-1, -1, new))
            own = own.gather(2, columns[:, None].expand(-1, fresh, -1))
            query = query.gather(2, columns[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        if bool((own == torch.ones_like(own[0]).tril()).all()):
            return query, None, fresh
        return query, torch.cat([own.new_ones(*own.shape[:2], n - fresh), own], 2), fresh

    def call_of(self, group: Group, fresh: int) -> tuple[Any, dict[str, Any]]:
        """The module, and what it was called with for a group's real new tokens."""
        if self.called is None:
            raise UnsupportedError(
                f"what {type(self.module).__name__} is called with was not seen; call detach() on the handle and "
                "compress again."
            )
        new = self.query.shape[2]

        def own(x: Tensor) -> Tensor:
            """`[b, fresh, …]` of `[B or 1, q, …]`."""
            x = x.expand(self.query.shape[0], *x.shape[1:])[torch.tensor(group.rows, device=x.device)]
            if group.index is None:
                return x[:, -fresh:]
            columns = (group.index[:, -fresh:] - (int(group.index.max()) + 1 - new)).to(x.device)
            return x.gather(1, columns[..., None].expand(-1, -1, x.shape[2]))

        call = {**self.called, "hidden_states": own(self.called["hidden_states"])}
        embeddings = call.get("position_embeddings")
        if isinstance(embeddings, tuple) and all(e.ndim == 3 for e in embeddings):
            call["position_embeddings"] = tuple(own(e) for e in embeddings)
        return self.module, call

    def sinks_of(self, group: Group, store: Any) -> Tensor | None:
        """`[H]` the logits of the module's sinks, for the heads of a group."""
        sinks = self.kwargs.get("s_aux")
        if sinks is None or group.heads is None:
            return sinks
        return sinks.unflatten(0, (store.heads, -1))[list(group.heads)].flatten()

    @staticmethod
    def _rows(query: Tensor, group: Group, store: Any) -> Tensor:
        if len(group.rows) != query.shape[0]:
            query = query[torch.tensor(group.rows, device=query.device)]
        if group.heads is not None:
            each = query.shape[1] // store.heads
            query = query.unflatten(1, (store.heads, each))[:, list(group.heads)].flatten(1, 2)
        return query
