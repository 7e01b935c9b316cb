"""What the page is told is what the library and `winnow run` say."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from serve.process import MOTORCYCLE, drawn, url

import winnow
from studio.process import STORE, StudioServer
from winnow import cli_run
from winnow.core.plan import Plan
from winnow.core.registry import built_in
from winnow.models.inputs import model_inputs
from winnow.world.export import save_picture

MERGES = "tome:left=64"


@pytest.fixture(scope="module")
def reference():
    return winnow.load(plan=None)


@pytest.mark.parametrize("plan", ["full", "hiprune:keep=32", "fastv:layer=2,keep=32", MERGES, "snapkv:keep=20%"])
def test_an_answer_is_that_of_winnow_run(studio: StudioServer, reference, plan: str):
    asked = cli_run.subject("world:54", None)
    found = studio.ask(asked.question, "world:54", plan).json
    result = cli_run.compare(*reference, asked, [Plan.parse("hiprune" if plan == "full" else plan)], runs=1)
    own = result["plain"] if plan == "full" else result["methods"][0]
    assert (found["answer"], found["truth"]) == (own["answer"], asked.truth)
    assert found["tokens"]["layers"] == own["tokens"]["layers"]
    assert found["stages"][-1]["left"] == own["tokens"]["visual"]
    assert [(s["point"], s["method"]) for s in found["stages"][1:]] == [
        (p["point"], p["method"]) for p in own.get("points", [])
    ]
    assert (found["flops"], found["kv_bytes"]) == (own["flops"], own["kv_bytes"])
    if plan != "full":
        assert found["stages"][-1]["recall"] == own["evidence_recall"]
        assert (found["flops_full"], found["kv_bytes_full"]) == (result["plain"]["flops"], result["plain"]["kv_bytes"])
    assert set(found["ms"]) == set(own["ms"])
    assert found["warnings"] == []


def test_kept_tokens_and_their_places_are_the_ledgers(studio: StudioServer, reference):
    model, processor = reference
    found = studio.ask(MOTORCYCLE, "world:54", MERGES).json
    with winnow.compress(model, MERGES, processor=processor) as handle:
        model.generate(**model_inputs(model, processor, drawn(54).image, MOTORCYCLE), max_new_tokens=1)
        item = handle.last.items[0]
    whole = item.provenance()
    assert found["stages"][-1]["kept"] == sorted(item.kept.tolist())
    assert [to >= 0 for to in found["stages"][-1]["owner"]] == whole.kept.tolist()
    np.testing.assert_allclose(found["boxes"], item.layout.boxes[item.layout.content], atol=1e-5)
    assert len(found["layers"]) == len(found["tokens"]["layers"])


@pytest.mark.parametrize(("slug", "keep", "left"), [("hiprune", "12.5%", 32), ("fastv", "64", 64), ("aim", "25%", 64)])
def test_the_slider_sets_the_budget_of_a_method(studio: StudioServer, slug: str, keep: str, left: int):
    assert studio.ask(MOTORCYCLE, "world:54", slug, keep=keep).json["stages"][-1]["left"] == left


def test_a_picture_of_the_users_is_looked_at_and_doubted(studio: StudioServer):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    looked = studio.call("look", picture=url(picture)).json
    shown = Image.open(io.BytesIO(base64.b64decode(looked["preview"].partition(",")[2])))
    assert (looked["width"], looked["height"], looked["scene"], looked["questions"]) == (400, 300, None, [])
    assert np.array_equal(np.asarray(shown), np.asarray(picture))
    found = studio.ask("what is this?", url(picture), "hiprune").json
    assert found["truth"] is None
    assert "knows only winnow's own world" in found["warnings"][0]
    assert found["evidence"] == []
    x0, y0, x1, y1 = found["shown"]  # the centre square
    assert (x0, y0, x1, y1) == pytest.approx((0.125, 0, 0.875, 1), abs=0.01)


def test_a_scene_that_was_exported_is_recognised(studio: StudioServer, tmp_path):
    save_picture(drawn(54), tmp_path / "scene.png")
    name = url((tmp_path / "scene.png").read_bytes())
    looked = studio.call("look", picture=name).json
    assert looked["scene"] == 54
    assert looked["questions"] == [own.text for own in drawn(54).questions]
    assert studio.ask(looked["questions"][0], name).json["truth"] == drawn(54).questions[0].answer


def test_a_large_picture_is_shown_smaller(studio: StudioServer):
    looked = studio.call("look", picture=url(Image.new("RGB", (3000, 1500), "red"))).json
    shown = Image.open(io.BytesIO(base64.b64decode(looked["preview"].partition(",")[2])))
    assert ((looked["width"], looked["height"]), shown.size) == ((3000, 1500), (1024, 512))


def test_two_users_at_once_get_what_each_gets_alone(studio: StudioServer):
    asked = [
        (own.text, f"world:{seed}", plan)
        for seed, plan in ((54, "hiprune:keep=32"), (7, "fastv:layer=1,keep=16"))
        for own in drawn(seed).questions[:1]
    ]

    def answer(one: tuple[str, str, str]):
        found = studio.ask(*one).json
        return {name: found[name] for name in ("answer", "stages", "tokens", "plan")}

    alone = [answer(one) for one in asked]
    with ThreadPoolExecutor(4) as users:
        together = list(users.map(answer, asked * 2))
    assert together == alone * 2
    assert alone[0] != alone[1]


def test_more_requests_than_may_wait_are_told_to_come_back(studio: StudioServer):
    with ThreadPoolExecutor(24) as users:
        found = list(users.map(lambda _: studio.ask(MOTORCYCLE, "world:54", max_new_tokens=1), range(24)))
    assert {answer.status for answer in found} == {200, 429}
    assert {answer.json["answer"] for answer in found if answer.status == 200} == {"yes"}
    refused = [answer for answer in found if answer.status == 429]
    assert all("requests wait" in answer.error["message"] for answer in refused)


def test_the_page_lists_what_can_be_used(studio: StudioServer):
    about = studio.send("GET", "/api/about").json
    methods = {own["slug"]: own for own in about["methods"]}
    assert set(methods) == set(built_in())
    assert methods["hiprune"] == {
        "slug": "hiprune", "summary": methods["hiprune"]["summary"], "cache": False, "budget": True, "refused": "",
    }  # fmt: skip
    assert methods["snapkv"]["cache"]
    assert "another model" in methods["lococo"]["refused"]
    assert STORE in about["stores"]


def test_a_store_opens_as_the_report(studio: StudioServer):
    opened = studio.call("report", store=STORE).json["path"]
    answer = studio.send("GET", opened, key="")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert b"fastervlm" in answer.body
    assert b"<svg" in answer.body
    assert answer.headers["content-security-policy"] == "sandbox allow-scripts; frame-ancestors 'self'"
    assert studio.call("report", store=STORE).json["path"] != opened
