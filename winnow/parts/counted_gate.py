"""A gate that keeps a learned number of tokens in training, by their scores, with gradients for both (QTSplus).

Each token is kept with a probability σ((r − t) / τ), and the threshold t is where the probabilities add up to the
number that is wanted. What is drawn is 0 or 1; its gradient is that of the probability.
"""

import torch
from jaxtyping import Float
from torch import Tensor

ROUNDS = 10  # of Newton's method, as in the authors' code
HALVINGS = 60
NEAR = 1e-3  # of a token, by which the sum may miss the number


def threshold(
    r: Float[Tensor, "b n"], count: Float[Tensor, " b"], tau: float, rounds: int = ROUNDS
) -> Float[Tensor, " b"]:
    """t with Σ σ((r − t) / τ) = count, 0 < count < n; its gradients are those of the equation.

    Newton's method from the median; where its denominator vanishes, or it does not arrive, the interval is halved.
    """
    with torch.no_grad():
        t = _newton(r, count, tau, rounds)
        missed = ((r - t[:, None]) / tau).sigmoid().sum(1).sub(count).abs() > NEAR
        t = torch.where(missed | ~t.isfinite(), _halving(r, count, tau), t)
        slope = ((r - t[:, None]) / tau).sigmoid()
        slope = (slope * (1 - slope)).sum(1).clamp_min(1e-6) / tau
    # One more step of Newton's, whose derivative is that of the root by the implicit function theorem.
    return t + (((r - t[:, None]) / tau).sigmoid().sum(1) - count) / slope


def _newton(r: Tensor, count: Tensor, tau: float, rounds: int) -> Tensor:
    t = r.median(1).values
    for _ in range(rounds):
        p = ((r - t[:, None]) / tau).sigmoid()
        t = t + (p.sum(1) - count) * tau / (p * (1 - p)).sum(1)
    return t


def _halving(r: Tensor, count: Tensor, tau: float) -> Tensor:
    low, high = r.amin(1) - 40 * tau, r.amax(1) + 40 * tau
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        more = ((r - middle[:, None]) / tau).sigmoid().sum(1) > count
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return (low + high) / 2


def threshold_naive(r: list[float], count: float, tau: float) -> float:
    """The same of one row, by halving in double precision."""
    x = torch.tensor(r, dtype=torch.float64)
    low, high = float(x.min()) - 50 * tau, float(x.max()) + 50 * tau
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float(((x - middle) / tau).sigmoid().sum()) > count else (low, middle)
    return (low + high) / 2


def gate(
    r: Float[Tensor, "b n"],
    count: Float[Tensor, " b"],
    tau: float,
    noise: Float[Tensor, "b n"],
    *,
    compat: bool = False,
) -> Float[Tensor, "b n"]:
    """1 for tokens that are kept, 0 for the others, with the gradient of the probability to be kept.

    Args:
        r: scores.
        count: how many are kept in expectation; from 0 to n.
        noise: logistic, the difference of two Gumbel draws.
        compat: as the released code: logits r − t, which keep with probability σ(r − t) whatever τ is, and the gradient
            of a draw that is relaxed at temperature τ.
    """
    n = r.shape[1]
    t = threshold(r, count.clamp(1e-3, n - 1e-3), tau)
    logits = (r - t[:, None]) / (1 if compat else tau)
    soft = ((logits + noise) / tau if compat else logits).sigmoid()
    hard = ((logits + noise > 0) | (count >= n)[:, None]).to(r.dtype)
    return soft + (hard - soft).detach()


def standard(r: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """Scores with mean 0 and deviation 1 in each row: shares of attention are far smaller than any temperature."""
    mean = r.mean(1, keepdim=True)
    return (r - mean) / (r - mean).square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
