"""The parts of `winnow bench-serve`: times and errors of single requests, figures, and the file of a run."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest

from serve.fake import Handler, answer, fake
from winnow.core.errors import WinnowError
from winnow.serve.bench.chart import chart, check_name, write_chart
from winnow.serve.bench.client import Endpoint, Outcome
from winnow.serve.bench.figures import over_rounds, rows
from winnow.serve.bench.journal import Cell, Group, Journal
from winnow.serve.bench.requests import SERVED, Asking, question, server_of
from winnow.serve.bench.run import Load, Run

ASKED = question(0, 224)


def test_times_are_those_of_the_first_text_and_of_the_end() -> None:
    with fake(lambda handler, _: answer(handler, first=0.15, later=0.25)) as url:
        found = Endpoint(url).ask(b"{}")
    assert found.error == ""
    assert (found.text, found.prompt, found.answer, found.reason, found.kept) == ("yes", 10, 2, "stop", None)
    assert 150 <= found.first < 350
    assert 250 <= found.total - found.first < 500


def cut(handler: Handler, _: Any) -> None:
    handler.begin()
    handler.text("ye")


def fails_late(handler: Handler, _: Any) -> None:
    cut(handler, _)
    handler.event({"error": {"message": "out of it", "code": "internal_error"}})


def says_nothing(handler: Handler, _: Any) -> None:
    handler.begin()
    handler.end()


def never_ends(handler: Handler, _: Any) -> None:
    handler.begin()
    for _turn in range(100):
        handler.text("a")
        threading.Event().wait(0.02)


def without_usage(handler: Handler, _: Any) -> None:
    cut(handler, _)
    handler.event(b"[DONE]")


def hangs_up(handler: Handler, _: Any) -> None:
    handler.close_connection = True


BUSY = {"error": {"message": "come back", "type": "rate", "code": "busy"}}
WRONG = [
    (lambda handler, _: handler.whole(429, BUSY), "429 busy", "come back"),
    (lambda handler, _: handler.whole(500, b"<html>"), "500", ""),
    (lambda handler, _: handler.whole(200, {"choices": []}), "the stream was cut", ""),
    (lambda handler, _: (handler.begin(), handler.event(b"{")), "an answer that is no stream of chat completions", ""),
    (lambda handler, _: (handler.begin(), handler.event([1])), "an answer that is no stream of chat completions", ""),
    (cut, "the stream was cut", ""),
    (fails_late, "internal_error", "out of it"),
    (says_nothing, "no answer in the stream", ""),
    (without_usage, "no usage in the stream", ""),
    (hangs_up, "connection: RemoteDisconnected", ""),
    (never_ends, "timeout", ""),
]


@pytest.mark.parametrize(("say", "error", "told"), WRONG, ids=[own[1] for own in WRONG])
def test_what_goes_wrong_is_an_outcome_with_its_name(say: Any, error: str, told: str) -> None:
    with fake(say) as url:
        found = Endpoint(url, seconds=1).ask(b"{}")
    assert (found.error, found.told) == (error, told)
    assert found.total > 0


def test_no_server_and_no_url() -> None:
    assert Endpoint("http://127.0.0.1:9/v1", seconds=2).ask(b"{}").error == "connection: ConnectionRefusedError"
    with pytest.raises(WinnowError, match="No server of OpenAI's chat completions"):
        Endpoint("http://127.0.0.1:9/v1", seconds=2).models()
    with fake(lambda *_: None, owner="") as url, pytest.raises(WinnowError, match="another answer"):
        Endpoint(url).models()
    for bad in ("127.0.0.1:8000", "ftp://a/v1", "http://", "http://a:x/v1", "http://me:key@a/v1", "http://a/v1?b=c"):
        with pytest.raises(WinnowError, match="write it as clients do"):
            Endpoint(bad)


def test_a_close_ends_what_is_read_and_what_would_begin() -> None:
    with fake(lambda handler, _: answer(handler, first=5)) as url:
        endpoint = Endpoint(url)
        found: list[Outcome] = []
        thread = threading.Thread(target=lambda: found.append(endpoint.ask(b"{}")))
        thread.start()
        while not endpoint._open:
            pass
        threading.Event().wait(0.1)
        endpoint.close()
        thread.join(2)
        assert not thread.is_alive()
        assert found[0].error
        assert endpoint.ask(b"{}").error == "connection: ConnectionAbortedError"


def test_plans_are_said_as_each_server_understands_them() -> None:
    def said(server: str, plan: str, **more: Any) -> dict[str, Any]:
        asking = Asking("m", server_of({"owned_by": server}), 8, **more)
        asking.check([plan])
        return json.loads(asking.body(ASKED, plan))

    known = said("winnow", SERVED)
    assert "winnow" not in known
    assert known["stream_options"] == {"include_usage": True}
    parts = known["messages"][0]["content"]
    assert (parts[0]["image_url"]["url"], parts[1]["text"]) == (ASKED.picture, ASKED.text)
    assert said("winnow", "divprune:keep=8") == known | {"winnow": {"plan": "divprune:keep=8"}}
    assert said("winnow", "full") == known | {"winnow": {"plan": "full"}}
    in_vllm = {
        "divprune:keep=8": {"plan": "divprune", "keep": "8"},
        "divprune:keep=25%": {"plan": "divprune", "keep": "25%"},
        "divprune": {"plan": "divprune"},
        "vidcom2:keep=8,exact=false": {"plan": "vidcom2:keep=8,exact=false"},
    }
    for plan, told in in_vllm.items():
        assert said("vllm", plan) == known | {"mm_processor_kwargs": {"winnow": told}}
    assert said("vllm", "full", to_the_end=True)["mm_processor_kwargs"] == {"winnow": False}
    assert said("vllm", "full", to_the_end=True)["ignore_eos"] is True
    assert said("somebody", SERVED) == known
    with pytest.raises(WinnowError, match="neither winnow's nor vLLM"):
        said("somebody", "full")
    with pytest.raises(WinnowError, match="--ignore-eos"):
        said("winnow", "full", to_the_end=True)


def test_each_scene_is_asked_about_once_in_a_run() -> None:
    load = Load(("full",), (1, 4, 16), requests=5, start=100)
    seeds = [seed for number in range(3) for clients in load.clients for seed in load.seeds(number, clients)]
    assert sorted(seeds) == list(range(100, 100 + 3 * (5 + 8 + 32)))
    assert question(7, 224) == question(7, 224)
    assert question(7, 224).picture != question(8, 224).picture
    for wrong in ((), ("full", "full")):
        with pytest.raises(WinnowError, match="plans"):
            Load(wrong, (1,))


def cell(seconds: float, first: float, total: float, count: int, **errors: int) -> Cell:
    return Cell(seconds, (first,) * count, (total,) * count, 20 * count, None, 3 * count, count // 2, errors)


def test_figures_of_a_run() -> None:
    groups = [
        Group(0, 2, {"full": cell(2.0, 50, 100, 10), "a": cell(1.0, 20, 40, 10)}),
        Group(1, 2, {"full": cell(4.0, 50, 100, 10), "a": cell(2.0, 20, 40, 8, busy=2)}),
    ]
    full, plan = rows(groups, ["full", "a"])
    assert full.throughput[:1] == pytest.approx((20 / 6,))
    assert full.throughput[1:] == pytest.approx((2.5, 5.0))
    assert full.gain is None
    assert plan.gain is not None
    assert plan.gain.value == pytest.approx((18 / 3) / (20 / 6))
    assert plan.gain[1:] == pytest.approx((4 / 2.5, 10 / 5))
    assert (plan.requests, plan.errors, plan.rounds) == (20, {"busy": 2}, 2)
    assert full.first[50] == (50, 50, 50)
    assert full.total[90] == (100, 100, 100)
    assert full.first[99] is None  # of 20 requests
    assert (plan.prompt, plan.kept, plan.answer, plan.right.value) == (20, None, 3, 0.5)
    assert rows(groups, ["full", "a"], gains=False)[1].gain is None
    assert json.loads(json.dumps(full.as_json(), allow_nan=False))["first"]["p50"] == [50, 50, 50]
    (single, _) = rows(groups[:1], ["full", "a"])
    assert math.isnan(single.throughput.low)
    assert single.as_json()["throughput"] == [5, None, None]


def test_percentiles_are_of_requests_and_their_intervals_of_rounds() -> None:
    times = [tuple(range(1, 101)), tuple(range(101, 201))]
    groups = [Group(i, 1, {"full": Cell(1, own, own, 0, None, 0, 0, {})}) for i, own in enumerate(times)]
    (row,) = rows(groups, ["full"])
    assert row.total[50] == (100, 50, 150)
    assert row.total[99] == (198, 99, 199)
    assert over_rounds([1.0, 3.0], lambda some: [sum(some)])[0] == (4, 2, 6)


def outcomes(count: int) -> list[Outcome]:
    return [Outcome(1.234, 2.0, 5, 2, 3, "yes", "stop")] * count + [Outcome(total=1.0, error="busy")]


def test_a_journal_goes_on_behind_half_a_line(tmp_path: Path) -> None:
    path, settings = tmp_path / "new" / "run.jsonl", {"plans": ["full"], "url": None}
    journal = Journal(path, settings, {"machine": "this"})
    group = Group(0, 4, {"full": Cell.of(outcomes(2), 1, 0.5)})
    assert group.cells["full"] == Cell(0.5, (1.23, 1.23), (2.0, 2.0), 10, 6, 4, 1, {"busy": 1})
    journal.add(group)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "group", "rou')
    again = Journal(path, settings, {"machine": "another"})
    assert again.groups == [group]
    assert again.about == {"machine": "this"}
    assert again.has(0, 4)
    assert not again.has(1, 4)
    assert path.read_bytes() == whole
    with pytest.raises(WinnowError, match="another plans"):
        Journal(path, settings | {"plans": ["a"]}, {})
    assert Journal(path, settings | {"plans": ["a"]}, {}, fresh=True).groups == []
    path.write_text("a letter to a friend\n")
    with pytest.raises(WinnowError, match="is no run of bench-serve"):
        Journal(path, settings, {})


def load_of(url: str, said: list[str], **more: Any) -> Run:
    load = Load(("full", "a"), (1, 3), requests=3, **more)
    return Run(Endpoint(url, seconds=5), Asking("fake", "winnow", 4), load, said.append)


def test_plans_run_next_to_each_other_and_are_asked_the_same(tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []

    def say(handler: Handler, body: dict[str, Any]) -> None:
        seen.append((body["winnow"]["plan"], body["messages"][0]["content"][0]["image_url"]["url"]))
        answer(handler, prompt=20 if body["winnow"]["plan"] == "full" else 8)

    said: list[str] = []
    with fake(say) as url:
        run = load_of(url, said, rounds=2)
        run.check()
        journal = Journal(tmp_path / "a", {}, {})
        run.measure(journal)
    assert said == []
    measured = seen[2 + 2 * 3 :]  # behind the check and the warm-up
    assert len(measured) == 2 * 2 * (3 + 6)
    where = 0
    for group in journal.groups:
        count = run.load.asked_at(group.clients)
        halves = [measured[where : where + count], measured[where + count : where + 2 * count]]
        assert {plan for plan, _ in halves[0]} ^ {plan for plan, _ in halves[1]} == {"full", "a"}
        assert {picture for _, picture in halves[0]} == {picture for _, picture in halves[1]}
        where += 2 * count
    assert len({picture for _, picture in measured}) == 2 * (3 + 6)
    found = rows(journal.groups, ["full", "a"])
    assert [(row.clients, row.plan, row.prompt, row.requests) for row in found] == [
        (1, "full", 20, 6), (1, "a", 8, 6), (3, "full", 20, 12), (3, "a", 8, 12),
    ]  # fmt: skip


def test_so_many_clients_ask_at_once(tmp_path: Path) -> None:
    """Requests are held back until all clients have asked, and counted out before the answer that
    lets a client ask again: neither count depends on how fast the machine is."""
    inside, lock = 0, threading.Lock()
    most, expected, all_inside = 0, 0, threading.Event()

    def say(handler: Handler, _: Any) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
            if inside == expected:
                all_inside.set()
        assert all_inside.wait(60), f"{inside} of {expected} clients ask at once"
        with lock:
            inside -= 1
        answer(handler)

    with fake(say) as url:
        run = load_of(url, [], rounds=1)
        for clients in (1, 3):
            most, expected = 0, clients
            all_inside.clear()
            run._group(0, clients)
            assert most == clients


def test_a_plan_that_reads_as_much_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    with fake(lambda handler, _: answer(handler)) as url:
        load_of(url, said).check()
    assert "under a the server reads 10 tokens, and 10 under full" in said[0]


def test_a_plan_that_is_refused_is_told_in_the_words_of_the_server() -> None:
    told = pytest.raises(WinnowError, match=r"under the plan full \(429 busy: come back\)")
    with fake(lambda handler, _: handler.whole(429, BUSY)) as url, told:
        load_of(url, []).check()


def test_errors_are_counted_and_a_server_that_has_stopped_ends_the_run(tmp_path: Path) -> None:
    count = [0]

    def say(handler: Handler, _: Any) -> None:
        count[0] += 1
        if count[0] > 6 + 18 or count[0] % 5 == 0:
            handler.whole(429, BUSY)
        else:
            answer(handler)

    journal = Journal(tmp_path / "a", {}, {})
    with fake(say) as url, pytest.raises(WinnowError, match="has stopped answering"):
        load_of(url, [], rounds=9).measure(journal)
    groups = Journal(tmp_path / "a", {}, {}).groups
    assert len(groups) == 2  # of 18 requests
    errors = sum(own.errors.get("429 busy", 0) for group in groups for own in group.cells.values())
    assert errors == sum(number % 5 == 0 for number in range(7, 25))
    assert sum(row.requests for row in rows(groups, ["full", "a"])) == 18


def test_no_round_begins_that_would_not_end_in_time(tmp_path: Path) -> None:
    said: list[str] = []
    with fake(lambda handler, _: answer(handler, first=0.02)) as url:
        journal = Journal(tmp_path / "a", {}, {})
        load_of(url, said, rounds=5).measure(journal, minutes=0.001)
    assert {group.round for group in journal.groups} == {0}
    assert "1 of 5 rounds" in said[0]


def test_the_chart_draws_each_plan(tmp_path: Path) -> None:
    groups = [
        Group(number, clients, {"full": cell(2.0, 50, 100, 60), "a": cell(1.0 + number, 20, 40, 60)})
        for number in range(2)
        for clients in (1, 2)
    ]
    found = rows(groups, ["full", "a"])
    left, middle, _ = chart(found).axes
    assert [line.get_label() for line in left.get_lines()] == ["full", "a"]
    assert list(left.get_lines()[0].get_ydata()) == [30, 30]
    assert len(left.collections) == 2  # bands
    assert len(middle.get_lines()) == 4  # the median and the tail of each
    write_chart(found, tmp_path / "x" / "chart.svg")
    drawn = (tmp_path / "x" / "chart.svg").read_text()
    assert ">full<" in drawn
    write_chart(rows(groups[:1], ["full", "a"]), tmp_path / "one.png")  # no intervals, one number of clients
    with pytest.raises(WinnowError, match=r"\.svg or \.png"):
        check_name(Path("a.pdf"))
