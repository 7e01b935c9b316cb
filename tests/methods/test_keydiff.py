"""KeyDiff: kvpress's choice slot for slot, also block by block, and keys that stand out are found."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from winnow.methods.keydiff import KeyDiff

from .kvchecks import STUBS, KVView, check_kept, check_method, check_on_model, chosen, decoded, kept_by, refused, views


def _naive(keys):
    """Minus the cosine to the mean of all directions, one head after the other."""
    found = torch.empty(keys.shape[:3])
    for row in range(keys.shape[0]):
        for head in range(keys.shape[1]):
            units = [key / key.square().sum().sqrt() for key in keys[row, head]]
            mean = sum(units) / len(units)
            length = mean.square().sum().sqrt()
            found[row, head] = torch.stack([-(unit @ mean) / length for unit in units])
    return found


def _unlike(layer, k):
    return _naive(layer.keys)


def _blocks(keys, k, block):
    """The first k, then block by block the k best of those and of the block, for one head."""
    kept = list(range(k))
    for start in range(k, len(keys), block):
        held = kept + list(range(start, min(start + block, len(keys))))
        scores = _naive(keys[held][None, None])[0, 0]
        kept = sorted(held[i] for i in scores.argsort(descending=True)[:k].tolist())
    return kept


@pytest.mark.system("keydiff", "exact")
@pytest.mark.system("kvpress", "exact")
def test_keeps_what_kvpress_keeps():
    check_kept(lambda model, ids, k: kept_by(model, ids, f"keydiff:released,keep={k}"), _unlike)


@pytest.mark.parametrize("stub", STUBS)
def test_a_stub_does_not(stub):
    with pytest.raises(AssertionError):
        check_kept(stub, _unlike)


@pytest.mark.system("keydiff", "exact")
@pytest.mark.parametrize("block", [1, 7, 16, 99])
def test_block_by_block_as_the_paper_reads_prompts(block):
    view = views(n=43)
    found = chosen(KeyDiff(keep=11, block=block), view)
    for row in range(2):
        for head in range(2):
            assert found[row, head].tolist() == _blocks(view.keys[row, head], 11, block)
    assert (block == 99) == torch.equal(found, chosen(KeyDiff(keep=11), view))


@pytest.mark.system("keydiff", "exact")
@pytest.mark.parametrize("block", [None, 6])
def test_promises(block):
    check_method(KeyDiff(keep=9, block=block))
    equal = torch.ones(1, 2, 30, 4)
    assert chosen(KeyDiff(keep=4, block=block), KVView.of(equal, equal)).tolist() == [[[0, 1, 2, 3]] * 2]


@pytest.mark.system("keydiff", "exact")
def test_a_limit_weighs_what_is_left():
    method = KeyDiff(keep="100%", limit=12, every=2)
    cuts = 0
    for view, slots in decoded(method, views(n=10), steps=12):
        if view.n == 14:
            cuts += 1
            best = _naive(view.keys).topk(12).indices.sort(-1).values
            assert torch.equal(slots, view.slots.gather(2, best))
    assert cuts == 5


def _alike(view, index):
    """Mean cosine of two different keys that are kept."""
    units = normalize(view.keys.gather(2, index[..., None].expand(-1, -1, -1, 16)), dim=-1)
    k = index.shape[2]
    return ((units @ units.transpose(2, 3)).sum((2, 3)) - k).mean() / (k * (k - 1))


@pytest.mark.system("keydiff", "directional")
def test_keys_that_stand_out_are_kept_and_little_is_said_twice():
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randn(1, 2, 120, 16, generator=generator) + 3 * torch.randn(1, 2, 1, 16, generator=generator)
        planted = [13, 58, 59, 97]
        keys[:, :, planted] = torch.randn(1, 2, 4, 16, generator=generator) * 0.1 - keys.mean(2, keepdim=True) / 2
        view = KVView.of(keys, keys)
        for block in (None, 16):
            found = chosen(KeyDiff(keep=12, block=block), view)
            assert all(set(planted) <= set(found[0, head].tolist()) for head in range(2))
        for stub in (torch.arange(12), torch.arange(0, 120, 10)):
            assert not set(planted) <= set(stub.tolist())
            assert _alike(view, found) < _alike(view, stub.expand(1, 2, 12)) - 0.1


@pytest.mark.system("keydiff", "model")
@pytest.mark.parametrize("build", ["llama", "llava_clip"])
@pytest.mark.parametrize("plan", ["keep=30%", "keep=9,limit=9,every=2"])
def test_on_models(build, plan):
    check_on_model(build, f"keydiff:{plan}")


def test_bad_settings():
    refused(lambda: KeyDiff(block=0), "block=0")
    refused(lambda: KeyDiff(block=8, keep="mass=0.9"), "block=8 needs")
    refused(lambda: KeyDiff(block=8, keep=("visual=10%",)), "block=8 needs")
