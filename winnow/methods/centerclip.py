"""CenterCLIP (arXiv 2205.00823): cluster the tokens of a few neighbouring frames, and keep the centres.

Looks at: tokens behind the projector, or before a block of the vision tower. Cost: for each segment of n tokens, of
which k are kept, O(n² · D) for distances, then O(n²) a round and O(n · k) for the start; spectral clustering O(n³).

The frames of a video are cut into segments of equal length. In each, k-medoids keep tokens as they are: the first is
the longest, each next one the farthest from those before it, and then clusters and their centres take turns until
nothing moves. Spectral clustering does the same on eigenvectors of a graph of like tokens. A picture is one segment.
Departs from the paper: there the tower goes on with segments in the place of frames, whose [CLS] are averaged, and the
whole is trained; here all blocks see single frames, and segments are clustered behind the projector. With `block` it is
done in the tower, in each frame or tile alone, which are segments of one frame. Where frames do not divide into
segments, the first ones have one more.
Departs from the released code: in a cluster of two both are the centre alike; the first is taken, where the code takes
the one that rounding favours (`ties=rounding`). Rounds end for each segment, not for a whole batch. On eigenvectors,
which are all of length 1, the first token comes first (code: by rounding). It has no language model behind it. Left out
are its windows in space and time for graphs, and embeddings of clusters, which are off in what it ships.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Int
from torch.nn.functional import normalize

import winnow.contract as wn
from winnow.parts.frames import frame_grid, whole_clip
from winnow.parts.medoids import distances, k_medoids, spectral
from winnow.parts.merge import weights_by_size
from winnow.parts.tower import prefix


@wn.register("centerclip")
class CenterCLIP(wn.Method):
    """Keep the medoids of the tokens of each segment of a few frames.

    Args:
        keep: content tokens of the item, or of each tile where there is a `block`, split equally over the segments.
        segments: of a video, as far as there are frames.
        form: k-`medoids`, or `spectral` clustering.
        metric: distance of two tokens, or of two rows of eigenvectors.
        aggregation: of a cluster its `medoid`, or the `mean` in the place of it.
        unit_length: whether tokens are compared at length 1, so that long ones do not count as far.
        ties: which of two tokens is the centre of both: the `first`, or as `rounding` of distances has it.
        sigma: width of the graph's weights, for spectral clustering.
        near: edges of a token to its nearest ones that stay in the graph; 0: all (authors: 5 for each frame).
        block: the block of the vision tower before which each tile is clustered by itself; none: behind the projector.
    """

    keep: wn.Budget = wn.Budget("50%")
    segments: Annotated[int, wn.Between(1)] = 6
    form: Literal["medoids", "spectral"] = "medoids"
    metric: Literal["euclidean", "manhattan", "cosine"] = "euclidean"
    aggregation: Literal["medoid", "mean"] = "medoid"
    unit_length: bool = False
    ties: Literal["first", "rounding"] = "first"
    sigma: Annotated[float, wn.Between(1e-6)] = 2.0
    near: wn.Count = 0
    block: wn.Block | None = None

    released = {"ties": "rounding", "positions": "keep"}
    pairwise = True
    across_frames = True

    def steps(self, info: wn.ModelInfo):
        if self.block is None:
            return (wn.Step(wn.Point("projected"), self._one_step),)
        return (wn.Step(wn.Point("blocks", wn.VisionKeys(self.block).block(info)), self._one_step),)

    def at_budget(self, budget, content: int):
        """As a share in the tower, because tiles do not know of each other."""
        share = f"{float(100 * wn.Budget.parse(budget).share(content)):.8f}%"
        return self.replace(keep=budget if self.block is None else share)

    def reduce(self, view: wn.View) -> wn.Reduction:
        x = view.tokens.to(torch.promote_types(view.tokens.dtype, torch.float32))
        broken = ~x.sum(-1).isfinite()
        wn.count_broken(broken, view)
        x = x.masked_fill(broken[..., None], 0)
        segments, start = self._segments(view), prefix(view)
        kept = torch.arange(start, device=x.device).expand(view.b, -1)  # [CLS]
        cluster = torch.full_like(view.ids, -1)
        cluster[:, :start] = kept
        total = min(view.n - start, self.keep.of(view))
        quotas = wn.split_evenly(total, [own.shape[1] for own in segments])
        tokens = [x.gather(1, own[..., None].expand(-1, -1, x.shape[2])) for own in segments]
        found = self._medoids(tokens, [broken.gather(1, own) for own in segments], quotas)
        for own, (medoids, owner) in zip(segments, found, strict=True):
            cluster.scatter_(1, own, torch.where(owner < 0, -1, owner + kept.shape[1]))
            kept = torch.cat([kept, own.gather(1, medoids)], 1)
        representative, order = kept.sort(1)
        if self.aggregation == "medoid" or view.n == total + start:
            return wn.Reduction.select(representative, view.n)
        cluster = torch.where(cluster < 0, -1, order.argsort(1).gather(1, cluster.clamp_min(0)))
        sound = (~broken).to(x.dtype).scatter(1, kept, 1)  # of a broken token nothing goes into a mean
        weight, _ = weights_by_size(cluster.clamp_min(0), sound * (cluster >= 0), kept.shape[1])
        return wn.Reduction.assign(cluster, weight, m=kept.shape[1], representative=representative)

    def _segments(self, view: wn.View) -> list[Int[torch.Tensor, "b s"]]:
        """The tokens of each segment, frame by frame."""
        grid, start = frame_grid(view.layout, view.ids.device), prefix(view)
        if grid.frames == 1:
            return [torch.arange(start, view.n, device=view.ids.device).expand(view.b, -1)]
        at = whole_clip(view, self.slug).slot.argsort(1)
        count = min(self.segments, grid.frames)
        frames = wn.split_evenly(grid.frames, [grid.frames] * count)
        return list(at.split([n * grid.places for n in frames], dim=1))

    def _medoids(self, tokens: list[torch.Tensor], broken: list[torch.Tensor], quotas: tuple[int, ...]):
        """The medoids of each segment, and the cluster of each of its tokens (−1: none)."""
        if self.unit_length:
            tokens = [normalize(x, dim=-1) for x in tokens]
        length = [x.norm(dim=-1) for x in tokens]
        if self.form == "spectral":
            tokens = [spectral(x, k, self.sigma, self.near) for x, k in zip(tokens, quotas, strict=True)]
            length = [torch.zeros_like(own) for own in length]
        far = [distances(x, self.metric, even=self.ties == "first") for x in tokens]
        if self.ties == "rounding":  # as the code does, which moves what is rounded
            most = torch.stack([own.amax((1, 2)) for own in far]).amax(0)[:, None, None]
            far = [own - most - 1 for own in far]
        return [k_medoids(*own) for own in zip(far, length, quotas, broken, strict=True)]
