"""Training of connectors: what the harness reads is what the engine reads, and gradients come through the model."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from torch import nn

import winnow
from tests.learn.resuming import check_resumes
from winnow.contract import Budget, Emit, Method, Point, QuestionTokens, Reduction, Step, register
from winnow.core import registry
from winnow.core.errors import WinnowError
from winnow.learn.connectors import clips, fit, recipe, table, trainable
from winnow.learn.connectors.clips import FIRST, GRID, LEARNED, Frozen, Row, questions_of, rows_of
from winnow.learn.connectors.compared import Compared, compared, fewer_frames, seconds_of
from winnow.learn.connectors.output import Output
from winnow.learn.connectors.recipe import answering, right_of
from winnow.parts.learned import SHIPPED_VIDEO, learned, untrained
from winnow.reference import video
from winnow.world.clips import clip

TINY = video.config(width=48, depth=2, tower_heads=2, layers=3, heads=2, inner=64)
SMALL = 0.02  # of a recipe: 24 clips and 8 steps


class Pooling(Method):
    """Each output is a mean of all tokens, by what a learned map makes of the question."""

    keep: Budget = Budget(6)
    weights: str | None = None
    question: QuestionTokens = QuestionTokens()

    def build(self, info):
        return learned(self.slug, self.weights, info, lambda: nn.Linear(info.width, 6 * info.width))

    def reduce(self, view):
        asked = view[self.question].mean(1)
        queries = view.module(asked).unflatten(-1, (6, -1))
        spread = (torch.arange(6) * view.n // 6).expand(view.b, -1)
        return Reduction.mix((queries @ view.tokens.mT).softmax(-1), representative=spread)


class Ragged(Pooling):
    """Of a clip stay about as many tokens as its question has words: those that a learned map likes best, dimmed."""

    def steps(self, info):
        return (Step(Point("projected"), self._act, (self.question,)),)

    def _act(self, view, state):
        liking = (view.module(view[self.question].mean(1)).unflatten(-1, (6, -1))[:, :1] @ view.tokens.mT)[:, 0]
        count = [view[self.question].shape[1] + 5 * more for more in (liking[:, 0] > 0).tolist()]
        best = liking.argsort(-1, descending=True).argsort(-1)
        kept = Reduction.select(best < torch.tensor(count)[:, None], counts=count)
        return Emit(kept.apply(view.tokens * liking.sigmoid()[..., None]), kept), state


class Recipe(recipe.Recipe):
    slug = "pooling-of-tests"
    settings = {"keep": 6}  # noqa: RUF012
    batch = 3


class RecipeOfRagged(Recipe):
    slug = "ragged-of-tests"


@pytest.fixture(autouse=True)
def _methods(monkeypatch):
    register("pooling-of-tests")(Pooling)
    register("ragged-of-tests")(Ragged)
    monkeypatch.setattr(fit, "recipe_of", lambda slug: {r.slug: r for r in (Recipe, RecipeOfRagged)}[slug])
    yield
    for slug in ("pooling-of-tests", "ragged-of-tests"):  # what was imported meanwhile stays registered
        del registry._extra[slug], registry._classes[slug]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("video")
    model = video.make_model(TINY, 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # so that answers depend on what is seen
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(target)
    video.make_tokenizer().save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def frozen(folder):
    torch.set_num_threads(1)
    return Frozen(folder)


@pytest.fixture(scope="module")
def records(frozen):
    return [frozen.record(seen) for seen in clips.drawn(0, 4)]


def engine_logits(folder, weights, slug, seed, text):
    """What the compressed model says at the end of a prompt."""
    model, processor = video.load(folder)
    seen = clip(seed, types=LEARNED, per_type=clips.PER_TYPE)
    with winnow.compress(model, f"{slug}:weights={weights}", processor=processor), torch.no_grad():
        return model(**processor(seen.pixels, text)).logits[0, -1]


@pytest.mark.parametrize("kind", [Recipe, RecipeOfRagged])
def test_the_harness_reads_what_the_engine_reads(kind, folder, tmp_path):
    """Logits of a trained connector behind whole clips, through the harness and through `winnow.compress`."""
    weights = fit.fit(kind.slug, tmp_path, model=str(folder), scale=SMALL, quiet=True)
    frozen = Frozen(folder)
    own = kind(frozen)
    module = own.method.replace(weights=str(weights)).build(frozen.info)
    exact = [frozen.record(seen) for seen in clips.drawn(0, 2)]
    for record, seen in zip(exact, clips.drawn(0, 2), strict=True):
        given = frozen.processor(seen.pixels, seen.questions[0].text)
        tower = frozen.model.get_video_features(given["pixel_values_videos"], given["video_grid_thw"])
        record["tokens"] = torch.cat(list(tower.pooler_output))  # not in half precision
    rows = rows_of(exact, own.asks)
    with torch.no_grad():
        output = own.outputs(module, rows)
        logits, packed = answering(frozen, rows, output)
    assert (output.there is not None) == (kind is RecipeOfRagged)
    seeds = [FIRST] * len(questions_of(exact[0])) + [FIRST + 1] * len(questions_of(exact[1]))
    for b in range(0, len(rows), 3):
        asked = len(video.token_ids(rows[b].asked[0].text))
        found = engine_logits(folder, weights, kind.slug, seeds[b], rows[b].asked[0].text)
        assert (logits[b, asked] - found).abs().max() <= 1e-4
    assert logits[0].std() > 0.1
    assert packed.ids.shape[0] == len(rows)


def test_positions_are_part_of_what_is_read(frozen, records):
    """Other places of the same tokens give other logits: the check above would see a wrong one."""
    rows = rows_of(records[:1], asks=False)
    tokens = rows[0].tokens[None, 10:16]
    first, second = (answering(frozen, rows, Output(tokens, at[None]))[0] for at in torch.arange(12).split(6))
    assert (first - second).abs().max() > 1e-3


def test_padding_is_not_read(frozen, records):
    rows = rows_of(records, asks=True)[:2]
    tokens = torch.stack([row.tokens for row in rows])
    at = torch.arange(72).expand(2, -1)
    there = torch.ones(2, 72, dtype=torch.bool)
    there[1, 40:] = False
    both = answering(frozen, rows, Output(tokens, at, there))[0]
    alone = answering(frozen, rows[1:], Output(tokens[1:, :40], at[1:, :40]))[0]
    assert (both[1, : alone.shape[1]] - alone[0]).abs().max() <= 1e-4
    assert Output(tokens, at, there).counts.tolist() == [72, 40]


def test_gradients_reach_the_module_and_nothing_else(frozen, records):
    own = Recipe(frozen)
    module = untrained(own.make)
    own.answers(module, rows_of(records, own.asks)).backward()
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in module.parameters())
    assert all(x.grad is None for x in frozen.model.parameters())


def test_a_run_is_its_seed_and_goes_on_where_it_stopped(folder, tmp_path):
    train = functools.partial(fit.fit, Recipe.slug)
    whole = check_resumes(train, tmp_path, stop=5, model=str(folder), scale=SMALL, save=2)
    facts = json.loads(whole.with_suffix(".json").read_text())
    assert facts["settings"] == {"keep": 6}
    assert facts["measured"]["trained"]["tokens"] == 6
    with pytest.raises(WinnowError, match="trained for another model"):
        winnow.compress(video.load()[0], f"{Recipe.slug}:weights={whole}")


def test_a_connector_learns(frozen):
    """Its loss falls below that of answers that are not read from the clip."""
    own = Recipe(frozen)
    rows = rows_of([frozen.record(seen) for seen in clips.drawn(0, 2)], own.asks)
    module = untrained(own.make)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = own.answers(module, rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02


def test_it_is_compared_with_seconds_that_hold_as_many_tokens(frozen, records):
    found = compared(Recipe(frozen), records, weights="untrained")
    assert found.tokens == 6
    assert found.frame_tokens == 9
    assert found.trained == found.untrained
    assert found.over_untrained.value == 0
    assert [seconds_of(n) for n in (1, 9, 9.5, 18, 19, 72, 200)] == [1, 1, 2, 2, 3, 8, 8]
    chosen = torch.tensor([*range(18, 27), *range(54, 63)])
    give = lambda rows: Output(torch.stack([r.tokens[chosen] for r in rows]), chosen.expand(len(rows), -1))  # noqa: E731
    assert fewer_frames(frozen, records, 2) == right_of(frozen, rows_of(records, asks=False), give)[0]


def test_clips_are_those_that_nobody_has_seen_and_questions_those_that_the_model_has_learned(records):
    card = json.loads((video.FOLDER / "card.json").read_text())
    assert list(LEARNED) == card["learned"]
    assert [seen.seed for seen in clips.drawn(2, 4, seed=1)] == [FIRST + clips.APART + 2, FIRST + clips.APART + 3]
    assert all(seen.split == "train" for seen in clips.drawn(0, 1))
    asked = [one for record in records for one in questions_of(record)]
    assert {one.type for one in asked} <= set(LEARNED)
    assert len(rows_of(records, asks=True)) == len(asked)
    few = rows_of(records, asks=True, each=2, seed=5)
    assert len(few) == 2 * len(records)
    assert [row.asked for row in few] == [row.asked for row in rows_of(records, asks=True, each=2, seed=5)]


def test_what_is_not_recorded_is_refused(frozen, tmp_path):
    own = Recipe(frozen)
    step = winnow.contract.Step(own.step.at, own.step.run, (winnow.contract.VisionKeys(),))
    with pytest.raises(WinnowError, match="not recorded of clips"):
        list(
            frozen.views(
                [Row(torch.zeros(72, 48), (clips.Asked("color", "what color is the ring last?", "red"),))], step
            )
        )
    (tmp_path / "config.json").write_text(json.dumps({"video_token_id": 151656}))
    with pytest.raises(WinnowError, match="winnow train video"):
        Frozen(tmp_path)
    with pytest.raises(WinnowError, match="no connector that winnow trains"):
        fit_recipe_of("fastv")


fit_recipe_of = fit.recipe_of  # before the fixture puts those of the tests in its place


def test_the_table_keeps_the_rows_of_others():
    marks = [True, True, False, True]
    found = Compared("b-method", 18.0, 18, marks, [False] * 4, [True, False, False, True], [True] * 4)
    row = table.cells(found)
    assert row[:6] == ["`b-method`", "18", "0.750", "0.000", "0.500 (18)", "1.000"]
    assert row[6].startswith("+75.0% [")
    head = "x\n<!-- learned-video:begin -->\n"
    page = table.written(head + "<!-- learned-video:end -->\ny\n", [row])
    again = table.written(page, [["`a-method`", *row[1:]]])
    assert [line.split("`")[1] for line in again.splitlines() if line.startswith("| `")] == ["a-method", "b-method"]
    assert table.written(again, [row]) == again
    with pytest.raises(WinnowError, match="no table"):
        table.written("x", [row])


def test_a_clip_has_seconds_of_nine_tokens():
    assert GRID == (8, 9)


# Those whose training has phases before the answers are tested by their own files and in test_trained_connectors.
SEVERAL_PHASES = {"b-vllm", "langdc", "omnivid", "quicksviewer", "selective-s4", "videostreaming"}


@pytest.mark.parametrize("slug", sorted({*trainable()} - SEVERAL_PHASES))
def test_a_step_of_each_recipe_trains_its_module(slug, frozen, records):
    """Gradients reach all that is learned, and a step that is taken again is the same."""
    own = fit_recipe_of(slug)(frozen)
    losses = []
    for _ in range(2):
        module = untrained(own.make)
        if start := getattr(own, "start", None):
            start(module)
        (phase,) = own.phases(records)
        loss = phase.loss(module.train(), [0, 1])
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    reached = {name for name, x in module.named_parameters() if x.grad is not None and x.grad.abs().max() > 0}
    left = {name for name, x in module.named_parameters()} - reached
    assert not left - behind_gates(module), left


def behind_gates(module: nn.Module) -> set[str]:
    """What nothing reaches yet: it stands behind a gate, or in front of a matrix, that starts at zero."""
    zero = {name for name, x in module.named_parameters() if not x.any()}
    rooms = {name.rpartition(".")[0] for name in zero if name.endswith("gate")}
    rooms |= {name.rpartition(".")[0].rpartition(".")[0] for name in zero if name.endswith("down.weight")}
    return {name for name, _ in module.named_parameters() if name.startswith(tuple(f"{room}." for room in rooms))}


@pytest.mark.parametrize("slug", trainable())
def test_shipped_weights_are_for_the_shipped_model(slug):
    path = SHIPPED_VIDEO / f"{slug}.safetensors"
    facts = json.loads(path.with_suffix(".json").read_text())
    model, processor = video.load()
    with winnow.compress(model, slug, processor=processor) as handle:
        assert facts["model"] == handle.info.fingerprint()
    assert facts["command"] == f"winnow train {slug}"
    assert facts["settings"] == fit_recipe_of(slug).settings
    assert facts["measured"]["trained"]["accuracy"] > facts["measured"]["untrained"]["accuracy"]
    assert path.stat().st_size <= 1.5e6
