"""LangDC as it was trained: descriptions grow with what there is to see, and their states answer questions."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from methods.connectors import frozen, of_method

from tests.learn.resuming import check_resumes
from tests.learn.tiny_video import tiny
from tests.methods.directional import gap
from winnow.core.view import View
from winnow.learn.captioning import WORDS, caption, captions
from winnow.learn.connectors.fit import fit
from winnow.learn.connectors.langdc import Recipe, behind, caption_loss
from winnow.learn.video import tower_tokens
from winnow.methods.langdc import WORDS as COUNT
from winnow.parts.captioner import START, STOP, Captioner
from winnow.parts.chunks import chunks_of
from winnow.parts.learned import SHIPPED_VIDEO, learned, untrained
from winnow.reference.video import patches
from winnow.world.clips import ClipSpec, clip, staged

SMALL = 0.02
CLIPS = 40
STILL = ClipSpec(still=1, visit=0, repeat=0, cross=0, hit=0, word=0, shapes=0, cuts=(1,), pan=0)


@pytest.mark.system("langdc", "exact")
def test_a_description_is_the_list_of_what_is_seen():
    assert (len(WORDS), WORDS[STOP], WORDS[START]) == (COUNT, "</s>", "<s>")
    for seed in range(8):
        drawn = clip(seed)
        for start in range(0, 8, 2):
            said = caption(drawn.tracks, start, start + 2)
            seen = [track for track in drawn.tracks if track.sights(start, start + 2)]
            assert set(said) <= set(WORDS)
            assert {track.name for track in seen} <= set(said)
            assert len(said) >= len(seen)
            for track in seen:
                behind = said[said.index(track.name) + 1 :]
                assert not track.color or behind[0] in (track.color, track.later)
        table = captions(drawn.tracks, 8, 2, 12)
        told = [[WORDS[w] for w in row if w != STOP] for row in table.tolist()]
        assert told == [list(caption(drawn.tracks, s, s + 2)) for s in range(0, 8, 2)]


@pytest.mark.system("langdc", "exact")
@torch.no_grad()
def test_what_it_is_taught_is_what_it_then_says():
    """Given words of its own, its states are those of saying them; the loss is that of each word and of the stop."""
    module = untrained(lambda: Captioner(16, 9, 24, 2, 4), 3)
    module.words.weight[STOP] += 0.4
    view = View.of(torch.randn(2, 72, 16, generator=torch.Generator().manual_seed(0)), layout=frozen().layout)
    chunks = chunks_of(view, 2, "langdc")
    said = module(*behind(chunks), 5)
    assert said.counts.unique().numel() > 1
    start = torch.full_like(said.words[:, :1], START)
    soft, weights = module.told(*behind(chunks), torch.cat([start, said.words], 1))
    torch.testing.assert_close(soft + weights @ chunks.tokens.flatten(0, 1), said.tokens)
    torch.testing.assert_close(weights, said.weights)
    total, count = 0.0, 0
    for c, words in enumerate(said.words.tolist()):
        one = [x[c : c + 1] for x in behind(chunks)]
        script = [w for w in words if w != STOP]
        for n, wanted in enumerate([*script, STOP]):
            states, _ = module.states(*one, torch.tensor([[START, *script[:n]]]))
            total += float(-module.logits(states[0, -1]).log_softmax(-1)[wanted])
            count += 1
    assert float(caption_loss(module, chunks, said.words)) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.system("langdc", "exact")
def test_answers_teach_the_projector_alone():
    recipe = Recipe(frozen())
    record = recipe.record(clip(3, types=("presence", "motion", "needle")))
    recipe.phases([record])
    module = untrained(recipe.make).train()
    recipe._told(module, [0]).backward()
    taught = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert taught == {"up.weight", "up.bias", "down.weight", "down.bias"}
    assert recipe.given is None


@pytest.mark.full  # as test_selective_s4.py has it, with the same loop of training
def test_a_run_is_its_seed_and_goes_on_where_it_stopped(tmp_path):
    model = str(tiny(tmp_path / "model"))
    whole = check_resumes(functools.partial(fit, "langdc"), tmp_path, stop=11, model=model, scale=SMALL, save=4)
    assert json.loads(whole.with_suffix(".json").read_text())["settings"] == Recipe.settings


@functools.cache
def trained():
    width = frozen().info.width
    return learned("langdc", None, frozen().info, lambda **sizes: Captioner(width, **sizes)).eval()


def words_of(things):
    """`[clips]` words that are said of a chunk, in the mean, in clips with so many things that stand still."""
    module = trained()
    found = []
    for seed in range(CLIPS):
        stage, _ = staged(seed, 16, 84, "test", replace(STILL, things=(max(1, things),) * 2))
        if not things:
            stage.story, stage.faces = replace(stage.story, tracks=()), []
        with torch.no_grad():
            tokens = tower_tokens(frozen().model, patches(torch.from_numpy(stage.draw(range(16)))[None])[0])
            chunks = chunks_of(View.of(tokens.flatten(0, 1)[None], layout=frozen().layout), 2, "langdc")
            found.append(module(*behind(chunks), 12).counts.double().mean().item())
    return torch.tensor(found).numpy()


def _grows(words):
    said = [words(things) for things in range(4)]
    assert said[0].mean() <= 2
    for fewer, more in pairwise(said):
        assert gap(more, fewer).low > 0


@pytest.mark.system("langdc", "directional")
@pytest.mark.xdist_group("connectors")
def test_descriptions_grow_with_what_there_is_to_see():
    _grows(functools.cache(words_of))


@pytest.mark.xdist_group("connectors")
def test_that_fails_for_descriptions_of_one_length():
    with pytest.raises(AssertionError):
        _grows(lambda things: torch.ones(CLIPS).numpy())


@pytest.mark.system("langdc", "directional")
@pytest.mark.xdist_group("connectors")
def test_trained_states_keep_more_answers_than_untrained_ones():
    found = of_method("langdc")
    assert found.over_untrained.low > 0


def test_what_is_shipped_says_how_it_was_made():
    facts = json.loads((SHIPPED_VIDEO / "langdc.json").read_text(encoding="utf-8"))
    assert facts["command"] == "winnow train langdc"
    assert (SHIPPED_VIDEO / "langdc.safetensors").stat().st_size < 1_500_000
