"""Runs of the shipped connectors whose recipes have more than one phase: a run that was stopped goes on as if not."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.learn.resuming import check_resumes
from winnow.learn.connectors.fit import fit
from winnow.reference import video

TINY = video.config(width=48, depth=2, tower_heads=2, layers=2, heads=2, inner=64)
SMALL = 0.017  # of a recipe: 16 clips or a few more, and 8 steps of each phase


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    target = tmp_path_factory.mktemp("video")
    video.make_model(TINY, 1).save_pretrained(target)
    video.make_tokenizer().save_pretrained(target)
    return target


# They share what stops and goes on; the quickest stands for all in the fast suite.
@pytest.mark.parametrize(
    ("slug", "stop"),
    [
        ("quicksviewer", 11),
        pytest.param("b-vllm", 12, marks=pytest.mark.full),
        pytest.param("videostreaming", 11, marks=pytest.mark.full),
    ],
)
def test_a_run_goes_on_where_it_stopped(slug, stop, folder, tmp_path):
    """Stopped behind the means, while the answers are learned."""
    check_resumes(functools.partial(fit, slug), tmp_path, stop=stop, model=str(folder), scale=SMALL, save=2)
