"""Candidates: all of the registry at first, then plans near the leaders."""

from __future__ import annotations

import itertools

import pytest

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo
from winnow.core.plan import Plan
from winnow.core.plan_file import write_plan_file
from winnow.core.registry import picture_methods
from winnow.methods.divprune import DivPrune
from winnow.methods.fastervlm import FasterVLM
from winnow.methods.fastv import FastV
from winnow.methods.pyramiddrop import PyramidDrop
from winnow.tuning.candidates import Candidate, Part, children, first, usable

INFO = ModelInfo("LLaVA", depth=32, vision_depth=24, feature_layer=-2)
LATER = [FastV(), PyramidDrop(), FasterVLM()]


def texts(found) -> list[str]:
    return [str(c.plan) for c in found]


def child_texts(parent: Candidate, *, faster: bool = True, **options) -> list[str]:
    return texts(children(parent, INFO, LATER, faster=faster, **options))


def test_the_first_candidates_are_every_method_of_the_registry_at_every_budget():
    found = first((), ("25%", "32"), 256)
    slugs = [entry.slug for entry in picture_methods() if entry.family != "user" and entry.kind == "training-free"]
    by_slug = {slug: [c for c in found if c.plan.methods[0].slug == slug] for slug in slugs}
    assert sum(map(len, by_slug.values())) == len(found)
    assert all(1 <= len(own) <= 2 for own in by_slug.values())
    assert all(c.table for c in found)
    assert {c.parts[0].budget for c in by_slug["divprune"]} == {64, 32}


def test_plans_and_plan_files_keep_their_own_settings(tmp_path):
    file = write_plan_file(tmp_path / "a.plan.json", "fastv:keep=10 | positions=compact", {})
    found = first((str(file), "fastervlm:keep=9 + fastv:keep=3", "fastv:keep=10 | positions=compact"), ("25%",), 256)
    assert texts(found) == ["fastv:keep=10 | positions=compact", "fastervlm:keep=9 + fastv:keep=3"]
    assert not any(c.table for c in found)
    assert first(("fastv:keep=10 | positions=compact",), (1,), 9, positions="keep")[0].plan == Plan.of("fastv:keep=10")


def test_nothing_to_try_is_a_mistake():
    with pytest.raises(WinnowError, match="no candidate"):
        first(("full | positions=keep",), ("25%",), 256)
    with pytest.raises(WinnowError, match="nonesuch"):
        first(("nonesuch",), ("25%",), 256)
    with pytest.raises(WinnowError, match="keep='many'"):
        first((), ("many",), 256)


def at(method, budget: int, content: int = 256) -> Candidate:
    return Candidate((Part(method.at_budget(budget, content), budget, content),), table=True)


def test_children_have_other_budgets_compositions_settings_and_positions():
    found = child_texts(at(FasterVLM(), 64))
    assert found[0] == "fastervlm:keep=45"
    assert found[1:5] == [
        "fastervlm + fastv:keep=32",
        "fastervlm + pyramiddrop:ratios=[51,40,32]",
        "fastervlm + fastv:keep=16",
        "fastervlm + pyramiddrop:ratios=[40,25,16]",
    ], "behind the last step only, at a half and a quarter"
    assert "fastervlm:padding=true" in found
    assert found[-1] == "fastervlm | positions=compact"
    more = child_texts(at(FasterVLM(), 64), faster=False)
    assert more[0] == "fastervlm:keep=91"
    assert not any("+" in text for text in more)
    assert "positions" not in " ".join(child_texts(at(FasterVLM(), 64), positions="keep"))


def test_a_layer_is_tried_at_quarters_of_the_depth():
    found = child_texts(at(FastV(), 64))
    assert {f"fastv:keep=64,layer={layer}" for layer in (8, 16, 24)} <= set(found)


def test_a_composed_plan_changes_each_of_its_parts_and_never_keeps_more_behind_than_before():
    parts = (Part(DivPrune(keep=40), 40, 256), Part(FastV(keep=32), 32, 40))
    found = child_texts(Candidate(parts))
    assert found[0] == "divprune:keep=40 + fastv:keep=23"
    assert not any(text.startswith("divprune:keep=28 +") for text in found), "28 tokens would not leave 32"
    up = child_texts(Candidate(parts), faster=False)
    assert not any("fastv:keep=45" in text for text in up)
    assert up[0] == "divprune:keep=57 + fastv:keep=32"


def test_children_are_never_their_parent_and_all_can_be_written_and_read():
    for parent in itertools.chain(first((), ("25%",), 256), [at(FastV(), 2), at(FasterVLM(), 1)]):
        found = list(children(parent, INFO, LATER, faster=True))
        assert parent.key not in {c.key for c in found}
        assert all(Plan.of(c.key) == c.plan for c in found)
        assert not any(c.table for c in found)


def test_what_the_model_cannot_run_is_left_out_with_the_reason():
    def bind(plan):
        if plan.methods[0].slug == "fastv":
            raise UnsupportedError("no layers here")

    good, bad = usable(first(("fastv", "divprune"), ("25%",), 256), bind)
    assert texts(good) == ["divprune:keep=64"]
    assert bad == {"fastv:keep=64": "no layers here"}
