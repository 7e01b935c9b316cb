"""Cubes of a video (Quicksviewer): runs of frames that begin where the picture changes, and the tokens that read each.

A video is `[b, t, p, D]`: t frames of p places. `begins`, `[b, t]`, is 1 where a cube begins; frame 0 always does.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn
from torch.nn.functional import gelu

from winnow.core.reduction import Reduction
from winnow.core.select import rank_of
from winnow.parts.evenly import evenly
from winnow.parts.gumbel import gumbel
from winnow.parts.sinusoid import sinusoid

NEW, HELD = 0.8, 0.2  # what a change weighs, and what those before it do
TEMPERATURE = 0.5
HEAD = 128  # channels of a head


def momentum(x: Float[Tensor, "b t *rest"]) -> Float[Tensor, "b s *rest"]:
    """How each frame but the first differs from the one before it, smoothed over time."""
    found: list[Tensor] = []
    for change in (x[:, 1:] - x[:, :-1]).unbind(1):
        found.append(NEW * change + HELD * found[-1] if found else change)
    return torch.stack(found, 1)


def number_of_cubes(frames: int, each: int) -> int:
    """Cubes of a video: as many borders as `each` frames in the mean ask for, one at least. A picture is one cube."""
    return 1 + min(max(round(frames / each) - 1, 1), frames - 1)


def hardened(score: Float[Tensor, "b s"], borders: int) -> Float[Tensor, "b t"]:
    """`begins` from scores of all frames but the first: 1 for the best ones, with the gradient of their scores."""
    chosen = (rank_of(score.detach()) < borders).to(score.dtype)
    return torch.cat([torch.ones_like(score[:, :1]), chosen + (score - score.detach())], 1)


def starts_of(begins: Float[Tensor, "b t"], cubes: int) -> Int[Tensor, "b c"]:
    """The first frame of each cube."""
    frames = begins.shape[1]
    at = torch.arange(frames, device=begins.device)
    return torch.where(begins.detach() > 0.5, at, frames).sort(1).values[:, :cubes]


def cube_of(begins: Float[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """The cube of each frame."""
    return (begins.detach() > 0.5).cumsum(1) - 1


def softmax_in_cubes(logits: Float[Tensor, "b q t p"], cube: Int[Tensor, "b t"]) -> Float[Tensor, "b q t p"]:
    """The softmax over all tokens of the cube of each token; its cost is linear in the tokens."""
    at = cube[:, None].expand(-1, logits.shape[1], -1)
    held = logits.detach().amax(3)
    peak = torch.full_like(held, -torch.inf).scatter_reduce(2, at, held, "amax").gather(2, at)
    own = (logits - peak[..., None]).exp()
    total = torch.zeros_like(held).scatter_add(2, at, own.sum(3)).gather(2, at)
    return own / total[..., None]


def summed_in_cubes(x: Float[Tensor, "b t q d"], cube: Int[Tensor, "b t"], cubes: int) -> Float[Tensor, "b c q d"]:
    """Sums over the frames of each cube."""
    at = cube[:, :, None, None].expand_as(x)
    return x.new_zeros(x.shape[0], cubes, *x.shape[2:]).scatter_add(1, at, x)


def sincos(at: Float[Tensor, "*lanes 3"], width: int) -> Float[Tensor, "*lanes d"]:
    """Sines and cosines of frame, row and column: a quarter of the channels, and three eighths for each side."""
    frame, row = 2 * (width // 8), 2 * (3 * width // 16)
    sizes = (frame, row, width - frame - row)
    return torch.cat([sinusoid(at[..., axis], size) for axis, size in enumerate(sizes)], -1)


def thumbnail_of(places: int, pool: int, device: torch.device) -> Float[Tensor, "m p"]:
    """1 where a place is part of a token of the thumbnail: `pool` neighbours, or about as many; one place is left."""
    tokens = min(max(1, places // pool), places - 1)
    part = torch.arange(places, device=device) * tokens // places
    return (part == torch.arange(tokens, device=device)[:, None]).float()


def thumbnail_weights(
    pooled: Float[Tensor, "m p"], begins: Float[Tensor, "b t"], broken: Bool[Tensor, "b t p"]
) -> Float[Tensor, "b t p"]:
    """What each token counts in the token of the thumbnail that its place is part of: a mean over first frames."""
    own = begins[..., None] * ~broken
    total = own.detach().sum(1) @ pooled.T @ pooled
    return own / total.clamp_min(1)[:, None]


def means_in_cubes(
    part: Int[Tensor, " p"], queries: int, broken: Bool[Tensor, "b t p"], cube: Int[Tensor, "b t"]
) -> Float[Tensor, "b q t p"]:
    """What each token weighs in the means over parts of the picture in each cube; broken ones do not count."""
    own = part == torch.arange(queries, device=part.device)[:, None]
    logits = torch.zeros(len(broken), queries, *broken.shape[1:], device=part.device)
    least = torch.finfo(logits.dtype).min
    return softmax_in_cubes(logits.masked_fill(~own[None, :, None] | broken[:, None], least), cube)


def map_of(
    weights: Float[Tensor, "b q t p"],
    begins: Float[Tensor, "b t"],
    broken: Bool[Tensor, "b t p"],
    pooled: Float[Tensor, "m p"],
    starts: Int[Tensor, "b c"],
    order: Int[Tensor, "b n"],
) -> Reduction:
    """Where the thumbnail and the tokens of the cubes come from; they take places of the first frame of their cube.

    Args:
        order: the token of the view at each place of each frame.
    """
    (_, q, t, p), m = weights.shape, len(pooled)
    source = order.unflatten(1, (1, t, p))
    target = m + cube_of(begins)[:, None, :, None] * q + torch.arange(q, device=order.device)[:, None, None]
    index, target = source.expand(-1, q, -1, -1).flatten(1), target.expand_as(weights).flatten(1)
    cells = m + evenly(p - m, q, order.device)
    slots = (starts[..., None] * p + cells).flatten(1)
    weight = weights.flatten(1)
    if m:
        mean = thumbnail_weights(pooled, begins, broken)
        to = pooled.argmax(0).expand_as(source[:, 0])
        index, target = torch.cat([order, index], 1), torch.cat([to.flatten(1), target], 1)
        weight = torch.cat([mean.flatten(1), weight], 1)
        slots = torch.cat([torch.arange(m, device=order.device).expand(len(order), -1), slots], 1)
    at = order.gather(1, slots)
    return Reduction.edges(index, target, weight, n=order.shape[1], m=slots.shape[1], representative=at)


class Cubing(nn.Module):
    """Scores of beginning a cube at each frame but the first.

    The momentum of the tokens, a linear layer on each and the mean over places are all linear, so that they are
    computed on the means of frames.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.hidden, self.out = nn.Linear(width, width), nn.Linear(width, 2)

    def logits(self, means: Float[Tensor, "b t d"]) -> Float[Tensor, "b s 2"]:
        return self.out(gelu(self.hidden(self.norm(self.token(momentum(means))))))

    def forward(self, means: Float[Tensor, "b t d"]) -> Float[Tensor, "b s"]:
        return (self.logits(means) / TEMPERATURE).softmax(-1)[..., 1]

    def noisy(self, means: Float[Tensor, "b t d"], noise: float, draws: torch.Generator) -> Float[Tensor, "b s"]:
        """The scores with so much of Gumbel's noise on the logits, for training."""
        z = self.logits(means)
        return ((z + noise * gumbel(z, draws)) / TEMPERATURE).softmax(-1)[..., 1]


class Reader(nn.Module):
    """Learned queries that read each cube by one cross-attention, and the thumbnail: the mean of the frames at borders.

    Keys have the sines of their frame, row and column; values have not.
    """

    def __init__(self, width: int, queries: int) -> None:
        super().__init__()
        most = max(1, width // HEAD)
        self.heads = next(h for h in range(most, 0, -1) if width % h == 0)
        self.queries = nn.Parameter(torch.zeros(queries, width))
        self.given, self.q, self.k, self.v, self.mixed, self.out, self.thumbnail = (
            nn.Linear(width, width) for _ in range(7)
        )
        self.norm_q, self.norm_x, self.norm = (nn.LayerNorm(width) for _ in range(3))

    def forward(
        self,
        pooled: Float[Tensor, "m p"],
        x: Float[Tensor, "b t p d"],
        broken: Bool[Tensor, "b t p"],
        place: Float[Tensor, "b p 2"],
        begins: Float[Tensor, "b t"],
        starts: Num[Tensor, "b c"],
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b q t p"]]:
        """The thumbnail's tokens and those of the cubes, one behind the other; and the attention, mean over heads.

        Args:
            pooled: the places of each token of the thumbnail; no rows give none.
            broken: tokens that are not read.
            starts: the first frame of each cube.
        """
        b, t, p, width = x.shape
        x = x.masked_fill(broken[..., None], 0)
        frame = torch.arange(t, device=x.device, dtype=x.dtype)[None, :, None, None].expand(b, t, p, 1)
        at = torch.cat([frame, place[:, None].expand(b, t, p, 2)], -1)
        rows = self.norm_x(self.given(x))
        q = self.q(self.norm_q(self.queries))[: p - len(pooled)].unflatten(-1, (self.heads, -1))  # no more than places
        k = self.k(rows + sincos(at, width)).unflatten(-1, (self.heads, -1))
        v = self.v(rows).unflatten(-1, (self.heads, -1))
        logits = torch.einsum("qhc,btphc->bhqtp", q, k) / q.shape[-1] ** 0.5
        logits = logits.masked_fill(broken[:, None, None], torch.finfo(x.dtype).min)
        cube = cube_of(begins)
        weights = softmax_in_cubes(logits.flatten(1, 2), cube).unflatten(1, logits.shape[1:3])
        read = torch.einsum("bhqtp,btphc->btqhc", weights, v).flatten(3)
        tokens = self.out(self.norm(self.mixed(summed_in_cubes(read, cube, starts.shape[1]))))
        mean = (thumbnail_weights(pooled, begins, broken)[..., None] * x).sum(1)
        thumbnail = self.thumbnail(pooled @ mean)
        return torch.cat([thumbnail, tokens.flatten(1, 2)], 1), weights.mean(1)


class CubeModule(nn.Module):
    """What is learned: where cubes begin, and what is read of them."""

    def __init__(self, width: int, queries: int) -> None:
        super().__init__()
        self.cubing, self.reader = Cubing(width), Reader(width, queries)


def hardened_naive(score: Sequence[float], borders: int) -> list[int]:
    """The first frames of the cubes of one video."""
    best = sorted(range(len(score)), key=lambda i: -score[i])[:borders]
    return sorted([0, *(i + 1 for i in best)])


def softmax_in_cubes_naive(logits: Float[Tensor, "q t p"], starts: Sequence[int]) -> Float[Tensor, "q t p"]:
    """The same for one video, a softmax for each cube."""
    ends = [*starts[1:], logits.shape[1]]
    parts = [logits[:, s:e].flatten(1).softmax(1).unflatten(1, (e - s, -1)) for s, e in zip(starts, ends, strict=True)]
    return torch.cat(parts, 1)
