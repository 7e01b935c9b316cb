"""What is refused when a server starts, with a text that says why and what to do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import model_and_processor

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.plan import Plan
from winnow.serve.vllm.subject import Subject

BLIND, LOOKING = "divprune | positions=compact", "fastervlm | positions=compact"


def configuration(**changes: Any) -> Any:
    """The parts of vLLM's configuration that are checked."""
    given = {
        "cudagraph_mm_encoder": False,
        "compile_mm_encoder": False,
        "enable_tower_connector_lora": False,
        "mm_processor_kwargs": None,
        "mm_encoder_tp_mode": "weights",
        "tensor_parallel_size": 1,
    } | changes
    every = SimpleNamespace(**given)
    return SimpleNamespace(
        compilation_config=every,
        lora_config=every,
        parallel_config=every,
        model_config=SimpleNamespace(multimodal_config=every),
    )


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(model_and_processor("llava")[0].config)


@pytest.mark.parametrize(
    ("changes", "plan", "told"),
    [
        ({"cudagraph_mm_encoder": True}, BLIND, "replays the vision encoder past winnow"),
        ({"enable_tower_connector_lora": True}, BLIND, "leave --enable-tower-connector-lora out"),
        ({"mm_processor_kwargs": {"winnow": {}}}, BLIND, "go into --hf-overrides"),
        ({"mm_encoder_tp_mode": "data"}, LOOKING, "shows each rank other pictures"),
        ({"tensor_parallel_size": 2}, LOOKING, "whose heads 2 ranks share"),
        ({"compile_mm_encoder": True}, LOOKING, "which compile_mm_encoder compiles"),
    ],
)
def test_settings_of_the_engine(vllm: Any, subject: Subject, changes: Any, plan: str, told: str) -> None:
    from winnow.serve.vllm.refusals import check_engine

    plans = [subject.bind(Plan.parse(plan).key)]
    check_engine(configuration(), plans)
    with pytest.raises(WinnowError, match=told):
        check_engine(configuration(**changes), plans)


@pytest.mark.parametrize("changes", [{"mm_encoder_tp_mode": "data"}, {"tensor_parallel_size": 2}])
def test_methods_that_look_at_projected_tokens_alone_run_on_several_ranks(
    vllm: Any, subject: Subject, changes: Any
) -> None:
    from winnow.serve.vllm.refusals import check_engine

    check_engine(configuration(**changes), [subject.bind(Plan.parse(BLIND).key)])


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0.0"])
def test_versions_that_were_not_tested(vllm: Any, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    from winnow.serve.vllm.refusals import check_version

    check_version()
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(UnsupportedError, match=f"this is {version}"):
        check_version()


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ("fastv", "acts at layers"),
        ("cdpruner", "reads the question"),
        ("divprune | positions=keep", "write . positions=compact"),
        ("prumerge:keep=8", "looks at block 3 of the vision tower"),
        ("prumerge", "looks at block 3|must know the number"),
    ],
)
def test_an_engine_does_not_start_on_a_plan_that_it_cannot_serve(engine: Any, plan: str, told: str) -> None:
    with pytest.raises(Exception, match=told):  # vLLM may wrap it, with its text
        engine("llava", {"plan": plan})


def test_a_request_to_a_server_without_settings_is_refused(engine: Any) -> None:
    from asking import Case, answers

    llm = engine("llava", None)
    case = Case("@ what is in the picture ?", ((1, 112, 112),), "divprune")
    with pytest.raises(ValueError, match="was started without winnow"):
        answers(llm, [case.request("llava")])


def test_a_class_without_an_adapter_starts_only_without_settings(vllm: Any) -> None:
    from winnow.serve.vllm.refusals import NotSupported

    started = []

    class Plain:
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            started.append(vllm_config)

    class Served(NotSupported, Plain):
        pass

    def given(**settings: Any) -> Any:
        return SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(**settings)))

    Served(vllm_config=given())
    assert len(started) == 1
    with pytest.raises(UnsupportedError, match="no adapter for Plain"):
        Served(vllm_config=given(winnow={"plan": "divprune"}))


def test_every_multimodal_class_of_vllm_is_registered(vllm: Any) -> None:
    from vllm.model_executor.models import registry

    from winnow.serve.vllm import classes, register

    register()
    register()  # in every process, and sometimes twice
    for architecture in registry._MULTIMODAL_MODELS:
        assert registry.ModelRegistry.models[architecture].module_name == classes.__name__
    assert set(classes.ARCHITECTURES) <= set(registry._MULTIMODAL_MODELS)
