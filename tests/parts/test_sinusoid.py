import pytest
import torch

from winnow.parts.sinusoid import sinusoid, sinusoid_naive


@pytest.mark.parametrize("width", [2, 7, 64])
def test_it_is_what_is_written_out(width):
    places = torch.tensor([[0.0, 1.0, 2.5], [31.0, 100.0, 3.0]])
    want = torch.tensor([[sinusoid_naive(float(p), width) for p in row] for row in places])
    assert (sinusoid(places, width) - want).abs().max() <= 1e-4
    assert torch.equal(sinusoid(places.long(), width), sinusoid(places.long().float(), width))


def test_places_differ():
    table = sinusoid(torch.arange(200), 64)
    assert (torch.cdist(table, table) + torch.eye(200)).min() > 0.1
