"""The gate of QTSplus in training: as many are kept as were asked for, and gradients say which and how many."""

from __future__ import annotations

import pytest
import torch

from winnow.parts.counted_gate import gate, standard, threshold, threshold_naive


def scores(seed: int, b: int = 1, n: int = 200) -> torch.Tensor:
    """Attention, sharply peaked."""
    return torch.randn(b, n, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)


def logistic(seed: int, shape) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).clamp(1e-6, 1 - 1e-6).logit()


@pytest.mark.system("qtsplus", "exact")
@pytest.mark.parametrize("tau", [0.1, 0.5])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_probabilities_add_up_to_the_number(share, tau):
    for seed in range(5):
        r = standard(scores(seed, 3))
        count = torch.tensor([share * 200] * 3)
        t = threshold(r, count, tau)
        assert (((r - t[:, None]) / tau).sigmoid().sum(1) - count).abs().max() <= 1e-2
        for row, own in zip(r, t, strict=True):
            assert abs(float(own) - threshold_naive(row.tolist(), share * 200, tau)) <= 1e-3


@pytest.mark.system("qtsplus", "exact")
def test_where_newton_cannot_go_on_the_interval_is_halved():
    """Two groups far apart: between them every probability is 0 or 1, and the denominator is nothing."""
    r = torch.tensor([[-100.0] * 5 + [100.0] * 5])
    for count in (2.0, 5.0, 8.0):
        t = threshold(r, torch.tensor([count]), 0.1)
        assert (((r - t[:, None]) / 0.1).sigmoid().sum() - count).abs() <= 1e-2


@pytest.mark.system("qtsplus", "exact")
def test_the_threshold_has_the_gradients_of_its_equation():
    r = standard(scores(3, 2, 30)).double().requires_grad_()
    count = torch.tensor([6.0, 12.0], dtype=torch.float64, requires_grad=True)
    threshold(r, count, 0.5).sum().backward()
    step = 1e-5
    for lane in range(2):
        more, less = (threshold_naive(r[lane].tolist(), count.tolist()[lane] + s, 0.5) for s in (step, -step))
        assert abs(float(count.grad[lane]) - (more - less) / (2 * step)) <= 1e-3
    moved = [r[0].tolist() for _ in range(2)]
    moved[0][4] += step
    moved[1][4] -= step
    more, less = (threshold_naive(own, 6.0, 0.5) for own in moved)
    assert abs(float(r.grad[0, 4]) - (more - less) / (2 * step)) <= 1e-3


def kept_share(share: float, tau: float, compat: bool) -> float:
    """The mean share that is kept of a hundred samples."""
    r = scores(7, 100)
    r = r if compat else standard(r)
    return float(gate(r, torch.full((100,), share * 200), tau, logistic(1, r.shape), compat=compat).mean())


@pytest.mark.system("qtsplus", "exact")
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_as_many_are_kept_as_were_asked_for(share):
    for tau in (0.1, 0.5):
        assert abs(kept_share(share, tau, compat=False) - share) <= 0.05 * share
    assert abs(kept_share(0.05, 0.1, compat=True) - 0.05) > 0.3  # the released code keeps four of ten


def test_all_are_kept_where_all_are_asked_for():
    r = standard(scores(0, 2, 20))
    assert gate(r, torch.full((2,), 20.0), 0.5, logistic(0, r.shape)).tolist() == [[1.0] * 20] * 2


@pytest.mark.system("qtsplus", "exact")
def test_gradients_reach_the_scores_and_the_count():
    r = standard(scores(5, 2)).requires_grad_()
    count = torch.tensor([20.0, 60.0], requires_grad=True)
    worth = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    drawn = gate(r, count, 0.5, logistic(2, r.shape))
    assert set(drawn.detach().unique().tolist()) == {0.0, 1.0}
    (drawn * worth).sum().backward()
    assert (r.grad.abs() > 1e-6).float().mean() > 0.5
    assert (count.grad.abs() > 1e-4).all()
    assert gate(r, count, 0.5, logistic(2, r.shape)).sum(1).gt(0).all()
