"""Selective S4 by its card: a scan over all tokens chooses those that its classifier reads."""

from __future__ import annotations

import pytest
import torch

from winnow.core.layout import Layout
from winnow.core.view import View
from winnow.learn.longform.classifier import HEAT, Selective
from winnow.methods.selective_s4 import SelectiveS4
from winnow.parts.learned import untrained
from winnow.parts.selective import chosen

from .stubs import STUBS, ids, tokens

WIDTH = 16


def made(seed=0, classes=5):
    return untrained(lambda: Selective(WIDTH, classes, 12, 4), seed)


def view_of(seed=0, b=1, module=None, frames=5):
    view = View.of(tokens(seed, frames * 6, WIDTH, b), layout=Layout.grid(2, 3, frames))
    object.__setattr__(view, "module", (module or made(seed)).choose)
    return view


def place(frames=5):
    return torch.cartesian_prod(torch.arange(frames), torch.arange(2), torch.arange(3))[None]


def judged(choose, x, spots):
    """A token's score, written out behind the guide."""
    x = choose.guide(choose.embed(x, spots))[0]
    judge, half = choose.judge, x.shape[1] // 2
    hidden = torch.stack([judge.enter(row) for row in x])
    mean = hidden[:, half:].sum(0) / len(x)
    said = torch.stack([judge.judge(torch.cat([row[:half], mean])) for row in hidden])
    return said[:, 0] - said[:, 1]


def _keeps_the_best(choose):
    for seed in range(4):
        view = view_of(seed)
        score = judged(view.module, view.tokens, place())
        assert ids(choose(view, 7)) == score.topk(7).indices.sort().values.tolist()


@pytest.mark.system("selective-s4", "exact")
@torch.no_grad()
def test_the_best_by_the_scan_and_the_mean_stay_in_their_order():
    _keeps_the_best(lambda view, k: SelectiveS4(keep=k).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
@torch.no_grad()
def test_that_fails_for_a_stub(stub):
    with pytest.raises(AssertionError):
        _keeps_the_best(stub)


@pytest.mark.system("selective-s4", "exact")
@torch.no_grad()
def test_with_all_tokens_the_classifier_is_the_one_without_a_choice():
    module, x = made(), tokens(1, 30, WIDTH, 2)
    spots = place().expand(2, -1, -1)
    plain = module.classify(module.choose.embed(x, spots))
    for keep in (30, 31):
        assert torch.equal(module(x, spots, keep), plain)
    assert not torch.equal(module(x, spots, 29), plain)


@pytest.mark.system("selective-s4", "exact")
@torch.no_grad()
def test_what_the_classifier_reads_are_the_tokens_that_the_method_keeps():
    module = made(2)
    view = view_of(2, b=2, module=module)
    spots = place().expand(2, -1, -1)
    kept = SelectiveS4(keep=7).reduce(view).index
    x = module.choose.embed(view.tokens, spots)
    read = torch.stack([own[at] for own, at in zip(x, kept, strict=True)])
    torch.testing.assert_close(module(view.tokens, spots, 7), module.classify(read))


@pytest.mark.system("selective-s4", "exact")
def test_the_guide_follows_with_momentum_and_gets_no_gradient():
    module = made()
    fast, slow = module.classify.layers[0].mixer, module.choose.guide
    module.follow(0.95)  # the first time, at once
    assert all(torch.equal(a, b) for a, b in zip(slow.parameters(), fast.parameters(), strict=True))
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.add_(1)
    before = [p.clone() for p in slow.parameters()]
    module.follow(0.95)
    for a, b, old in zip(slow.parameters(), fast.parameters(), before, strict=True):
        torch.testing.assert_close(a, old / 11 + b * 10 / 11)
    module.updates.fill_(10_000)
    before = [p.clone() for p in slow.parameters()]
    module.follow(0.95)
    for a, b, old in zip(slow.parameters(), fast.parameters(), before, strict=True):
        torch.testing.assert_close(a, 0.95 * old + 0.05 * b)
    module.follow(0.0)
    assert all(torch.equal(a, b) for a, b in zip(slow.parameters(), fast.parameters(), strict=True))
    noise = torch.rand(1, 30, generator=torch.Generator().manual_seed(0))
    (module(tokens(0, 30, WIDTH), place(), 7, noise).sum() + contrast(module)).backward()
    still = [name for name, p in module.named_parameters() if p.grad is None]
    slow = ("choose.guide.", "classify.project_slow.")
    assert still == [name for name, _ in module.named_parameters() if name.startswith(slow)]


def contrast(module, seed=0):
    x = tokens(seed, 30, WIDTH, 3)
    spots = place().expand(3, -1, -1)
    return module.contrast(x, spots, x[:, 6:18], spots[:, 6:18])


@pytest.mark.system("selective-s4", "exact")
@torch.no_grad()
def test_the_contrast_is_its_formula_written_out():
    module, x, spots = made(3), tokens(3, 30, WIDTH, 3), place()[0]
    both = {}
    for name, part in (("long", slice(0, 30)), ("short", slice(6, 18))):
        embedded = module.choose.embed(x[:, part], spots[part].expand(3, -1, -1))
        fast = module.classify.project(module.classify.layers[0].mixer(embedded).mean(1))
        slow = module.classify.project_slow(module.choose.guide(embedded).mean(1))
        both[name] = [v / v.norm(dim=1, keepdim=True) for v in (fast, slow)]
    total = 0.0
    for query, key in (("short", "long"), ("long", "short")):
        for i in range(3):
            alike = [float(both[query][0][i] @ both[key][1][j]) / HEAT for j in range(3)]
            total += (torch.tensor(alike).logsumexp(0) - alike[i]) / 6
    torch.testing.assert_close(contrast(module, 3), total)


@pytest.mark.system("selective-s4", "exact")
def test_a_choice_is_exact_going_forward_and_has_the_gradient_of_its_chance():
    score = tokens(0, 9, 1)[..., 0].requires_grad_()
    kept, mask = chosen(score, 4, heat=0.5)
    assert kept.tolist() == [score[0].topk(4).indices.sort().values.tolist()]
    assert torch.equal(mask, torch.ones(1, 4))
    (grad,) = torch.autograd.grad(mask.sum(), score)
    chance = (score / 0.5).sigmoid().detach()
    want = torch.zeros(1, 9).scatter(1, kept, 1) * chance * (1 - chance) / 0.5
    torch.testing.assert_close(grad, want)
    assert torch.equal(chosen(score, 4, torch.full((1, 9), 0.5))[0], kept)  # noise of 0


@pytest.mark.system("selective-s4", "exact")
def test_noise_is_the_difference_of_two_gumbel_noises():
    """The first of two tokens is kept as often as the formula for logistic noises says."""
    g, count, d = torch.Generator().manual_seed(0), 40_000, 1.0
    score = torch.tensor([[d, 0.0]]).expand(count, 2)
    kept, _ = chosen(score, 1, torch.rand(count, 2, generator=g))
    e = torch.tensor(d).exp()
    want = e * (e - 1 - d) / (e - 1) ** 2
    assert abs((kept == 0).float().mean() - want) < 4 * (0.25 / count) ** 0.5


def test_broken_tokens_are_not_kept_and_change_no_other_score():
    view = view_of(5)
    clean = view.tokens.clone()
    view.tokens[0, 3, 2] = torch.nan
    view.tokens[0, 8, 0] = torch.inf
    kept = SelectiveS4(keep=28).reduce(view)
    assert not {3, 8} & set(ids(kept))
    assert int(view.notes["nan_scores"]) == 2
    other = view_of(5)
    other.tokens.copy_(clean)
    other.tokens[0, 3] = -torch.inf
    other.tokens[0, 8] = torch.nan
    score = SelectiveS4().score(other)
    rest = torch.tensor([i for i in range(30) if i not in (3, 8)])
    assert torch.equal(score[:, rest], SelectiveS4().score(view)[:, rest])


def test_the_order_of_tokens_and_their_frames_count():
    """A scan hears what came before; a set would not."""
    view = view_of(6)
    plain = SelectiveS4().score(view)
    turned = view_of(6)
    turned.tokens.copy_(view.tokens.flip(1))
    assert (SelectiveS4().score(turned).flip(1) - plain).abs().max() > 1e-3
