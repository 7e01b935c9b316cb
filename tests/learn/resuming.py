"""What every run of training is held to: its seed is all of it, and stopped and resumed it is as if it had not been."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from winnow.core.errors import WinnowError
from winnow.learn import fitting


class Stopped(Exception):
    pass


def check_resumes(train: Callable[..., Path], folder: Path, stop: int, **options: Any) -> Path:
    """The weights of a run and what is said of them are those of one that was stopped at a step. Returns the weights.

    Args:
        train: takes the folder of a run, `resume`, and the options.
        stop: the step, counted over all phases.
    """
    options = {"quiet": True, **options}
    whole = train(folder / "whole", **options)
    cosine, steps = fitting.cosine, []

    def stopping(*given: Any) -> float:
        steps.append(given)
        if len(steps) == stop:
            raise Stopped
        return cosine(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "cosine", stopping)
        with pytest.raises(Stopped):
            train(folder / "parts", **options)
    with pytest.raises(WinnowError, match="already holds a run"):
        train(folder / "parts", **options)
    again = train(folder / "parts", resume=True, **options)
    for suffix in (".safetensors", ".json"):
        assert again.with_suffix(suffix).read_bytes() == whole.with_suffix(suffix).read_bytes()
    with pytest.raises(WinnowError, match="other options"):
        train(folder / "parts", resume=True, **(options | {"scale": 2 * options["scale"]}))
    for wrong in ({"seed": -1}, {"scale": 0.0}, {"scale": float("inf")}):
        with pytest.raises(WinnowError, match="scale is above 0, and seed is"):
            train(folder / "none", **(options | wrong))
    return whole
