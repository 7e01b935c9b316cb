"""What every registered method promises, whatever it does. A new method is tested by being registered."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from winnow.core.registry import entries, method_class
from winnow.testing import CHECKS, WITH_CLS, Picture, Subject, run

SLUGS = [entry.slug for entry in entries()]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("slug", SLUGS)
def test_every_method(slug, check):
    check(Subject(method_class(slug)))


NOT_THE_LOWEST = {
    "hiprune": "neighbours of the anchor, the token below it among them, come before the third token",
    "visionzip": "keeps [CLS] and merges the rest",
}


@pytest.mark.parametrize("slug", [slug for slug in SLUGS if slug not in NOT_THE_LOWEST])
def test_ties_go_to_the_lowest_index(slug):
    subject = Subject(method_class(slug), infos=(WITH_CLS,))
    for act in subject.acts(**({"keep": 7} if subject.has_keep else {})):
        view = subject.view(act, Picture.grid(6, 5))
        flat = {signal: torch.ones_like(x) for signal, x in view.signals.items()}
        found = run(act.step, replace(view, tokens=torch.ones_like(view.tokens), signals=flat))
        if act.number == 0:
            assert found.index.tolist() == [list(range(found.m))] * view.b


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: reads of the device cannot be seen on a CPU")
@pytest.mark.parametrize("slug", SLUGS)
def test_first_step_never_waits_for_the_device(slug):
    subject = Subject(method_class(slug), infos=(WITH_CLS,))
    act = next(iter(subject.acts(**({"keep": 9} if subject.has_keep else {}))))
    step = act.step
    for picture in (Picture.grid(6, 5), Picture.tiled(4, 2, 1)):
        view = on_device(subject.view(act, picture), "cuda")
        want = run(step, subject.view(act, picture))
        run(step, view)  # fills the caches of layouts
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = run(step, view)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert found.anchors.tolist() == want.anchors.tolist()


def on_device(view, device):
    signals = {signal: x.to(device) for signal, x in view.signals.items()}
    return replace(view, tokens=view.tokens.to(device), ids=view.ids.to(device), signals=signals, notes={})
