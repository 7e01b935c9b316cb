"""k-medoids against loops over lists; spectral clustering on planted clusters."""

from __future__ import annotations

import pytest
import torch

from winnow.parts.medoids import distances, k_medoids, k_medoids_naive, spectral


def _random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("metric", ["euclidean", "manhattan", "cosine"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 7), (30, 1), (30, 6), (61, 20)])
def test_fast_equals_naive(n, k, metric):
    for seed in range(3):
        x = _random(seed, 2, n, 8).double()
        far, length = distances(x, metric), x.norm(dim=-1)
        medoids, owner = k_medoids(far, length, k)
        for lane in range(2):
            want = k_medoids_naive(far[lane].tolist(), length[lane].tolist(), k)
            assert (medoids[lane].tolist(), owner[lane].tolist()) == want


def test_every_cluster_has_its_medoid_and_equal_tokens_go_to_the_first():
    x = _random(0, 1, 6, 4).repeat_interleave(3, 1)
    medoids, owner = k_medoids(distances(x, "euclidean"), x.norm(dim=-1), 9)
    assert medoids[0].tolist() == sorted(set(medoids[0].tolist()))
    assert owner[0, medoids[0]].tolist() == list(range(9))
    flat = torch.ones(1, 7, 3)
    medoids, owner = k_medoids(distances(flat, "euclidean"), flat.norm(dim=-1), 3)
    assert (medoids.tolist(), owner.tolist()) == ([[0, 1, 2]], [[0, 1, 2, 0, 0, 0, 0]])


def test_a_batch_is_its_items():
    x = _random(3, 4, 50, 12)
    medoids, owner = k_medoids(distances(x, "euclidean"), x.norm(dim=-1), 9)
    for i in range(4):
        own = x[i : i + 1]
        alone = k_medoids(distances(own, "euclidean"), own.norm(dim=-1), 9)
        assert torch.equal(alone[0][0], medoids[i])
        assert torch.equal(alone[1][0], owner[i])


def test_broken_tokens_are_medoids_only_when_no_others_are_left():
    x, broken = _random(4, 1, 8, 4), torch.tensor([[True, False, False, True, False, False, False, False]])
    x = x.masked_fill(broken[..., None], 0)
    for k in range(1, 9):
        medoids, _ = k_medoids(distances(x, "euclidean"), x.norm(dim=-1), k, broken)
        assert len(set(medoids[0].tolist())) == k
        assert len({0, 3} & set(medoids[0].tolist())) == max(0, k - 6)


@pytest.mark.parametrize("near", [0, 6])
def test_spectral_clusters_are_the_planted_ones(near):
    """Two arcs around one centre, which no distance to a medoid tells apart, and a third group far away."""
    angle = torch.linspace(0, 1.5 * torch.pi, 30)
    ring = torch.stack([angle.cos(), angle.sin()], 1)
    x = torch.cat([ring, 3 * ring, ring + 20])[None]
    group = torch.arange(3).repeat_interleave(30)
    rows = spectral(x, 3, 0.25, near)
    medoids, owner = k_medoids(distances(rows, "euclidean"), torch.zeros(1, 90), 3)
    assert group[medoids[0]].tolist() == [0, 1, 2]
    assert torch.equal(owner[0], group)
    _, plain = k_medoids(distances(x, "euclidean"), torch.zeros(1, 90), 3)
    assert not torch.equal(plain[0], group)
