"""How salient tokens are to queries of an earlier moment (ToC3D), and queries that know how far they have moved."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

MOTION = 15  # velocity (2), time (1), 3 × 4 pose (12)
BANDS = 6


class QueryScores(nn.Module):
    """Logarithms of salience from the products of tokens and queries; any set of `queries` embeddings will do."""

    def __init__(self, width: int, dim: int, queries: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, dim)
        self.judge = nn.Linear(queries, 2)
        self.scale = dim**-0.5

    def forward(
        self, x: Float[Tensor, "b n c"], queries: Float[Tensor, "b q d"], mask: Float[Tensor, "b n"]
    ) -> Float[Tensor, "b n 2"]:
        """Logarithms that a token is salient, and that it is not. The mask weighs what earlier scores have kept."""
        products = torch.einsum("bnd,bqd->bnq", self.project(x * mask[..., None]), queries) * self.scale
        return self.judge(products).log_softmax(-1)


class TokenScores(nn.Module):
    """The same where there are no queries yet: each token beside the mean of all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.judge = nn.Sequential(nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, 2))

    def forward(self, x: Float[Tensor, "b n c"], mask: Float[Tensor, "b n"]) -> Float[Tensor, "b n 2"]:
        own, shared = self.enter(x * mask[..., None]).chunk(2, -1)
        weight = mask[..., None]
        mean = (shared * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1e-6)
        return self.judge(torch.cat([own, mean.expand_as(shared)], -1)).log_softmax(-1)


class Modulated(nn.Module):
    """A layer norm whose scale and shift come from a condition; it begins as a plain one."""

    def __init__(self, condition: int, dim: int) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Linear(condition, dim), nn.ReLU())
        self.scale, self.shift = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        seen = self.reduce(condition)
        return (1 + self.scale(seen)) * self.norm(x) + self.shift(seen)


class MotionQueries(nn.Module):
    """Queries of an earlier moment, told where they would be now: reference points, velocity, time, and own motion.

    Args:
        dim: of the queries.
        reach: metres that lie on either side of the vehicle.
    """

    def __init__(self, dim: int, reach: float) -> None:
        super().__init__()
        self.reach = reach
        self.place = nn.Sequential(nn.Linear(3 * 2 * BANDS, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.time = nn.Sequential(nn.Linear(2 * BANDS, dim), nn.LayerNorm(dim))
        self.of_place, self.of_content = (Modulated(MOTION * 2 * BANDS, dim) for _ in range(2))

    def forward(
        self,
        content: Float[Tensor, "b q d"],
        points: Float[Tensor, "b q 3"],
        velocity: Float[Tensor, "b q 2"],
        elapsed: Float[Tensor, " b"],
        pose: Float[Tensor, "b 3 4"],
    ) -> Float[Tensor, "b q d"]:
        """Queries now.

        Args:
            points: in the frame of then.
            pose: from the frame of then to that of now.
        """
        now = moved(points, pose) / (2 * self.reach) + 0.5
        seconds = elapsed[:, None, None].expand(-1, content.shape[1], 1)
        told = torch.cat([velocity, seconds, pose.flatten(1)[:, None].expand(-1, content.shape[1], -1)], -1)
        motion = waves(told)
        place = self.of_place(self.place(waves(now)), motion) + self.time(waves(seconds))
        return self.of_content(content, motion) + place


def moved(points: Float[Tensor, "b q 3"], pose: Float[Tensor, "b 3 4"]) -> Float[Tensor, "b q 3"]:
    return points @ pose[..., :3].mT + pose[:, None, :, 3]


def waves(x: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape e"]:
    """Sines and cosines of each number at doubling frequencies."""
    bands = torch.pi * 2.0 ** torch.arange(BANDS, device=x.device)
    angles = (x[..., None] * bands).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], -1)
