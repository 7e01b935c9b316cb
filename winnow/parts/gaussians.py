"""How near points lie to a centre: the sum of five Gaussians, as VidCom² and STC measure likeness."""

from jaxtyping import Float
from torch import Tensor

VARIANCES = (0.125, 0.25, 0.5, 1.0, 2.0)


def gaussians(difference: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
    """From 5 for no difference down to 0: the sum over the variances of exp(−|difference|² / 2 variance)."""
    distance = difference.square().sum(-1)
    return sum((-distance / (2 * variance)).exp() for variance in VARIANCES)  # type: ignore[return-value]
