"""Limits as users write them, and mistakes in them."""

from __future__ import annotations

import pytest

from winnow.core.errors import WinnowError
from winnow.tuning.limits import Limits


def test_limits_are_read_as_they_are_written():
    assert Limits.of(lose="1%") == Limits.of(lose=0.01) == Limits.of(lose="0.01") == Limits(lose=0.01)
    assert Limits.of(lose=0) == Limits.of(lose="0%") == Limits(lose=0.0)
    assert Limits.of(prefill_ms="40ms") == Limits.of(prefill_ms=40) == Limits(prefill_ms=40.0)
    assert Limits.of(kv_bytes="2MB") == Limits.of(kv_bytes=2_000_000) == Limits.of(kv_bytes="2000 kB")
    assert Limits.of(kv_bytes="2MiB").kv_bytes == 2**21
    said = str(Limits.of("1.5%", 40, "2MB"))
    assert (
        said
        == "at most 1.5 % of the answers lost, at most 40 ms to the first token, at most 2,000,000 bytes of KV cache"
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "No limit was given"),
        ({"lose": "100%"}, "allows any loss"),
        ({"lose": -0.1}, "a share such as 1%"),
        ({"lose": "much"}, "a share such as 1%"),
        ({"lose": "nan"}, "a share such as 1%"),
        ({"lose": True}, "a share such as 1%"),
        ({"prefill_ms": 0}, "milliseconds such as 40"),
        ({"prefill_ms": "40s"}, "milliseconds such as 40"),
        ({"kv_bytes": "2 apples"}, "a number of bytes"),
        ({"kv_bytes": 0}, "a number of bytes"),
        ({"kv_bytes": -5}, "a number of bytes"),
    ],
)
def test_mistakes_are_named_with_what_is_allowed(given, said):
    with pytest.raises(WinnowError, match=said):
        Limits.of(**given)


def test_what_costs_too_much():
    both = Limits.of(prefill_ms=40, kv_bytes=1000)
    assert [both.costs_too_much(*cost) for cost in ((40, 1000), (41, 1), (1, 1001))] == [False, True, True]
    assert not Limits.of(lose=0.1).costs_too_much(1e9, 1e9)
