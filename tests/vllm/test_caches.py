"""Caches, chunks, batches and budgets: what vLLM adds to a single answer."""

from __future__ import annotations

from typing import Any

import pytest
from asking import Case, Library, answers, cached, picture

PLANS = {"plan": "fastervlm:keep=40", "plans": ["divprune:keep=40", "visionzip:keep=16"]}
THREE = ((1, 112, 112), (2, 200, 100), (3, 50, 200))
OPENING = "what is in the picture ? a red dog left of a red dog"


@pytest.fixture(scope="module")
def small_steps(engine: Any) -> Any:
    """An engine that reads 40 tokens in a step, so that a picture of 64 comes in parts."""
    return engine("llava", PLANS, max_num_batched_tokens=40, enable_chunked_prefill=True, enable_prefix_caching=True)


@pytest.fixture(scope="module")
def library() -> Library:
    return Library("llava")


def test_three_pictures_are_read_in_chunks(small_steps: Any, library: Library) -> None:
    cases = [
        Case("@ @ what is left of @ ?", THREE, None),
        Case("@ @ what is left of @ ?", THREE, "fastervlm:keep=40"),
        Case("@ @ what is left of @ ?", THREE[::-1], "divprune:keep=40"),
        Case("@ is a red dog left of @ ?", THREE[:2], "visionzip:keep=16"),
    ]
    wanted = [library.answer(case) for case in cases]
    found = [answers(small_steps, [case.request("llava")])[0] for case in cases]
    assert found == wanted
    assert max(length for _, length in wanted) > 3 * 40


def test_a_ragged_batch_says_what_each_request_says_alone(small_steps: Any, library: Library) -> None:
    cases = [
        Case("@ what is in the picture ?", ((11, 112, 112),), "divprune:keep=40"),
        Case("@ is a red dog left of @ ?", ((12, 60, 112), (13, 112, 112)), "fastervlm:keep=40"),
        Case("what is in @ ?", ((14, 300, 112),), None),
        Case(f"{OPENING} @ ?", ((15, 112, 112),), "visionzip:keep=16"),
    ]
    wanted = [library.answer(case) for case in cases]
    assert answers(small_steps, [case.request("llava") for case in cases]) == wanted


def test_another_question_reuses_the_picture_and_another_budget_does_not(small_steps: Any, library: Library) -> None:
    shown = ((21, 112, 112),)
    first = Case("@ what is in the picture ?", shown, "fastervlm:keep=40")
    other = Case("@ is a red dog left of a dog ?", shown, "fastervlm:keep=40")
    assert cached(small_steps, first.request("llava")) == 0
    assert cached(small_steps, other.request("llava")) == 32  # whole blocks of 32, of the picture
    assert cached(small_steps, other.request("llava", keep=41)) == 0
    assert cached(small_steps, Case(other.words, shown, "divprune:keep=40").request("llava")) == 0
    assert cached(small_steps, Case(other.words, shown, None).request("llava")) == 0
    # What is read from the cache says the same.
    assert answers(small_steps, [other.request("llava")]) == [library.answer(other)]


def test_a_request_sets_its_own_budget(small_steps: Any, library: Library) -> None:
    shown = ((31, 112, 112),)
    text = library.answer(Case("@ what is in the picture ?", shown, "divprune:keep=40"))[1] - 40
    for keep, tokens in ((1, 1), (7, 7), ("25%", 16), (0.5, 32), (64, 64), (1000, 64)):
        case = Case("@ what is in the picture ?", shown, f"divprune:keep={keep}")
        request = Case(case.words, shown, "divprune").request("llava", keep=keep)
        assert answers(small_steps, [request]) == [library.answer(case)]
        assert library.answer(case)[1] == text + tokens


def test_requests_that_say_nothing_get_the_plan_of_the_operator(small_steps: Any, library: Library) -> None:
    case = Case("@ what is in the picture ?", ((41, 112, 112),), "fastervlm:keep=40")
    request = {"prompt": case.prompt("llava"), "multi_modal_data": {"image": [picture(*case.pictures[0])]}}
    assert answers(small_steps, [request]) == [library.answer(case)]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"plan": "hiprune"}, "'hiprune' is not offered by this server; it offers 'fastervlm:keep=40'"),
        ({"plan": "divprune:keep=5"}, "is not offered"),
        ({"keep": 0}, "keeps nothing"),
        ({"keep": "many"}, "cannot be read"),
        ({"budget": 4}, "an object with plan, keep or both"),
        (7, "an object with plan, keep or both"),
    ],
)
def test_what_a_request_may_not_ask_is_refused(small_steps: Any, asked: Any, told: str) -> None:
    request = Case("@ what is in the picture ?", ((51, 112, 112),), None).request("llava")
    request["mm_processor_kwargs"] = {"winnow": asked}
    with pytest.raises(ValueError, match=told):
        answers(small_steps, [request])


def test_the_encoder_runs_in_batches_of_what_a_step_may_hold(engine: Any, library: Library) -> None:
    """vLLM schedules six pictures in one step, because 12 tokens are left of them; the encoder gets two at a time."""
    llm = engine("llava", PLANS, max_num_batched_tokens=160)
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    seen: list[int] = []
    model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    cases = [Case("@ ?", ((60 + i, 112, 112),), "divprune:keep=2") for i in range(6)]
    requests = [Case(case.words, case.pictures, "divprune").request("llava", keep=2) for case in cases]
    assert answers(llm, requests) == [library.answer(case) for case in cases]
    assert sum(seen) == 6
    assert max(seen) == 2
