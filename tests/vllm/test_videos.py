"""Videos through vLLM: answers of the library, positions, caches, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from asking import Case, Film, Library, answers, cached

from winnow.serve.vllm.pruning import LEAST

CLASSES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision")
SOME = ("divprune:keep=40%", "evs:keep=50%", "fastervlm:keep=30%")
# All methods that vLLM can serve on a tower without [CLS].
PLANS = {
    "qwen2_5_vl": (
        *SOME,
        "centerclip:keep=12",
        "dycoke:p=0",
        "fastvid:keep=12",
        "fopru:keep=12",
        "hiprune:keep=12",
        "holov:keep=12",
        "kffocus:keep=12,sampling=false",
        "token-correlation-compression:keep=12",
        "ts-llava:keep=12",
        "vidcom2:keep=50%",
        "vispruner:keep=12",
    ),
}
LIMITS = {"limit_mm_per_prompt": {"image": 2, "video": 2}}
# No longer along time than its frames are wide: transformers numbers the text behind it from their longer side, and
# vLLM from the last position.
SHOWN, OTHER = Film(1, 6, 168, 112, 3.0), Film(2, 5, 112, 168, 4.0)
PICTURE = (3, 112, 56)


@pytest.mark.parametrize("name", CLASSES)
def test_greedy_answers_equal_those_of_the_library(name: str, engine: Any) -> None:
    plans = PLANS.get(name, SOME)
    cases = [Case("# what is in the picture ?", (), None, (SHOWN,))]
    cases += [Case("# what is in the picture ?", (), plan, (SHOWN,)) for plan in plans]
    second = replace(OTHER, frames=6) if name == "llava_onevision" else OTHER  # where transformers stacks videos
    cases += [Case("# what is left of # ?", (), plan, (second, SHOWN)) for plan in (None, *SOME)]
    cases += [Case("# what is left of @ ?", (PICTURE,), plan, (OTHER,)) for plan in (None, *SOME)]
    library = Library(name)
    wanted = [library.answer(case) for case in cases]
    llm = engine(name, {"plans": list(plans)}, **LIMITS)
    found = [answers(llm, [case.request(name)])[0] for case in cases]
    for case, own, want in zip(cases, found, wanted, strict=True):
        assert own == want, case
    assert len({tuple(tokens) for tokens, _ in found}) > len(cases) // 2  # what is said depends on what is read
    # Together, ragged, and with what is cached of each.
    assert answers(llm, [case.request(name) for case in cases]) == wanted


@pytest.mark.parametrize("by_runner", [False, True], ids=["forward", "runner"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_videos_in_chunks_equal_the_library(name: str, engine: Any, by_runner: bool) -> None:
    """Both ways in which vLLM's runners take positions; on GPUs the flag of its own pruning is set as well."""
    plans = ("divprune:keep=40%", "evs:keep=50%")
    cases = [Case("# what is left of @ and # ?", (PICTURE,), plan, (SHOWN, OTHER)) for plan in (None, *plans)]
    library = Library(name)
    wanted = [library.answer(case) for case in cases]
    llm = engine(name, {"plans": list(plans)}, max_num_batched_tokens=16, enable_chunked_prefill=True, **LIMITS)
    if by_runner:
        llm.llm_engine.model_executor.driver_worker.worker.model_runner.is_multimodal_pruning_enabled = True
        llm.llm_engine.model_config.multimodal_config.video_pruning_rate = LEAST
    assert [answers(llm, [case.request(name)])[0] for case in cases] == wanted
    assert answers(llm, [case.request(name) for case in cases]) == wanted


def test_another_question_reuses_the_video_and_another_budget_does_not(engine: Any) -> None:
    name = "qwen3_vl"
    llm = engine(name, {"plan": "divprune:keep=60", "plans": ["evs:keep=60"]}, enable_prefix_caching=True, **LIMITS)
    first = Case("# what is in the picture ?", (), "divprune:keep=60", (SHOWN,))
    other = Case("# is a red dog left of a dog ?", (), "divprune:keep=60", (SHOWN,))
    assert cached(llm, first.request(name)) == 0
    assert cached(llm, other.request(name)) == 64  # whole blocks of 32, of the video
    assert cached(llm, other.request(name, keep=61)) == 0
    assert cached(llm, Case(other.words, (), "evs:keep=60", (SHOWN,)).request(name)) == 0
    assert cached(llm, Case(other.words, (), None, (SHOWN,)).request(name)) == 0
    faster = replace(SHOWN, fps=2 * SHOWN.fps)  # the same frames at other times
    assert cached(llm, Case(other.words, (), other.plan, (faster,)).request(name)) == 0
    # What is read from the cache says the same.
    assert answers(llm, [other.request(name)]) == [Library(name).answer(other)]


def test_a_request_sets_the_budget_of_its_video(engine: Any) -> None:
    name = "llava_onevision"
    llm = engine(name, {"plan": "divprune:keep=8", "least": 2, "most": "50%"}, **LIMITS)
    case = Case("# what is in the picture ?", (), "divprune", (SHOWN,))
    text = answers(llm, [case.request(name)])[0][1] - 8
    for keep, left in ((2, 2), ("25%", 6), (12, 12)):  # of 6 frames of 4 tokens, and the newline behind them stays
        assert answers(llm, [case.request(name, keep=keep)])[0][1] == text + left
    for keep in (1, 13):
        with pytest.raises(ValueError, match=rf"{keep} of the 24 tokens of a video .* allows 2 to 50%"):
            answers(llm, [case.request(name, keep=keep)])


def test_a_plan_that_chooses_frames_is_for_pictures_alone(engine: Any) -> None:
    name = "qwen2_vl"
    llm = engine(name, {"plan": "kffocus:keep=6"}, **LIMITS)
    answers(llm, [Case("@ ?", (PICTURE,), "kffocus").request(name)])
    with pytest.raises(ValueError, match="chooses frames before a processor reads them"):
        answers(llm, [Case("# ?", (), "kffocus", (SHOWN,)).request(name)])


def test_a_class_whose_frames_are_pictures_is_refused(engine: Any) -> None:
    name = "internvl"
    llm = engine(name, {"plan": "divprune:keep=4"}, **LIMITS)
    with pytest.raises(ValueError, match="does not serve the video of InternVLForConditionalGeneration"):
        answers(llm, [Case("# ?", (), "divprune", (SHOWN,)).request(name)])
    answers(llm, [Case("@ ?", (PICTURE,), "divprune").request(name)])
