"""Greedy answers of vLLM with the plug-in are those of the library with the same plan, in fp32."""

from __future__ import annotations

from typing import Any

import pytest
from asking import Case, Library, answers

CLASSES = (
    "llava",
    "llava_siglip",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "idefics3",
    "smolvlm",
    "gemma3",
)
SOME = ("divprune:keep=40%", "fastervlm:keep=30%")
# All methods that vLLM can serve, by what the tower of the class has to show.
WITHOUT_CLS = (
    *SOME,
    "evs:keep=50%",
    "fopru:keep=6",
    "hiprune:keep=6",
    "holov:keep=6",
    "token-correlation-compression:keep=6",
    "vidcom2:keep=50%",
    "vispruner:keep=6",
)
WITH_CLS = (*WITHOUT_CLS, "fastervlm:keep=6,padding=true", "visionzip:keep=6", "vtc-cls:keep=6")
PLANS = {"llava": WITH_CLS, "llava_next": WITH_CLS, "llava_siglip": WITHOUT_CLS, "qwen2_5_vl": WITHOUT_CLS}
SQUARE, WIDE, TALL = (1, 112, 112), (2, 120, 60), (3, 56, 112)


@pytest.mark.parametrize("name", CLASSES)
def test_greedy_answers_equal_those_of_the_library(name: str, engine: Any) -> None:
    plans = PLANS.get(name, SOME)
    cases = [Case("@ what is in the picture ?", (SQUARE,), None)]
    cases += [Case("@ what is in the picture ?", (WIDE,), plan) for plan in plans]
    cases += [Case("@ what is left of @ ?", (TALL, WIDE), plan) for plan in SOME if name != "llava_onevision"]
    cases += [Case("@ what is in the picture ?", (TALL,), plan) for plan in SOME]
    library = Library(name)
    wanted = [library.answer(case) for case in cases]
    llm = engine(name, {"plans": list(plans)})
    found = [answers(llm, [case.request(name)])[0] for case in cases]
    for case, own, want in zip(cases, found, wanted, strict=True):
        assert own == want, case
    said = [tokens for tokens, _ in found]
    assert len({tuple(own) for own in said}) > len(cases) // 2  # what is said depends on what is read
    # Together, ragged, and with what is cached of each.
    assert answers(llm, [case.request(name) for case in cases]) == wanted
