"""The parts of training: attention, packing, targets, evaluation, each against a slower or simpler truth."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from winnow import reference, world
from winnow.learn import attention, evaluate, language, tower
from winnow.learn.language import Keep
from winnow.learn.packing import pack
from winnow.learn.targets import CLASSES, EXTENTS, ROWS, Alignment, bag, dense_targets, patch_cover
from winnow.reference.build import make_processor
from winnow.reference.presets import preset
from winnow.reference.vocabulary import VOCABULARY


def test_attention_as_products_agrees_with_torch():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 11, 8, requires_grad=True) for _ in range(3))
    allowed = torch.ones(11, 11, dtype=torch.bool).tril().expand(2, 1, 11, 11)
    mask = torch.zeros(2, 1, 11, 11).masked_fill(~allowed, -1e4)
    ours, _ = attention.products(torch.nn.Identity(), query, key, value, mask)
    truth = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed).transpose(1, 2)
    torch.testing.assert_close(ours, truth)
    weight = torch.randn_like(truth)
    for ours_grad, truth_grad in zip(
        torch.autograd.grad((ours * weight).sum(), (query, key, value), retain_graph=True),
        torch.autograd.grad((truth * weight).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(ours_grad, truth_grad)


def test_features_are_those_that_llava_reads(micro):
    images = torch.from_numpy(np.stack([world.scene(seed).pixels for seed in range(2)]))
    own = tower.features(micro.model.vision_tower, images)
    theirs = micro.model.vision_tower(tower.pixels(images), output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(own, theirs)


def test_pixels_are_those_of_the_processor():
    drawn = world.scene(3)
    processed = make_processor(preset("micro")).image_processor(drawn.image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(tower.pixels(torch.from_numpy(drawn.pixels)[None]), processed, atol=1e-5, rtol=1e-5)


def test_packed_questions_are_answered_as_when_asked_alone(micro):
    """What is said first to each question of a packed row is what `generate` says first to that question only."""
    processor = make_processor(preset("micro"))
    scenes = [world.scene(seed, per_type=2) for seed in (0, 4)]
    tokens = evaluate.visual_tokens(micro, [drawn.pixels for drawn in scenes])
    packed = pack([drawn.questions for drawn in scenes], evaluate.ROW)
    places = torch.arange(2, 2 + tokens.shape[1]).expand(len(scenes), -1)
    predicted = evaluate._predict(micro, tokens, places, 2 + tokens.shape[1], packed, None)
    said = set()
    for b, drawn in enumerate(scenes):
        for number, question in enumerate(drawn.questions):
            at = int(((packed.segment[b] == number) & (packed.labels[b] >= 0)).nonzero()[0])
            alone = first_token(micro, processor, drawn, question)
            assert predicted[b, at] == alone
            said.add(alone)
    assert len(said) > 1


def first_token(model, processor, drawn, question) -> int:
    inputs = processor(images=drawn.image, text=reference.prompt(question.text), return_tensors="pt")
    return int(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1])


def test_packing_keeps_every_answer_and_cuts_the_rest():
    drawn = world.scene(1, per_type=3)
    packed = pack([drawn.questions], 400)
    assert packed.segment.max() + 1 == len(drawn.questions)
    for number, question in enumerate(drawn.questions):
        labels = packed.labels[0][packed.segment[0] == number]
        words = [VOCABULARY[int(i)] for i in labels if i >= 0]
        assert "".join(words[:-1]).replace("##", "") == question.answer
        assert words[-1] == "</s>"
    short = pack([drawn.questions], 30, random.Random(0))
    assert short.ids.shape[1] <= 30
    assert 0 < len(short.segment.unique()) - 1 < len(drawn.questions)


def test_training_sees_what_evaluation_sees(micro):
    """The loss of a training step without dropout is the loss of the packed rows in the model itself."""
    sizes = preset("micro")
    mix = language.Mix(((1.0, world.Spec()),), {"place": 2, "presence": 2})
    batch = language.make_batch(sizes, mix, 10, 4, 80)
    places = torch.nn.Linear(sizes.width, 2 * sizes.grid + len(EXTENTS) + 1)
    loss, parts, right = language.step(micro, places, batch, Alignment.make(), Keep(1.0, 0.0, (1.0,)), random.Random(0))
    assert loss.item() == pytest.approx(parts["answer"] + language.ALIGNMENT_WEIGHT * parts["align"], rel=1e-4)
    assert right[:, 1].sum() == sum(len(set(row[row >= 0].tolist())) for row in batch.pack.segment)


@pytest.mark.parametrize("compact", [0.0, 1.0])
def test_dropped_tokens_keep_or_lose_their_places(compact):
    targets = torch.zeros(2, 6, 64, dtype=torch.long)
    targets[:, 0, 40:44] = 1
    index, offsets, end = Keep(0.0, 1.0, (0.25,), compact=compact).draw(random.Random(0), targets)
    assert index.shape == (2, 16)
    assert (index.diff() > 0).all()
    assert all(set(range(40, 44)) <= set(row.tolist()) for row in index)
    assert end == (16 if compact else 64)
    assert torch.equal(offsets, torch.arange(16).expand(2, -1) if compact else index)


def test_patch_shares_add_up_to_the_ink():
    for seed in range(10):
        drawn = world.scene(seed)
        for item in drawn.objects:
            _, _, share = patch_cover(item, 224, 16)
            area = (item.box.x1 - item.box.x0) * (item.box.y1 - item.box.y0)
            ink = area if item.alpha is None else item.alpha.sum() / 255
            assert share.sum() * 14 * 14 == pytest.approx(ink, rel=1e-4)


def test_dense_targets_name_the_thing_at_its_centre():
    named = 0
    for seed in range(40):
        drawn = world.scene(seed)
        targets = dense_targets(drawn, 16)
        words = bag(drawn)
        for item in drawn.objects:
            assert words[CLASSES.index(item.name)] == 1
            if item.kind in ("glyph", "shape") and item.name != "ring" and item.extent >= 36:
                x, y = (int(v // 14) for v in item.center)
                named += CLASSES[targets[ROWS.index("class"), y, x]] == item.name
                assert targets[ROWS.index("center"), y, x] == 1
        total = sum(i.kind in ("glyph", "shape") and i.name != "ring" and i.extent >= 36 for i in drawn.objects)
        named -= total
    assert named >= -3  # a thing whose centre patch is mostly empty (glasses, a crescent)


def test_words_of_a_patch():
    drawn = next(s for s in map(world.scene, range(50)) if any(i.name == "number" for i in s.objects))
    item = next(i for i in drawn.objects if i.name == "number")
    x, y = (int(v // 14) for v in item.center)
    targets = torch.from_numpy(dense_targets(drawn, 16).reshape(1, len(ROWS), -1))
    words = Alignment.make().words(targets)[0, y * 16 + x]
    names = [VOCABULARY[int(i)] for i in words if i >= 0]
    assert names == ["number", item.text[0], f"##{item.text[1]}"]


def test_erasing_takes_the_evidence_and_nothing_else():
    rng = random.Random(0)
    for seed in range(30):
        drawn = world.scene(seed)
        for question in drawn.questions:
            mask = np.zeros((224, 224), bool)
            for box in question.evidence:
                mask[box.y0 : box.y1, box.x0 : box.x1] = True
            changed = (evaluate.erased(drawn, question, False, rng) != drawn.pixels).any(-1)
            assert not (changed & ~mask).any()
            assert changed[mask].mean() > 0.4 if mask.any() else not changed.any()
            assert not (evaluate.erased(drawn, question, True, rng) != drawn.pixels).any(-1)[mask].any()
