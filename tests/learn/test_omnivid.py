"""OmniVid as it was trained: moments and boxes as words, and answers from a few queries."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from methods.connectors import frozen, of_method
from torch import nn

from tests.learn.resuming import check_resumes
from tests.learn.tiny_video import tiny
from tests.methods.directional import gap
from winnow.learn.connectors.fit import fit
from winnow.learn.connectors.omnivid import Recipe, score, written
from winnow.learn.grounding.tasks import (
    BOXES,
    FRAMES,
    MOST,
    SECONDS,
    SIDE,
    SPEC,
    TIMES,
    WORD_ID,
    WORDS,
    clip_record,
    questions,
)
from winnow.learn.grounding.writer import Writer
from winnow.parts.learned import SHIPPED_VIDEO, learned, untrained
from winnow.world.clips import staged

SMALL = 0.025
CLIPS = 30


@pytest.mark.system("omnivid", "exact")
def test_what_is_asked_of_clips_is_in_their_story():
    for seed in range(6):
        stage, _ = staged(seed, FRAMES, SIDE, spec=SPEC)
        pairs = questions(stage.story.tracks)
        things = {track.name: track for track in stage.story.tracks if track.kind != "text"}
        assert set(pairs[0][1][:-1]) == set(things)
        for asked, said in pairs:
            assert len(said) <= MOST
            assert said[-1] == "</s>"
            assert {*asked, *said} <= set(WORDS)
            if asked[0] == "<when>":
                assert TIMES.decode(said, SECONDS) == things[asked[1]].visits[0]
            if asked[0] == "<where>":
                box = BOXES.decode(said, SIDE, SIDE)
                middle = things[asked[1]].boxes[sum(things[asked[1]].visits[0])]
                assert max(abs(a - b) for a, b in zip(box, middle, strict=True)) <= 1.5


@pytest.mark.system("omnivid", "exact")
@torch.no_grad()
def test_writing_is_the_likeliest_word_after_the_other():
    writer = untrained(lambda: Writer(len(WORDS), 24))
    read = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))
    memory = writer.encode(read, torch.tensor([[3, 0], [4, 9], [5, 8]]))
    said = writer.write(memory, 1, 4)
    for b in range(3):
        given = [1]
        for _ in range(4):
            given.append(int(writer(memory[b : b + 1], torch.tensor([given]))[0, -1].argmax()))
        assert said[b].tolist() == given[1:]
    whole = writer(memory, torch.cat([torch.ones(3, 1, dtype=torch.long), said[:, :-1]], 1))
    assert torch.equal(whole.argmax(-1), said)


@pytest.mark.system("omnivid", "exact")
def test_answers_are_worth_what_they_say():
    found = {"names": [], "near": [], "moment": [], "box": []}
    ask = {kind: WORD_ID[f"<{kind}>"] for kind in ("what", "when", "where")}
    score(found, ask["what"], ["frog", "ring", "</s>", "x"], ["frog", "ring", "</s>"])
    score(found, ask["what"], ["ring", "frog", "</s>", "x"], ["frog", "ring", "</s>"])
    when = list(TIMES.encode(2, 4, SECONDS))
    for said in (when, list(TIMES.encode(2.5, 4, SECONDS)), list(TIMES.encode(3, 5, SECONDS)), ["frog", "</s>"]):
        score(found, ask["when"], said, [*when, "</s>"])
    where = list(BOXES.encode((0, 0, 30, 30), SIDE, SIDE))
    for said in (where, list(BOXES.encode((15, 0, 45, 30), SIDE, SIDE)), ["</s>"] * 4):
        score(found, ask["where"], said, [*where, "</s>"])
    assert found["names"] == [1, 0]
    assert found["near"] == [1, 1, 0, 0]
    assert found["moment"] == pytest.approx([1, 0.75, 1 / 3, 0])
    assert found["box"] == pytest.approx([1, 1 / 3, 0])


@pytest.mark.full  # as test_selective_s4.py has it, with the same loop of training
def test_a_run_is_its_seed_and_goes_on_where_it_stopped(tmp_path):
    model = str(tiny(tmp_path / "model"))
    whole = check_resumes(functools.partial(fit, "omnivid"), tmp_path, stop=11, model=model, scale=SMALL, save=4)
    facts = json.loads(whole.with_suffix(".json").read_text())
    assert facts["measured"]["trained"]["tokens"] == 16


@functools.cache
def answered():
    """What is written about clips that nobody was trained on, by the trained and the untrained connector."""

    def make(**sizes):
        return nn.ModuleDict({"connect": Recipe(frozen()).make()["connect"], "generate": Writer(len(WORDS), 96)})

    modules = {"trained": learned("omnivid", None, frozen().info, make), "untrained": untrained(make)}
    records = [
        {f"long.{name}": x for name, x in clip_record(frozen().model, seed, "test").items()} for seed in range(CLIPS)
    ]
    return {
        name: {kind: np.array(x) for kind, x in written(module.eval(), records, 4).items()}
        for name, module in modules.items()
    }


@pytest.mark.xdist_group("connectors")
def test_its_writer_learns_the_form_of_moments():
    """Hardly more than the form: see docs/learned-video.md."""
    assert gap(answered()["trained"]["moment"], answered()["untrained"]["moment"]).low > 0


@pytest.mark.system("omnivid", "directional")
@pytest.mark.xdist_group("connectors")
def test_trained_queries_keep_more_answers_than_untrained_ones():
    found = of_method("omnivid")
    assert found.tokens == 16
    assert found.over_untrained.low > 0


def test_what_is_shipped_says_how_it_was_made():
    facts = json.loads((SHIPPED_VIDEO / "omnivid.json").read_text(encoding="utf-8"))
    assert facts["command"] == "winnow train omnivid"
    assert (SHIPPED_VIDEO / "omnivid.safetensors").stat().st_size < 1_500_000
