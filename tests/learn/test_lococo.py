"""Training of LoCoCo: its seed decides everything, a stopped run goes on, gradients come through one chunk."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import winnow
from tests.learn.resuming import check_resumes
from winnow.cli import app
from winnow.core.errors import WinnowError
from winnow.core.kv_budget import KVBudget
from winnow.learn.pruners.text import lococo
from winnow.learn.pruners.text.lococo import CHUNK, SHIPPED, Recipe, read, row_of, train
from winnow.methods.lococo import LoCoCo
from winnow.parts.learned import untrained
from winnow.reference import text

SMALL = 0.02  # of the recipe: 64 rows and 7 steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("text")
    text.make_model(text.config(width=32, layers=2, heads=4, groups=2, inner=32)).save_pretrained(target)
    return target


def test_a_run_is_its_seed_and_goes_on_where_it_stopped(folder, tmp_path):
    whole = check_resumes(train, tmp_path, stop=4, model=str(folder), scale=SMALL, save=2)
    model = lococo.load(str(folder))
    with winnow.compress(model, f"lococo:weights={whole},keep=32"):
        model(input_ids=row_of(1).ids)
    with pytest.raises(WinnowError, match="trained for another model"):
        winnow.compress(lococo.load(), f"lococo:weights={whole}")


def test_the_command_is_listed():
    assert "lococo" in CliRunner().invoke(app, ["train", "--help"]).output


def test_without_compression_chunks_are_the_model(folder):
    model, ids = lococo.load(str(folder)), row_of(3).ids
    with torch.no_grad():
        logits = torch.cat(list(read(model, ids, None, None)), 1)
        torch.testing.assert_close(logits, model(input_ids=ids).logits)


def test_a_convolution_learns_from_the_chunk_behind_its_compression_alone(folder):
    """The loss of a chunk says nothing to what was mixed two chunks before."""
    model = lococo.load(str(folder))
    recipe = Recipe(model, 1.0)
    module = untrained(recipe.make)
    method, made = LoCoCo(keep=32), list[Tensor]()

    def shorten(view):
        action = method.shorten(view, KVBudget(32))
        if view.layer == 0:
            action.k.matrix.retain_grad()
            made.append(action.k.matrix)
        return action

    ids = torch.randint(10, 300, (2, 3 * CHUNK), generator=torch.Generator().manual_seed(0))
    *_, last = read(model, ids, shorten, module)
    last.square().sum().backward()
    assert [matrix.grad is not None for matrix in made] == [False, True]
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in module[0].conv.parameters())
    assert all(x.grad is None for x in model.parameters())


def test_the_shipped_weights_are_for_the_shipped_model():
    facts = json.loads(SHIPPED.with_suffix(".json").read_text())
    assert facts["command"] == "winnow train lococo"
    with winnow.compress(text.load()[0], "lococo") as handle:
        assert facts["model"] == handle.info.fingerprint()
    trained, plain = facts["measured"]["trained"], facts["measured"]["untrained"]
    assert trained["loss_of_the_whole_cache"] < trained["loss"] < trained["loss_of_heavy_hitters"]
    assert trained["loss"] < plain["loss"]
