"""Videos through vLLM: answers of the library, positions, caches, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from asking import Case, Film, Library, answers, cached

from winnow.serve.vllm.pruning import LEAST
from winnow.serve.vllm.subject import Subject

CLASSES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl")
SOME = ("divprune:keep=40%", "evs:keep=50%", "fastervlm:keep=30%")
# All methods that vLLM can serve on a tower without [CLS].
ALL = (
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
)
PLANS = {"qwen2_5_vl": ALL, "internvl": ALL}
STACKED = ("llava_onevision", "internvl")  # transformers stacks the videos of a prompt
LIMITS = {"limit_mm_per_prompt": {"image": 2, "video": 2}}
# No longer along time than its frames are wide: transformers numbers the text behind it from their longer side, and
# vLLM from the last position.
SHOWN, OTHER = Film(1, 6, 168, 112, 3.0), Film(2, 5, 112, 168, 4.0)
PICTURE = (3, 112, 56)
TILE = (3, 56, 56)  # where frames are pictures, the library can be told of both where each picture is one tile


@pytest.mark.parametrize("name", CLASSES)
def test_greedy_answers_equal_those_of_the_library(name: str, engine: Any) -> None:
    plans = PLANS.get(name, SOME)
    cases = [Case("# what is in the picture ?", (), None, (SHOWN,))]
    cases += [Case("# what is in the picture ?", (), plan, (SHOWN,)) for plan in plans]
    second = replace(OTHER, frames=6) if name in STACKED else OTHER
    cases += [Case("# what is left of # ?", (), plan, (second, SHOWN)) for plan in (None, *SOME)]
    picture = TILE if name == "internvl" else PICTURE
    cases += [Case("# what is left of @ ?", (picture,), plan, (OTHER,)) for plan in (None, *SOME)]
    library = Library(name)
    wanted = [library.answer(case) for case in cases]
    llm = engine(name, {"plans": list(plans)}, **LIMITS)
    found = [answers(llm, [case.request(name)])[0] for case in cases]
    for case, own, want in zip(cases, found, wanted, strict=True):
        assert own == want, case
    assert len({tuple(tokens) for tokens, _ in found}) > len(cases) // 2  # what is said depends on what is read
    # Together, ragged, and with what is cached of each.
    assert answers(llm, [case.request(name) for case in cases]) == wanted


@pytest.mark.parametrize(
    ("name", "by_runner"),
    [("qwen2_5_vl", False), ("qwen2_5_vl", True), ("qwen3_vl", False), ("qwen3_vl", True), ("internvl", False)],
)
def test_videos_in_chunks_equal_the_library(name: str, engine: Any, by_runner: bool) -> None:
    """Both ways in which vLLM's runners take positions; on GPUs the flag of its own pruning is set as well."""
    plans = ("divprune:keep=40%", "evs:keep=50%")
    picture, second = (TILE, replace(OTHER, frames=6)) if name == "internvl" else (PICTURE, OTHER)
    cases = [Case("# what is left of @ and # ?", (picture,), plan, (SHOWN, second)) for plan in (None, *plans)]
    library = Library(name)
    wanted = [library.answer(case) for case in cases]
    llm = engine(name, {"plans": list(plans)}, max_num_batched_tokens=16, enable_chunked_prefill=True, **LIMITS)
    if by_runner:
        llm.llm_engine.model_executor.driver_worker.worker.model_runner.is_multimodal_pruning_enabled = True
        llm.llm_engine.model_config.multimodal_config.video_pruning_rate = LEAST
    assert [answers(llm, [case.request(name)])[0] for case in cases] == wanted
    assert answers(llm, [case.request(name) for case in cases]) == wanted


@pytest.mark.parametrize(
    ("name", "film", "held"),
    [("qwen3_vl", SHOWN, 64), ("internvl", replace(SHOWN, frames=24), 128)],  # whole blocks of 32, of the video
)
def test_another_question_reuses_the_video_and_another_budget_does_not(
    name: str, film: Film, held: int, engine: Any
) -> None:
    llm = engine(name, {"plan": "divprune:keep=60", "plans": ["evs:keep=60"]}, enable_prefix_caching=True, **LIMITS)
    first = Case("# what is in the picture ?", (), "divprune:keep=60", (film,))
    other = Case("# is a red dog left of a dog ?", (), "divprune:keep=60", (film,))
    assert cached(llm, first.request(name)) == 0
    assert cached(llm, other.request(name)) == held
    assert cached(llm, other.request(name, keep=61)) == 0
    assert cached(llm, Case(other.words, (), "evs:keep=60", (film,)).request(name)) == 0
    assert cached(llm, Case(other.words, (), None, (film,)).request(name)) == 0
    faster = replace(film, fps=2 * film.fps)  # the same frames at other times, of which InternVL is not told
    again = cached(llm, Case(other.words, (), other.plan, (faster,)).request(name))
    assert again == 0 if name == "qwen3_vl" else again >= held
    # What is read from the cache says the same.
    assert answers(llm, [other.request(name)]) == [Library(name).answer(other)]


@pytest.mark.parametrize("name", ["llava_onevision", "internvl"])
def test_a_request_sets_the_budget_of_its_video(name: str, engine: Any) -> None:
    llm = engine(name, {"plan": "divprune:keep=8", "least": 2, "most": "50%"}, **LIMITS)
    case = Case("# what is in the picture ?", (), "divprune", (SHOWN,))
    text = answers(llm, [case.request(name)])[0][1] - 8
    for keep, left in (
        (2, 2),
        ("25%", 6),
        (12, 12),
    ):  # of 6 frames of 4 tokens, and what the model writes beside them stays
        assert answers(llm, [case.request(name, keep=keep)])[0][1] == text + left
    for keep in (1, 13):
        with pytest.raises(ValueError, match=rf"{keep} of the 24 tokens of a video .* allows 2 to 50%"):
            answers(llm, [case.request(name, keep=keep)])


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl"])
def test_a_plan_that_chooses_frames_is_for_pictures_alone(name: str, engine: Any) -> None:
    llm = engine(name, {"plan": "kffocus:keep=6"}, **LIMITS)
    answers(llm, [Case("@ ?", (PICTURE,), "kffocus").request(name)])
    with pytest.raises(ValueError, match="chooses frames before a processor reads them"):
        answers(llm, [Case("# ?", (), "kffocus", (SHOWN,)).request(name)])


def test_a_picture_of_several_tiles_stands_beside_a_video(engine: Any) -> None:
    """The library is given frames as pictures, and cannot tell them apart in one request; here it reads two."""
    name, plan = "internvl", "divprune:keep=40%"
    library = Library(name)
    film = library.rows(Case("# what is left of", (), plan, (SHOWN,)))
    picture = library.rows(Case("@ ?", (PICTURE,), plan))
    llm = engine(name, {"plan": plan}, **LIMITS)
    both = Case("# what is left of @ ?", (PICTURE,), plan, (SHOWN,))
    wanted = library.said(torch.cat([film[:, :-2], picture[:, 1:]], 1))  # "assistant :" of one, "user" of the other
    assert answers(llm, [both.request(name)]) == [wanted]


def test_a_video_that_the_library_does_not_know_is_refused(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Subject, "takes", lambda subject, modality: modality == "image")
    name = "internvl"
    llm = engine(name, {"plan": "divprune:keep=4"}, **LIMITS)
    with pytest.raises(ValueError, match="does not serve the video of InternVLForConditionalGeneration"):
        answers(llm, [Case("# ?", (), "divprune", (SHOWN,)).request(name)])
    answers(llm, [Case("@ ?", (PICTURE,), "divprune").request(name)])
