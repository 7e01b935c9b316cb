"""Checks of settings say what was got and what is allowed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from winnow.core.errors import WinnowError
from winnow.parts import settings


def _method(value):
    return SimpleNamespace(slug="some-method", it=value)


@pytest.mark.parametrize("value", ["sums", None, 3, True])
def test_one_of(value):
    settings.one_of(_method("sum"), "it", ("sum", "max"))
    with pytest.raises(WinnowError, match=r"some-method: it=.*; allowed: sum, max\."):
        settings.one_of(_method(value), "it", ("sum", "max"))


@pytest.mark.parametrize("value", [1, "true", None])
def test_switch(value):
    settings.switch(_method(False), "it")
    with pytest.raises(WinnowError, match="allowed: true, false"):
        settings.switch(_method(value), "it")


@pytest.mark.parametrize("value", [-1, 1.0, True, "1", None])
def test_whole(value):
    settings.whole(_method(0), "it", 0)
    settings.whole(_method(-3), "it", -3, least=None)
    with pytest.raises(WinnowError, match="allowed: an int ≥ 0"):
        settings.whole(_method(value), "it", value)


@pytest.mark.parametrize("value", ["last", 1.5, None, False])
def test_block(value):
    for good in ("feature", -2, 0):
        settings.block(_method(good), "it")
    with pytest.raises(WinnowError, match="allowed: feature, or the number of a vision block"):
        settings.block(_method(value), "it")


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), "0.5", True, None])
def test_share(value):
    for good in (0, 0.5, 1):
        settings.share(_method(good), "it")
    with pytest.raises(WinnowError, match="allowed: a number from 0 to 1"):
        settings.share(_method(value), "it")
