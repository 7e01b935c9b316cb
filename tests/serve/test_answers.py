"""What the server answers is what the library answers: batched or alone, streamed or whole, under any plan."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from typing import Any

import pytest

from serve.conftest import PLAN, found
from serve.process import MOTORCYCLE, NAME, Answer, Server, assistant, drawn, user

SCENES = (3, 34, 54, 55, 56, 57)
PLANS = (
    "hiprune:keep=64",
    "divprune:keep=64",
    "fastervlm:keep=32",
    "visionzip:keep=48",
    "hiprune:keep=25% | positions=compact",
    "fastv:layer=2,keep=50%",  # acts inside the language model: under hooks
    "divprune:keep=96 + fastv:layer=2,keep=50%",
)


def test_the_servers_plan_is_the_librarys(server: Server, library: Any) -> None:
    for seed in SCENES:
        question = drawn(seed).questions[0].text
        assert found(server.ask(question, drawn(seed).image)) == library(drawn(seed).image, question, PLAN)


@pytest.mark.parametrize("plan", PLANS)
def test_a_requests_plan_is_the_librarys(server: Server, library: Any, plan: str) -> None:
    for seed in SCENES[:3]:
        question = drawn(seed).questions[0].text
        answer = server.ask(question, drawn(seed).image, winnow={"plan": plan})
        assert found(answer) == library(drawn(seed).image, question, plan)


def test_usage_says_what_the_model_got(server: Server, reference: Any, library: Any) -> None:
    """Tokens that compression takes from the prompt are those of the picture, and no others."""
    _, processor = reference
    texts = {}
    for keep in (8, 64, 128):
        answer = server.ask(MOTORCYCLE, drawn(54).image, winnow={"plan": f"divprune:keep={keep}"})
        usage = answer.json["usage"]
        assert usage["winnow"] == {"given": 256, "kept": keep, "plan": f"divprune:keep={keep}"}
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        ids = processor.tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        assert usage["completion_tokens"] == len(ids) + 1  # and the end token
        texts[keep] = usage["prompt_tokens"] - keep
    prompt = processor.tokenizer(f"USER:  {MOTORCYCLE} ASSISTANT:")["input_ids"]
    assert set(texts.values()) == {len(prompt)}


def requests() -> list[dict[str, Any]]:
    """Requests of several lengths, plans and ways to sample."""
    ways = [{}, {"temperature": 1.5, "seed": 5}, {"temperature": 0.7, "top_p": 0.5, "seed": 6}, {"max_tokens": 1}]
    scenes = [(s, q) for s in SCENES for q in drawn(s).questions[:4]]
    mixed = zip(scenes, cycle(PLANS[:5]), cycle(ways), strict=False)
    return [
        {"messages": [user(q.text, drawn(s).image)], "winnow": {"plan": plan}, **way}
        for (s, q), plan, way in islice(mixed, 24)
    ]


def shown(answer: Answer) -> tuple[Any, ...]:
    body = answer.json
    return body["choices"], body["usage"]


def test_batched_requests_are_answered_as_alone(server: Server) -> None:
    given = requests()
    alone = [shown(server.chat(**request)) for request in given]
    before = server.metric("winnow_batch_rows_count"), server.metric("winnow_batch_rows_sum")
    with ThreadPoolExecutor(len(given)) as pool:
        together = list(pool.map(lambda request: shown(server.chat(**request)), given))
    after = server.metric("winnow_batch_rows_count"), server.metric("winnow_batch_rows_sum")
    assert together == alone
    assert after[1] - before[1] == len(given)
    assert after[0] - before[0] < len(given)  # some were indeed batched


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_stream_is_the_whole_answer(server: Server, number: int) -> None:
    given = requests()[number]
    whole = server.chat(**given)
    stream = server.chat(**given, stream=True, stream_options={"include_usage": True})
    assert stream.streamed == whole.text
    events = stream.events
    assert events[-1] is None
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [e["choices"][0]["finish_reason"] for e in events[:-2]][-1] == whole.json["choices"][0]["finish_reason"]
    assert (events[-2]["choices"], events[-2]["usage"]) == ([], whole.json["usage"])
    assert all(e["usage"] is None for e in events[:-2])
    assert len({(e["id"], e["object"], e["created"], e["model"]) for e in events[:-1]}) == 1


def test_a_stream_has_no_usage_unless_it_is_asked_for(server: Server) -> None:
    events = server.ask(MOTORCYCLE, drawn(54).image, stream=True).events
    assert all("usage" not in event for event in events[:-1])


def test_a_seed_gives_the_same_sample_and_others_differ(server: Server) -> None:
    def sample(seed: int) -> str:
        return server.ask("what", drawn(3).image, temperature=2, seed=seed, max_tokens=8).text

    samples = [sample(seed) for seed in range(6)]
    assert samples == [sample(seed) for seed in range(6)]
    assert len(set(samples)) > 1
    narrow = server.ask("what", drawn(3).image, temperature=2, seed=1, top_p=1e-6, max_tokens=8)
    assert narrow.text == server.ask("what", drawn(3).image, temperature=0, max_tokens=8).text  # only the likeliest


def test_an_answer_ends_at_max_tokens_and_says_so(server: Server) -> None:
    whole = server.ask("how many bars are there?", drawn(34).image, temperature=2, seed=3, max_tokens=6)
    assert whole.json["usage"]["completion_tokens"] <= 6
    cut = server.ask(MOTORCYCLE, drawn(54).image, max_tokens=1).json
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["choices"][0]["message"]["content"] == "yes"
    assert cut["usage"]["completion_tokens"] == 1
    new = server.ask(MOTORCYCLE, drawn(54).image, max_completion_tokens=1).json
    assert new["choices"] == cut["choices"]


def test_an_answer_ends_before_a_stop_string(server: Server) -> None:
    for stop, text in (("e", "y"), (["zz", "s"], "ye"), ("yes", ""), ("no", "yes")):
        answer = server.ask(MOTORCYCLE, drawn(54).image, stop=stop)
        assert (answer.text, answer.json["choices"][0]["finish_reason"]) == (text, "stop")
        assert server.ask(MOTORCYCLE, drawn(54).image, stop=stop, stream=True).streamed == text


def test_a_conversation_is_what_the_template_makes_of_it(server: Server, reference: Any) -> None:
    model, processor = reference
    image = drawn(54).image
    turns = [user(MOTORCYCLE, image), assistant("yes"), user("what color is the motorcycle?")]
    text = f"USER: <image>\n{MOTORCYCLE} ASSISTANT: yes</s>USER: what color is the motorcycle? ASSISTANT:"
    inputs = processor(images=image, text=text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    want = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    full = server.chat(messages=turns, winnow={"plan": "divprune:keep=128"})
    assert full.status == 200
    assert full.json["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1] - 128
    assert full.text == want


def test_fields_that_change_nothing_are_taken(server: Server) -> None:
    neutral = {"n": 1, "user": "me", "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0, "tools": []}
    null = {"max_tokens": None, "temperature": None, "top_p": None, "seed": None, "stop": None, "winnow": None}
    assert server.ask(MOTORCYCLE, drawn(54).image, **neutral, **null).text == "yes"


def test_models_are_listed(server: Server) -> None:
    listed = server.send("GET", "/v1/models").json
    assert [own["id"] for own in listed["data"]] == [NAME]
    assert server.send("GET", f"/v1/models/{NAME}").json == listed["data"][0]
    assert server.send("GET", "/v1/models/other").error["code"] == "model_not_found"


def test_metrics_count_tokens_before_and_after(server: Server) -> None:
    names = ("prompt_tokens", "picture_tokens_given", "picture_tokens_kept", "generated_tokens")
    before = [server.metric(f"winnow_{name}_total") for name in names]
    usage = server.ask(MOTORCYCLE, drawn(54).image).json["usage"]
    after = [server.metric(f"winnow_{name}_total") for name in names]
    winnow = usage["winnow"]
    wanted = [usage["prompt_tokens"], winnow["given"], winnow["kept"], usage["completion_tokens"]]
    assert [b - a for a, b in zip(before, after, strict=True)] == wanted


def test_health_asks_for_no_key(server: Server) -> None:
    answer = server.send("GET", "/health", key="")
    assert (answer.status, answer.json) == (200, {"status": "ok"})
