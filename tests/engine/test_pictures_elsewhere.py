"""Where inputs are made before a plan is known, plans that choose or cut pictures are refused. `winnow run` asks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import zoo
from picture_processors import QUESTION, QwenProcessor, processor
from PIL import Image

import winnow
from winnow import cli_run
from winnow.bench.plans import Job
from winnow.bench.runner import _supported
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.plan import Plan
from winnow.engine.bound_plan import BoundPlan
from winnow.serve.runners import Runners
from winnow.serve.vllm.eligible import check_eligible
from winnow.studio.answering import Asker

BUILD = "qwen2_5_vl"
PLANS = ["downscale:keep=9", "retrieve:keep=1 + divprune:keep=4"]


@pytest.mark.parametrize("plan", PLANS)
def test_a_stream_has_frames_alone(plan):
    with pytest.raises(UnsupportedError, match="a stream has frames"):
        winnow.stream(zoo.model(BUILD), plan, processor("qwen2_5_vl"), bounded=False)


@pytest.mark.parametrize("plan", PLANS)
def test_a_server_has_read_its_pictures(plan):
    runners = Runners(zoo.model(BUILD), QwenProcessor(), Plan.of("full"), 64)
    job = SimpleNamespace(plan=Plan.of(plan), inputs=zoo.inputs(BUILD, ("3 A 6",)))
    with pytest.raises(UnsupportedError, match="before a plan is known"):
        runners.ready(job)


@pytest.mark.parametrize("plan", PLANS)
def test_vllm_has_read_its_pictures(plan):
    with winnow.compress(zoo.model(BUILD), "full") as handle:
        bound = BoundPlan.of(Plan.of(plan), handle.info)
    with pytest.raises(UnsupportedError, match="vLLM's has read them before"):
        check_eligible(bound)


def test_the_studio_says_so_in_its_list_and_refuses_a_plan():
    asker = Asker(zoo.model(BUILD), QwenProcessor(), "tiny", bundled=False)
    refused = {method["slug"]: method["refused"] for method in asker.methods()}
    assert refused["divprune"] == ""
    for slug in ("downscale", "retrieve"):
        assert "before a plan is known" in refused[slug]


def test_a_bench_marks_the_cell_and_goes_on():
    marks: list[tuple[int, str, str]] = []
    store = SimpleNamespace(mark=lambda *row: marks.append(row))
    jobs = [Job(SimpleNamespace(plan=plan), Plan.of(plan)) for plan in ("divprune:keep=4", *PLANS)]  # type: ignore[arg-type]
    with winnow.compress(zoo.model(BUILD), "full") as handle:
        found = _supported(handle, jobs, {job.key: i for i, job in enumerate(jobs)}, store)  # type: ignore[arg-type]
    assert found == jobs[:1]
    assert [(cell, state) for cell, state, _ in marks] == [(1, "error:unsupported"), (2, "error:unsupported")]


def test_winnow_run_scales_the_picture_and_compares_with_the_whole_one(tmp_path):
    model, asking = zoo.model(BUILD), QwenProcessor(most=100)
    shown = Image.effect_noise((300, 200), 80).convert("RGB")
    asked = cli_run.Subject("noise", shown, QUESTION, evidence=((150, 100, 300, 200),))
    wanted = [
        Plan.of(plan) for plan in ("downscale:keep=25%", "downscale:keep=25% + divprune:keep=4", "divprune:keep=4")
    ]
    out = tmp_path / "kept.png"
    said = cli_run.compare(model, asking, asked, wanted, max_new_tokens=2, runs=1, picture=out)
    alone, both, prune = said["methods"]
    row = {"point": "pixels", "method": "downscale", "from": 77, "to": 15}
    assert alone["points"] == [row]
    assert both["points"] == [row, {"point": "projected", "method": "divprune", "from": 15, "to": 4}]
    assert said["plain"]["tokens"]["visual"] == 77
    assert said["plain"]["flops"] > alone["flops"] > both["flops"] == prune["flops"]
    assert alone["entered"]["says"] == "picture 1 of 1, scaled from 300 × 200 to 140 × 84 pixels"
    assert "entered" not in prune
    assert alone["evidence_recall"] == 1
    assert 0 <= both["evidence_recall"] <= 1
    assert all(Image.open(method["overlay"]).height >= 420 for method in said["methods"])  # 84 pixels, each five times


def test_winnow_run_does_not_choose_without_features():
    asked = cli_run.Subject("noise", Image.new("RGB", (60, 60)), QUESTION)
    with pytest.raises(WinnowError, match="question_features"):
        cli_run.compare(zoo.model(BUILD), QwenProcessor(), asked, [Plan.of(PLANS[1])], max_new_tokens=1, runs=1)
