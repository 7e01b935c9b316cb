"""The video reference model: its inputs and the training's shortcuts against transformers, and a run that goes on."""

from __future__ import annotations

import random

import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from winnow.core.errors import WinnowError
from winnow.learn import attention, video
from winnow.learn.clip_reading import language
from winnow.learn.clip_targets import MARKS, NOTHING, targets
from winnow.learn.packing import pack
from winnow.learn.progress import read
from winnow.learn.recipes import video as recipe
from winnow.learn.video import Mix
from winnow.reference import video as reader
from winnow.world.clips import TYPES, ClipSpec, clip, staged

TINY = reader.config(width=48, depth=2, tower_heads=2, layers=4, heads=2, inner=64)
EVERY = dict.fromkeys(TYPES, 2)
PLAN = [
    recipe.Stage("tower", 3, Mix(((1, ClipSpec()),)), batch=4, tower=True),
    recipe.Stage("gated", 4, Mix(((1, ClipSpec()),), EVERY), {"when": 1.1}, least=2, batch=3),
    recipe.Stage("last", 4, Mix(((1, ClipSpec()),), EVERY, frames=(8, 16)), batch=3, dropped=0.7, decay=True),
]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def made() -> torch.nn.Module:
    return reader.make_model(TINY, 3).eval()


def test_patches_are_those_of_transformers():
    frame = clip(1, 8).images[0]
    given = Qwen2VLImageProcessorPil(do_resize=False, patch_size=14, merge_size=2)(frame, return_tensors="pt")
    still = torch.from_numpy(clip(1, 8).pixels[:1]).repeat(2, 1, 1, 1)
    ours = reader.patches(still[None])
    assert given["image_grid_thw"].tolist() == [[1, 6, 6]]
    assert torch.allclose(ours[0, 0], given["pixel_values"], atol=1e-5)


def test_both_frames_of_a_second_are_in_its_patches():
    frames = torch.from_numpy(clip(1, 8).pixels)
    first = reader.patches(frames[None])[0].view(4, 36, 3, 2, 14, 14)
    still = reader.patches(frames[[1, 1]][None])[0].view(1, 36, 3, 2, 14, 14)
    assert torch.equal(first[0, :, :, 1], still[0, :, :, 0])


@pytest.mark.parametrize("side", [84, 112])
def test_the_tower_of_training_is_that_of_the_model(side):
    model = made()
    frames = torch.from_numpy(clip(2, 8, side).pixels)
    flat = reader.patches(frames[None])[0]
    grid = torch.tensor([[4, side // 14, side // 14]])
    with torch.no_grad():
        theirs = torch.cat(list(model.get_video_features(flat.flatten(0, 1), grid).pooler_output))
        ours = video.tower_tokens(model, flat).flatten(0, 1)
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("products", [False, True])
def test_packed_questions_are_answered_as_single_ones(products):
    """Many questions behind one clip, and each alone through the whole model, have the same logits."""
    model, tokenizer = made(), reader.make_tokenizer()
    drawn = clip(4, per_type=1)
    with torch.no_grad():
        alone = [
            model(**reader.ClipProcessor(tokenizer)(drawn.pixels, question.text)).logits[0, -1]
            for question in drawn.questions
        ]
    if products:
        attention.use(model)
    packed = pack([drawn.questions], 400, types=TYPES, ids=reader.token_ids)
    with torch.no_grad():
        tokens = video.tower_tokens(model, reader.patches(torch.from_numpy(drawn.pixels)[None])[0])
        tokens = tokens.reshape(1, -1, tokens.shape[-1])
        everything = torch.arange(tokens.shape[1])[None]
        hidden, _ = language(model, tokens, everything, drawn.seconds, packed)
        logits = model.lm_head(hidden)[0]
    for number, question in enumerate(drawn.questions):
        own = (packed.segment[0] == number).nonzero()[:, 0]
        asked = len(reader.token_ids(question.text))  # the next one is ASSISTANT
        assert torch.allclose(logits[own[asked]], alone[number], atol=1e-4), question


def test_the_tokenizer_gives_the_ids_of_training():
    tokenizer = reader.make_tokenizer()
    for seed in range(40):
        for question in clip(seed, 8, types=TYPES).questions:
            for said in (question.text, question.answer):
                ids = reader.token_ids(said)
                assert tuple(tokenizer(said, add_special_tokens=False).input_ids) == ids
                assert reader.TOKEN_ID["<unk>"] not in ids
    assert reader.token_ids("12") == (reader.TOKEN_ID["1"], reader.TOKEN_ID["##2"])


@pytest.mark.parametrize(
    ("frames", "question", "said"),
    [
        (torch.zeros(3, 84, 84, 3, dtype=torch.uint8), "how many cuts?", "even number"),
        (torch.zeros(0, 84, 84, 3, dtype=torch.uint8), "how many cuts?", "even number"),
        (torch.zeros(4, 80, 80, 3, dtype=torch.uint8), "how many cuts?", "multiple of 28"),
        (torch.zeros(4, 84, 84, 3), "how many cuts?", "uint8"),
        (torch.zeros(4, 84, 56, 3, dtype=torch.uint8), "how many cuts?", "side, side"),
        (torch.zeros(4, 84, 84, 3, dtype=torch.uint8), "who is there?", "does not know"),
        (torch.zeros(4, 84, 84, 3, dtype=torch.uint8), " ", "empty"),
        (torch.zeros(4, 84, 84, 3, dtype=torch.uint8), "<|video_pad|>", "does not know"),
    ],
)
def test_what_it_does_not_understand_is_refused(frames, question, said):
    with pytest.raises(WinnowError, match=said):
        reader.ClipProcessor(reader.make_tokenizer())(frames, question)


def test_targets_name_what_is_seen():
    spec = ClipSpec(things=(2, 2), still=0, visit=0, repeat=0, word=0, cross=0, cuts=(1.0,), pan=0.0)
    stage, _ = staged(3, spec=spec)
    words, marks = targets(stage, range(8), 3)
    (target,) = [track for track in stage.story.tracks if track.act == "target"]
    (hitter,) = [track for track in stage.story.tracks if track.act == "hit"]
    at = target.changes
    shows = words[:, :, 0] == reader.TOKEN_ID[target.name]
    assert shows.any(1).all()
    colors = [set(words[second][shows[second], 1].tolist()) for second in range(8)]
    assert colors == [{reader.TOKEN_ID[target.color if second < at else target.later]} for second in range(8)]
    changed = marks[..., MARKS.index("changes")].astype(bool)
    assert set(words[changed][:, 0].tolist()) <= {reader.TOKEN_ID[target.name], reader.TOKEN_ID[hitter.name]}
    assert [second for second in range(8) if changed[second].any()] == [at]
    moving = words[..., 2] >= 0
    assert {second for second in range(8) if moving[second].any()} == set(range(hitter.start, at))
    assert (words[..., 0] == NOTHING).any()


def test_without_tokens_the_questions_are_asked_blindly():
    model, drawn = made(), clip(4)
    packed = pack([drawn.questions], 400, types=TYPES, ids=reader.token_ids)
    none = torch.zeros(1, 0, dtype=torch.long)
    found = []
    for seed in (1, 2):
        tokens = torch.randn(1, 72, 48, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            found.append(language(model, tokens, none, 8, packed)[0])
    assert torch.equal(*found)


def test_a_run_that_is_cut_off_goes_on_to_the_same_weights(tmp_path):
    whole = recipe.train(tmp_path / "whole", sizes=TINY, pictures=None, plan=PLAN, every=2, save=3, quiet=True)
    for _ in range(20):
        recipe.train(
            tmp_path / "cut",
            sizes=TINY,
            pictures=None,
            plan=PLAN,
            every=2,
            save=3,
            quiet=True,
            stop_after=2,
            resume=True,
        )
    first, second = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in ("whole", "cut")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    model, processor = reader.load(whole)
    said = reader.answer(model, processor, clip(0).pixels, "how many cuts?")
    assert isinstance(said, str)
    assert {row["stage"] for row in read(tmp_path / "whole" / "log.jsonl")} == {"tower", "gated", "last"}


def test_another_run_in_the_folder_is_refused(tmp_path):
    given = {"sizes": TINY, "pictures": None, "plan": PLAN[:1], "quiet": True}
    recipe.train(tmp_path, **given)
    with pytest.raises(WinnowError, match="already holds a run"):
        recipe.train(tmp_path, **given)
    with pytest.raises(WinnowError, match="cannot go on"):
        recipe.train(tmp_path, **given, seed=1, resume=True)
    with pytest.raises(WinnowError, match="scale"):
        recipe.train(tmp_path / "other", **given, scale=0)


def test_the_tower_stage_lowers_its_loss():
    torch.manual_seed(0)
    model = made().train()
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight.mul_(10)  # words as far apart as trained ones
    video.trained([model.model.visual], model)
    batch = video.make_batch(Mix(((1, ClipSpec()),)), 7, 4, 100, 2)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(60):
        loss, _ = video.tower_step(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not any(p.requires_grad for p in model.model.language_model.parameters())


def test_batches_are_drawn_from_their_seeds():
    mix = Mix(((1, ClipSpec()),), EVERY)
    first, again, other = (video.make_batch(mix, seed, 2, 120) for seed in (5, 5, 9))
    assert torch.equal(first.frames, again.frames)
    assert torch.equal(first.pack.ids, again.pack.ids)
    assert not torch.equal(first.frames, other.frames)
    assert first.words.shape == (2, 72, 3)
    assert first.marks.shape == (2, 72, len(MARKS))
    assert mix.spec(random.Random(0)) == ClipSpec()
