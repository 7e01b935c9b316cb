"""A linear state space along a sequence with a diagonal matrix (S4D): a mixer of tokens whose cost is linear in them.

Each channel u has states h' = A h + u, and is read as y = 2 Re(C h) + D u. Held constant over a step Δ, states follow
h ← exp(ΔA) h + (exp(ΔA) − 1) / A · u, so that y is a convolution of u. It is taken by an FFT, of O(n log n), from both
ends of the sequence, each with its own C.
"""

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn.functional import gelu

SLOWEST, FASTEST = 0.01, 0.5  # steps that channels begin with, from one to the other


class StateSpace(nn.Module):
    """The convolution, channel by channel.

    A begins as −1/2 + iπn and steps as equal ratios; what is learned is by how much they differ from that.

    Args:
        states: of each channel; each stands for a pair of conjugate ones.
    """

    first_step: Tensor

    def __init__(self, width: int, states: int = 16) -> None:
        super().__init__()
        self.states = states
        self.decay, self.turn = nn.Parameter(torch.zeros(width, states)), nn.Parameter(torch.zeros(width, states))
        self.read = nn.Parameter(torch.zeros(width, 4 * states))  # C: real and imaginary, forward and backward
        self.skip = nn.Parameter(torch.ones(width))
        self.step_bias = nn.Parameter(torch.zeros(width))
        ratio = torch.linspace(0, 1, width)
        self.register_buffer("first_step", SLOWEST * (FASTEST / SLOWEST) ** ratio, persistent=False)

    def discrete(self) -> tuple[Complex[Tensor, "c s"], Complex[Tensor, "2 c s"]]:
        """ΔA, and C (exp(ΔA) − 1) / A for each direction."""
        number = torch.arange(self.states, device=self.decay.device)
        a = torch.complex(-0.5 * self.decay.exp(), torch.pi * (number + self.turn))
        rate = a * (self.first_step.to(a.real) * self.step_bias.exp())[:, None]
        c = self.read.unflatten(1, (2, 2, self.states))
        return rate, torch.complex(c[:, :, 0], c[:, :, 1]).movedim(1, 0) * (rate.exp() - 1) / a

    def forward(self, u: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        n = u.shape[1]
        rate, weight = self.discrete()
        powers = (rate[..., None] * torch.arange(n, device=u.device)).exp()
        ahead, back = 2 * torch.einsum("dcs,csn->dcn", weight, powers).real
        # What comes from behind stands at the end of a circle of twice the length.
        kernel = torch.cat([ahead, torch.zeros_like(ahead)], 1)
        kernel = kernel + torch.cat([back[:, :1], torch.zeros_like(ahead), back[:, 1:].flip(1)], 1)
        spectrum = torch.fft.rfft(u.mT, n=2 * n) * torch.fft.rfft(kernel)
        return torch.fft.irfft(spectrum, n=2 * n)[..., :n].mT + self.skip * u


def state_space_naive(space: StateSpace, u: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
    """The same state by state and token by token: the reference that the convolution is tested against."""
    rate, weight = space.discrete()
    y = space.skip * u
    for direction, order in enumerate((range(u.shape[1]), reversed(range(u.shape[1])))):
        h = torch.zeros(u.shape[0], *rate.shape, dtype=rate.dtype)
        for t in order:
            h = rate.exp() * h + u[:, t, :, None]
            y[:, t] = y[:, t] + 2 * (weight[direction] * h).sum(-1).real
    return y


class Mixer(nn.Module):
    """A pre-norm layer around a state space."""

    def __init__(self, width: int, states: int = 16) -> None:
        super().__init__()
        self.norm, self.space = nn.LayerNorm(width), StateSpace(width, states)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return x + self.out(gelu(self.space(self.norm(x))))
