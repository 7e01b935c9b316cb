"""Settings: checked from their types, for every method by one table, with messages that say what is allowed."""

import math
import typing
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest

from winnow.core.budget import Budget
from winnow.core.errors import WinnowError
from winnow.core.kv_budget import KVBudget
from winnow.core.registry import built_in, method_class
from winnow.core.settings import Between, Block, Count, Layer, Share, checked, described, types_of
from winnow.core.signal import Signal
from winnow.signals.vision import VisionAttention, VisionKeys

BAD: dict[Any, tuple[Any, ...]] = {
    bool: (1, 0, "no", None, 1.0),
    int: (2.0, "2", True, math.nan, None, [1]),
    float: ("x", True, math.nan, math.inf, None),
    str: (3, 2.5, True, None, ["x"]),
}


def wrong(hint: Any) -> list[Any]:
    """Values that a type must refuse: of another type, out of range, an unknown word."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *bounds = get_args(hint)
        found = wrong(inner)
        for bound in bounds:
            kind = float if inner is float else int
            found += [kind(bound.least - 1)] if bound.least is not None else []
            found += [kind(bound.most + 1)] if bound.most is not None else []
        return found
    if origin is Literal:
        return [
            "no such word",
            7,
            None,
            [1],
            *(v.upper() for v in get_args(hint) if isinstance(v, str) and v.upper() != v),
        ]
    if hint == str | tuple[str, ...]:  # a plan with commas comes apart
        return [3, None, True, [], [3]]
    if origin in (typing.Union, UnionType):
        arms = [wrong(arm) for arm in get_args(hint) if arm is not type(None)]
        allowed = {type(None)} & set(get_args(hint))
        return [
            v for v in arms[0] if all(any(_same(v, w) for w in arm) for arm in arms) and not (allowed and v is None)
        ]
    if origin is tuple:
        inner = wrong(get_args(hint)[0])
        return [5, "x", *([v] for v in inner if v is not None)] + ([] if _is_signal(get_args(hint)[0]) else [()])
    if _is_signal(hint):
        return [3, "cls", None, VisionKeys() if hint is not VisionKeys else VisionAttention()]
    if hint is KVBudget:
        return [0, -1, 1.5, "much", True, None, "101%", "mass=2", [], ["smell=3%"], [0, 4], "0MB"]
    if hint is Budget:
        return [0, -1, 1.5, "much", True, None, "101%"]
    return list(BAD[hint])


def _is_signal(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Signal)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (a == b or a is b)


def refusal(cls: Any, name: str, value: Any) -> str:
    """What a method says of a setting; empty if it takes it."""
    try:
        cls.configured(**{name: value})
    except WinnowError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("slug", built_in())
def test_wrong_settings_are_named_with_their_value_and_what_is_allowed(slug):
    """Every setting of every method, with each value that its type must refuse."""
    cls, unclear = method_class(slug), []
    for name, hint in types_of(cls).items():
        values = wrong(hint)
        assert values, name
        for value in values:
            said = refusal(cls, name, value)
            shown = {repr(value), repr(tuple(value) if isinstance(value, list) else value)}
            if not (said.startswith(f"{slug}: {name}=") and "allowed: " in said and any(own in said for own in shown)):
                unclear.append((name, value, said))
    assert unclear == []
    assert types_of(cls).keys() == cls.settings().keys()


def test_a_value_that_is_taken_is_found():
    assert refusal(method_class("divprune"), "keep", 5) == ""
    assert "allowed: " in refusal(method_class("divprune"), "keep", 0)


@pytest.mark.parametrize("slug", built_in())
def test_defaults_are_what_the_types_allow(slug):
    cls = method_class(slug)
    method = cls()
    assert {name: getattr(method, name) for name in cls.settings()} == cls.defaults()


@pytest.mark.parametrize(
    ("hint", "value", "want"),
    [
        (Share, 0, 0),
        (Share, 1, 1),
        (float, 3, 3),
        (Count, 0, 0),
        (Layer | None, None, None),
        (Block, "feature", "feature"),
        (Block, -2, -2),
        (tuple[Layer, ...], [1, 2], (1, 2)),
        (tuple[Budget, ...], [0.5, "3"], (Budget(0.5), Budget(3))),
        (Literal[1, "one"], 1, 1),
        (Annotated[int, Between(1)] | None, 5, 5),
        (VisionAttention, VisionAttention(3), VisionAttention(3)),
        (tuple[VisionAttention, ...], [VisionAttention(3)], (VisionAttention(3),)),
        (int | Budget, 5, 5),
        (int | Budget, "5", Budget(5)),
    ],
)
def test_what_is_allowed_is_taken(hint, value, want):
    found = checked("m", "s", hint, value)
    assert (type(found), found) == (type(want), want)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (Share, "a number from 0 to 1"),
        (Count, "an int ≥ 0"),
        (Annotated[float, Between(None, 2)], "a number ≤ 2"),
        (Literal["a", "b"], "a, b"),
        (Literal["a", True], "a, true"),
        (bool, "true, false"),
        (Block, "an int, or feature"),
        (Layer | None, "an int ≥ 0, or none"),
        (tuple[Budget, ...], "a list of: a budget (64, 0.25, 25%)"),
        (VisionAttention, "a signal such as VisionAttention(…)"),
        (str, "a word"),
    ],
)
def test_types_in_words(hint, words):
    assert described(hint) == words
    with pytest.raises(WinnowError) as error:
        checked("some", "thing", hint, object)
    assert str(error.value).startswith("some: thing=")
    assert "allowed: " in str(error.value)


def test_a_class_that_is_no_setting_type_is_checked_as_it_is():
    with pytest.raises(WinnowError, match=r"m: where=3; allowed: dict"):
        checked("m", "where", dict, 3)
    assert checked("m", "where", dict, {}) == {}
