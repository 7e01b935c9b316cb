"""What every registered method promises, whatever it does. A new method is tested by being registered."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zoo

import winnow
from winnow.core import registry
from winnow.core.registry import built_in, method_class, token_methods
from winnow.testing import CHECKS, WITH_CLS, Picture, Subject, check_method, run

SLUGS = [entry.slug for entry in token_methods()]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("slug", SLUGS)
def test_every_method(slug, check):
    check(Subject(method_class(slug)))


@pytest.mark.parametrize("slug", [entry.slug for entry in built_in().values() if entry.of_cache])
def test_every_method_of_the_cache(slug):
    check_method(method_class(slug))


@pytest.mark.parametrize("slug", [entry.slug for entry in built_in().values() if entry.of_input])
def test_every_method_ahead_of_the_processor(slug):
    check_method(method_class(slug))


NOT_THE_LOWEST = {
    "audio-guided": "of a frame with none before it an even part stays",
    "evs": "of a frame with none before it an even part stays",
    "hiprune": "neighbours of the representative, the token below it among them, come before the third token",
    "ts-llava": "it looks at no token, and takes them at equal distances",
    "holov": "shares the budget over strips of the picture",
    "selective-s4": "its scan hears where equal tokens stand",
    "vispruner": "equal tokens are duplicates, of which those at even places of its list go",
}


@pytest.mark.parametrize("slug", [slug for slug in SLUGS if slug not in NOT_THE_LOWEST])
def test_ties_go_to_the_lowest_index(slug):
    """Of selections: what is merged stands for all."""
    subject = Subject(method_class(slug), infos=(WITH_CLS,))
    for act in subject.acts(**({"keep": 7} if subject.has_keep else {})):
        view = subject.view(act, Picture.grid(6, 5))
        flat = {signal: torch.ones_like(x) for signal, x in view.signals.items()}
        found = run(act.step, replace(view, tokens=torch.ones_like(view.tokens), signals=flat))
        if act.number == 0 and found is not None and found.is_selection:
            assert found.index.tolist() == [list(range(found.m))] * view.b


# How many tokens are left depends on the data: one read for each step.
READS_THE_DEVICE = {"b-vllm", "dyvte", "pixelprune", "prunevid"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: reads of the device cannot be seen on a CPU")
@pytest.mark.parametrize("slug", [slug for slug in SLUGS if slug not in READS_THE_DEVICE])
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
        assert found.representatives.tolist() == want.representatives.tolist()


def on_device(view, device):
    signals = {signal: x.to(device) for signal, x in view.signals.items()}
    return replace(view, tokens=view.tokens.to(device), ids=view.ids.to(device), signals=signals, notes={})


def test_the_signal_of_the_contract_page_runs_on_a_model(monkeypatch):
    """The page's example: a signal and a method that looks at it, in one block of code."""
    monkeypatch.setattr(registry, "_extra", dict(registry._extra))
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    page = (Path(__file__).parents[2] / "docs" / "contract.md").read_text(encoding="utf-8")
    block, of_cache = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {"__name__": "documentation"}
    exec(compile("from winnow.contract import *\n" + of_cache, "docs/contract.md", "exec", dont_inherit=True), names)  # noqa: S102
    check_method(names["SmallKeys"])
    exec(compile(block, "docs/contract.md", "exec", dont_inherit=True), names)  # noqa: S102
    check_method(names["MostChanged"])
    model, (sample,) = zoo.model("llava_clip"), zoo.samples("llava_clip", zoo.SINGLE)
    before_after = []
    block = model.model.vision_tower.encoder.layers[1]
    hook = block.register_forward_hook(lambda module, args, out: before_after.append((args[0], out)))
    with torch.no_grad():
        model(**sample)
    hook.remove()
    (before, after), keep = before_after[0], 6
    after = after[0] if isinstance(after, tuple) else after
    want = (after - before)[0, 1:].norm(dim=-1).topk(keep).indices.sort().values
    with winnow.compress(model, f"most-changed:keep={keep},change=BlockChange(layer=1)") as handle, torch.no_grad():
        model(**sample)
        assert handle.last.items[0].kept.tolist() == want.tolist()
