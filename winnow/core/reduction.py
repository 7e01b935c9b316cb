"""Reduction: a linear map from N source tokens to M output tokens, and nothing else.

Pruning selects rows, merging and pooling assign rows to clusters, resampling mixes rows. From one map follow the
overlay, evidence recall, FLOPs, bytes, unmerging and composition, for every method at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from winnow.core.errors import WinnowError


@dataclass(frozen=True, eq=False)
class Reduction:
    """N source tokens to M output tokens, for each lane of the leading axes (items, heads).

    Exactly one of three storages is used: `index` alone (selection: output j is source `index[j]`), `index` with
    `target` and optionally `weight` (edges: source `index[e]` adds `weight[e]` times itself to output `target[e]`; a
    negative target drops the edge), or `matrix` (many-to-many).

    Attributes:
        n: source tokens.
        m: output rows; the largest over the lanes when they are ragged.
        counts: rows of each lane, known on the host, when lanes are ragged; rows beyond a lane's count are padding.
        representative: `[*, M]` the source whose place and position an output takes; derived when not given.
        ordered: whether the representatives ascend, so that outputs can stand where their representatives stood.
    """

    n: int
    m: int
    index: Int[Tensor, "*lanes e"] | None = None
    target: Int[Tensor, "*lanes e"] | None = None
    weight: Float[Tensor, "*lanes e"] | None = None
    matrix: Float[Tensor, "*lanes m n"] | None = None
    counts: tuple[int, ...] | None = None
    representative: Int[Tensor, "*lanes m"] | None = None
    ordered: bool = True

    @staticmethod
    def select(
        chosen: Tensor, n: int | None = None, *, counts: Sequence[int] | None = None, ordered=True
    ) -> "Reduction":
        """Keep some tokens and drop the others.

        Args:
            chosen: indices `[*, M]` (int64; `n` is then required) or a mask `[*, N]` (bool). A mask whose `counts` are
                not given costs one host read, because the number of outputs must be known on the host.
            counts: rows of each lane where lanes are ragged; the indices of a lane are then left-aligned.
            ordered: False when the indices of a lane do not ascend, and outputs keep the order that is given.
        """
        if chosen.dtype == torch.bool:
            if chosen.ndim == 1 and counts is None:
                index = chosen.nonzero()[:, 0]
                return Reduction(chosen.shape[-1], index.shape[0], index)
            lanes = chosen.reshape(-1, chosen.shape[-1])
            sizes = tuple(counts) if counts is not None else tuple(lanes.sum(-1).tolist())
            m = max(sizes, default=0)
            order = torch.argsort((~lanes).to(torch.uint8), dim=-1, stable=True)[:, :m]
            ragged = None if len(set(sizes)) <= 1 else sizes
            return Reduction(chosen.shape[-1], m, order.reshape(*chosen.shape[:-1], m), counts=ragged)
        if n is None:
            raise WinnowError("Reduction.select got indices without n: pass n, the number of source tokens.")
        if chosen.dtype != torch.int64:
            raise WinnowError(f"Reduction.select takes int64 indices or a bool mask, got {chosen.dtype}.")
        ragged = tuple(counts) if counts is not None and len(set(counts)) > 1 else None
        return Reduction(n, chosen.shape[-1], chosen, counts=ragged, ordered=ordered)

    @staticmethod
    def assign(
        cluster: Int[Tensor, "*lanes n"],
        weight: Float[Tensor, "*lanes n"] | None = None,
        *,
        m: int,
        representative: Int[Tensor, "*lanes m"] | None = None,
        ordered: bool = True,
    ) -> "Reduction":
        """Each source goes to one cluster in [0, m), or is dropped (−1), with a weight (default: 1)."""
        n = cluster.shape[-1]
        index = torch.arange(n, device=cluster.device).expand_as(cluster)
        return Reduction(n, m, index, cluster, weight, representative=representative, ordered=ordered)

    @staticmethod
    def edges(
        index: Int[Tensor, "*lanes e"],
        target: Int[Tensor, "*lanes e"],
        weight: Float[Tensor, "*lanes e"] | None = None,
        *,
        n: int,
        m: int,
        representative: Int[Tensor, "*lanes m"] | None = None,
        ordered: bool = True,
    ) -> "Reduction":
        """The general sparse map: a source may feed several outputs (VisionZip's targets feed one, PruMerge's many)."""
        return Reduction(n, m, index, target, weight, representative=representative, ordered=ordered)

    @staticmethod
    def mix(
        matrix: Float[Tensor, "*lanes m n"], *, representative: Tensor | None = None, ordered: bool = True
    ) -> "Reduction":
        """Many-to-many: output = matrix @ tokens. Leading lanes may be items or heads."""
        return Reduction(
            matrix.shape[-1], matrix.shape[-2], matrix=matrix, representative=representative, ordered=ordered
        )

    @property
    def is_selection(self) -> bool:
        """Whether outputs are copies of sources, so that nothing needs computing."""
        return self.matrix is None and self.target is None

    @property
    def lanes(self) -> torch.Size:
        """The leading axes: items, heads."""
        return self._storage.shape[: -2 if self.matrix is not None else -1]

    @property
    def _storage(self) -> Tensor:
        return self.matrix if self.matrix is not None else self.index  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self._storage.device

    def cpu(self) -> "Reduction":
        """The map with its tensors on the CPU."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in given.items()}
        return Reduction(**moved)

    def apply(self, x: Float[Tensor, "*lanes n d"]) -> Float[Tensor, "*lanes m d"]:
        """The output rows. A selection copies bits; sums run in the dtype of `x`.

        What has no weight in an output does not reach it, be it NaN.
        """
        if x.shape[-2] != self.n:
            raise WinnowError(
                f"Reduction of {self.n} source tokens got {x.shape[-2]} tokens of shape {tuple(x.shape)}."
            )
        if self.matrix is not None:
            return _product(self.matrix.to(x.dtype), x)
        if x.shape[:-2] != self.lanes:
            raise WinnowError(f"Reduction with lanes {tuple(self.lanes)} got tokens of shape {tuple(x.shape)}.")
        index = self.index[..., None].expand(*self.index.shape, x.shape[-1])  # type: ignore[index,union-attr]
        rows = x.gather(-2, index)
        if self.target is None:
            return rows
        gone, weight = self.target < 0, None if self.weight is None else self.weight.to(x.dtype)
        if weight is not None:
            # Of a weight that is being learned, finite tokens need the gradient at 0 as well.
            gone = gone | ((weight == 0) & _broken(x).gather(-1, self.index))  # type: ignore[arg-type]
        rows.masked_fill_(gone[..., None], 0)
        rows = rows if weight is None else rows * weight[..., None]
        to = self.target.clamp_min(0)[..., None].expand_as(rows)
        return x.new_zeros(*rows.shape[:-2], self.m, x.shape[-1]).scatter_add(-2, to, rows)

    def to_matrix(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*lanes m n"]:
        """The map as a dense matrix; rows of padding are zero."""
        if self.matrix is not None:
            return self.matrix.to(dtype)
        index, target = self.index, self.target
        live = torch.ones_like(index, dtype=dtype)  # type: ignore[arg-type]
        if target is None:
            target = torch.arange(self.m, device=self.device).expand_as(index)  # type: ignore[arg-type]
            live = live * self.valid.to(dtype)
        else:
            live = live * (target >= 0).to(dtype)
        value = live if self.weight is None else live * self.weight.to(dtype)
        flat = torch.zeros(*self.lanes, self.m * self.n, dtype=dtype, device=self.device)
        at = target.clamp_min(0) * self.n + index  # type: ignore[operator]
        return flat.scatter_add(-1, at, value).reshape(*self.lanes, self.m, self.n)

    @property
    def valid(self) -> Bool[Tensor, "*lanes m"]:
        """False for rows that pad a ragged lane."""
        slots = torch.arange(self.m, device=self.device)
        if self.counts is None:
            return torch.ones(*self.lanes, self.m, dtype=torch.bool, device=self.device)
        sizes = torch.tensor(self.counts, device=self.device).reshape(*self.lanes, 1)
        return slots < sizes

    def __matmul__(self, first: "Reduction") -> "Reduction":
        """`second @ first`: first, then second."""
        if self.n != first.m:
            raise WinnowError(f"Cannot compose: the first map gives {first.m} tokens, the second takes {self.n}.")
        if self.is_selection and first.is_selection and first.counts is None:
            index = first.index.gather(-1, self.index)  # type: ignore[union-attr,arg-type]
            return Reduction(first.n, self.m, index, counts=self.counts, ordered=self.ordered and first.ordered)
        representative = first.representatives.gather(-1, self.representatives)
        return replace(
            Reduction.mix(
                self.to_matrix() @ first.to_matrix(),
                representative=representative,
                ordered=self.ordered and first.ordered,
            ),
            counts=self.counts,
        )

    @property
    def representatives(self) -> Int[Tensor, "*lanes m"]:
        """The source that stands for each output: the one given, else the heaviest, the first among equals."""
        if self.representative is not None:
            return self.representative
        if self.is_selection:
            return self.index  # type: ignore[return-value]
        matrix = self.to_matrix()
        n = torch.arange(self.n, device=self.device)
        heaviest = matrix >= matrix.amax(-1, keepdim=True)
        return torch.where(heaviest, n, self.n).amin(-1)

    def sources(self, j: int) -> tuple[Tensor, ...] | Tensor:
        """Indices of the sources that feed output `j`: one tensor, or one for each lane."""
        used = self.to_matrix()[..., j, :] != 0
        if used.ndim == 1:
            return used.nonzero()[:, 0]
        return tuple(lane.nonzero()[:, 0] for lane in used.reshape(-1, self.n))

    @property
    def kept(self) -> Bool[Tensor, "*lanes n"]:
        """Which sources reach any output."""
        return (self.to_matrix() != 0).any(-2)

    @property
    def sourced(self) -> Bool[Tensor, "*lanes m"]:
        """Whether an output has any source; the row of a [CLS] token, in content tokens, has none."""
        return self.valid if self.is_selection else (self.to_matrix() != 0).any(-1)

    @property
    def mass(self) -> Float[Tensor, "*lanes m"]:
        """Sum of the weights of each output: 1 for a copy or a mean, the cluster size for a sum."""
        return self.to_matrix().sum(-1)

    @property
    def is_stochastic(self) -> bool:
        """Whether each output is a weighted mean of its sources: weights ≥ 0 that sum to 1."""
        matrix = self.to_matrix()
        sums = torch.where(self.valid, matrix.sum(-1), torch.ones((), device=self.device))
        return bool((matrix >= 0).all()) and bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-6))

    def expand(self, y: Float[Tensor, "*lanes m d"]) -> Float[Tensor, "*lanes n d"]:
        """Unmerge: each source gets the output that it feeds (the heaviest where several); dropped ones get zeros."""
        if self.m == 0:
            return y.new_zeros(*self.lanes, self.n, y.shape[-1])
        owner = self.to_matrix().abs().argmax(-2)
        rows = y.gather(-2, owner[..., None].expand(*owner.shape, y.shape[-1]))
        return torch.where(self.kept[..., None], rows, torch.zeros((), dtype=y.dtype, device=y.device))

    def lane(self, i: int) -> "Reduction":
        """The map of one item of the first axis, without that axis; ragged padding is cut."""
        inner = math.prod(self.lanes[1:])
        own = None if self.counts is None else self.counts[i * inner : (i + 1) * inner]
        m = self.m if own is None else max(own)
        counts = own if own is not None and len(set(own)) > 1 else None

        def take(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[i]

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[i][..., :m]

        if self.matrix is not None:
            matrix = self.matrix[i][..., :m, :]
            return Reduction(
                self.n, m, matrix=matrix, counts=counts, representative=cut(self.representative), ordered=self.ordered
            )
        return Reduction(
            self.n,
            m,
            cut(self.index) if self.target is None else take(self.index),
            take(self.target),
            take(self.weight),
            counts=counts,
            representative=cut(self.representative),
            ordered=self.ordered,
        )


def _product(matrix: Float[Tensor, "*lanes m n"], x: Float[Tensor, "*lanes n d"]) -> Float[Tensor, "*lanes m d"]:
    """`matrix @ x`, in which a broken token breaks those rows alone in which it has weight."""
    broken = _broken(x)
    reached = (matrix.detach() != 0).to(x.dtype) @ broken.to(x.dtype)[..., None] > 0
    return (matrix @ x.masked_fill(broken[..., None], 0)).masked_fill(reached, torch.nan)


def _broken(x: Float[Tensor, "*lanes n d"]) -> Bool[Tensor, "*lanes n"]:
    """Which tokens are NaN or infinite anywhere."""
    return ~x.detach().sum(-1, dtype=torch.promote_types(x.dtype, torch.float32)).isfinite()
