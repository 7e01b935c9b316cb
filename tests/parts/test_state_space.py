"""The scan that Selective S4 chooses by: a convolution that is the recurrence, at a cost linear in tokens."""

from __future__ import annotations

import pytest
import torch

from winnow.parts.learned import untrained
from winnow.parts.state_space import Mixer, StateSpace, state_space_naive
from winnow.testing.largest import Largest


def made(seed=0, width=12, states=4):
    space = untrained(lambda: StateSpace(width, states), seed)
    with torch.no_grad():
        space.step_bias.copy_(torch.linspace(-0.5, 0.5, width))
        space.skip.copy_(torch.linspace(0, 2, width))
    return space


def _is_the_recurrence(scan):
    for seed, n in ((0, 1), (1, 2), (2, 37), (3, 64)):
        space = made(seed)
        u = torch.randn(2, n, 12, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(scan(space, u), state_space_naive(space, u), atol=1e-4, rtol=1e-4)


@pytest.mark.system("selective-s4", "exact")
@torch.no_grad()
def test_the_convolution_is_the_recurrence():
    _is_the_recurrence(lambda space, u: space(u))


def forward_alone(space, u):
    """What has come so far, without what comes from behind."""
    given = space.read.clone()
    space.read[:, 2 * space.states :] = 0
    out = space(u)
    space.read.copy_(given)
    return out


def round_the_circle(space, u):
    """A convolution without room for what goes over the end."""
    n, (rate, weight) = u.shape[1], space.discrete()
    powers = (rate[..., None] * torch.arange(n)).exp()
    ahead, back = 2 * torch.einsum("dcs,csn->dcn", weight, powers).real
    kernel = ahead + torch.cat([back[:, :1], back[:, 1:].flip(1)], 1)
    return torch.fft.irfft(torch.fft.rfft(u.mT) * torch.fft.rfft(kernel), n=n).mT + space.skip * u


@pytest.mark.parametrize("stub", [forward_alone, round_the_circle])
@torch.no_grad()
def test_the_recurrence_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _is_the_recurrence(stub)


@pytest.mark.system("selective-s4", "exact")
@torch.no_grad()
def test_a_token_reaches_all_others_and_slow_channels_reach_farther():
    space, u = made(), torch.zeros(1, 200, 12)
    u[0, 100] = 1
    out = space(u)[0].abs()
    assert (out[[99, 101]] > 0).all()
    far = out[150] / out[101]
    assert far[0] > 10 * far[-1]


@pytest.mark.system("selective-s4", "exact")
@torch.no_grad()
def test_memory_is_linear_in_tokens():
    mixer, sizes = untrained(lambda: Mixer(12, 4)), []
    for n in (512, 1024, 2048):
        with Largest() as seen:
            mixer(torch.randn(1, n, 12))
        sizes.append(seen.elements)
    assert sizes[1] <= 2.01 * sizes[0]
    assert sizes[2] <= 2.01 * sizes[1]


def test_all_that_is_learned_gets_a_gradient():
    mixer = untrained(lambda: Mixer(12, 4))
    mixer(torch.randn(2, 30, 12, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in mixer.parameters())
