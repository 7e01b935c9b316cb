"""A very small reference model with weights that make its answers differ, and a few questions for it."""

from __future__ import annotations

import functools
import math
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import settings
from transformers.trainer_utils import set_seed

from winnow.bench.runner import bench
from winnow.bench.store import Store
from winnow.bench.tasks import world_task
from winnow.reference.build import make_model, make_processor
from winnow.reference.presets import PRESETS

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

METHODS = ("fastervlm", "fastv")
BUDGETS = ("16", "4")
QUESTIONS = 8
BASELINES = ("random", "uniform", "downsample", "ceiling", "oracle")


@functools.cache
def _built():
    """64 visual tokens, 3 LM layers. Larger weights than at the start of training: no argmax hangs on rounding."""
    set_seed(0)
    model = make_model(PRESETS["micro"], seed=3).eval()
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "position" not in name:
            scale = 0.5 if "embed_tokens" in name else 1.5 / math.sqrt(weight.shape[1])
            weight.data.normal_(0, scale, generator=generator)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # writes into the configuration: a run is the same before and after a test saves
    return model, make_processor(PRESETS["micro"])


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def little():
    """(model, processor)"""
    return _built()


@pytest.fixture(scope="session")
def task():
    return world_task(QUESTIONS, seed=40)


OPTIONS = {"batch": 4, "max_new_tokens": 3, "checked": 0, "baselines": ()}


def _finished(folder: str, task) -> tuple[Path, str, int]:
    """The file of a finished sweep of the defaults, the key of its run, and how often it called `generate`."""
    model, processor = _built()
    file = Path(folder) / "finished.sqlite"
    with pytest.MonkeyPatch.context() as patch, Store(file, create=True) as store:
        calls = counted(patch, model)
        key = bench(model, processor, METHODS, BUDGETS, task, store, **OPTIONS)
    return file, key, len(calls)


@pytest.fixture(scope="session")
def whole(task, tmp_path_factory):
    """(file, key, calls of `generate`): a finished sweep of the defaults, made once. Tests take a copy: `finished`."""
    return _finished(str(tmp_path_factory.mktemp("whole")), task)


@pytest.fixture
def finished(sweep, whole, tmp_path):
    """`finished(store="a.sqlite")` is what `sweep(store)` would return, without asking anything."""

    def copy(store="a.sqlite"):
        shutil.copy(whole[0], tmp_path / store)
        return sweep.opened(store), whole[1]

    return copy


@pytest.fixture
def sweep(little, task, tmp_path):
    """Run a small sweep into a store: `sweep(store="a.sqlite", **settings)` returns (store, key of the run)."""
    opened = []

    def open_store(store):
        opened.append(Store(tmp_path / store, create=True))
        return opened[-1]

    def run(store="a.sqlite", *, methods=METHODS, budgets=BUDGETS, task=task, model=little[0], **settings):
        results = open_store(store)
        return results, bench(model, little[1], methods, budgets, task, results, **(OPTIONS | settings))

    run.opened = open_store

    yield run
    for results in opened:
        results.close()


@pytest.fixture
def exported(tmp_path):
    """The bytes of a store's export."""

    def read(store):
        return store.export_json(tmp_path / "export.json").read_bytes()

    return read


@pytest.fixture
def generated(monkeypatch, little):
    """Counts the calls of the model's `generate`."""
    return counted(monkeypatch, little[0])


def counted(monkeypatch, model) -> list[int]:
    calls: list[int] = []
    plain = type(model).generate

    def counting(self, *args, **kwargs):
        calls.append(1)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", counting)
    return calls
