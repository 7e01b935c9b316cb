"""DyCoke by its card: what frames keep, as released, and what decoded tokens read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import zoo
from byhand import Reference
from clips import CLIPS

import winnow
from methods.byhand.dycoke import ReadingFew, by_hand
from tests import kvhand
from winnow.contract import KVView, Observe, State
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.view import View
from winnow.methods.dycoke import DyCoke

from .stubs import STUBS, ids, tokens

H, W = 3, 4
P = H * W


def released(**more):
    (method,) = Plan.of("dycoke:released").methods
    return method.replace(**more)


def clip(t, seed=0, b=1, d=16, h=H, w=W):
    return View.of(tokens(seed, t * h * w, d, b), layout=Layout.grid(h, w, t))


def as_in_the_code(x, t, k):
    """The tokens of the code for `[t · p, D]`, in its order: pairs first, then every third of four frames."""
    p = len(x) // t
    stay = int((1 - k) * p)

    def least_alike(frame, other):
        alike = [float(torch.cosine_similarity(x[frame * p + j], x[other * p + j], dim=0)) for j in range(p)]
        return [frame * p + j for j in sorted(range(p), key=lambda j: alike[j])[:stay]]

    frames = []
    for i in range(0, t - 1, 2):
        frames += [[i * p + j for j in range(p)], least_alike(i + 1, i)]
    for i in range(0, t - 4, 4):
        frames[i + 2] = least_alike(i + 2, i)
    return [j for frame in frames for j in frame]


@pytest.mark.system("dycoke", "exact")
@pytest.mark.parametrize("frames", [5, 6, 7, 8, 9, 12, 13])
@pytest.mark.parametrize("k", [0.3, 0.7, 0.9])
def test_as_released_it_lists_what_the_code_lists(frames, k):
    for seed in range(3):
        view = clip(frames, seed)
        found = released(k=k).reduce(view)
        assert ids(found) == as_in_the_code(view.tokens[0], frames, k)
        assert not found.ordered


def of_frames(found, t, places=P):
    return torch.tensor(ids(found)).div(places, rounding_mode="floor").bincount(minlength=t).tolist()


@pytest.mark.system("dycoke", "exact")
def test_a_window_of_196_tokens_keeps_370_of_784():
    view = clip(8, d=4, h=14, w=14)
    assert of_frames(DyCoke().reduce(view), 8, 196) == [196, 58, 58, 58] * 2
    assert of_frames(released().reduce(view), 8, 196) == [196, 58, 58, 58, 196, 58, 196, 58]


@pytest.mark.system("dycoke", "exact")
@pytest.mark.parametrize("frames", range(1, 11))
def test_the_count_follows_from_the_frames(frames):
    """A frame that has no window partner before it is whole; the last of an odd number stays here."""
    cut = int((1 - 0.7) * P)
    counts = of_frames(DyCoke().reduce(clip(frames)), frames)
    assert counts == [P if t % 4 == 0 else cut for t in range(frames)]
    still = tokens(1, P)[0].repeat(frames, 1)[None]
    view = View.of(still, layout=Layout.grid(H, W, frames))
    assert of_frames(DyCoke().reduce(view), frames) == counts


def test_in_the_order_of_the_picture_it_keeps_the_same():
    view = clip(9, 1)
    assert ids(DyCoke(tail="released").reduce(view)) == sorted(ids(released().reduce(view)))


def moving(frames=8):
    """A background with a little noise, over which one token moves from frame to frame, in the second row."""
    shown = tokens(1, P)[0] + 0.05 * tokens(3, frames * P)[0].unflatten(0, (frames, P))
    for t in range(frames):
        shown[t, W + t % W] = tokens(2, 1)[0, 0]
    view = View.of(shown.flatten(0, 1)[None], layout=Layout.grid(H, W, frames))
    return view, {t * P + W + t % W for t in range(frames)}


def recall(found, wanted):
    return len(wanted & set(ids(found))) / len(wanted)


@pytest.mark.system("dycoke", "directional")
def test_what_moves_is_kept_more_often_than_by_even_sampling():
    view, patch = moving()
    found = DyCoke().reduce(view)
    assert recall(found, patch) == 1
    for stub in STUBS:
        assert recall(stub(view, found.m), patch) <= 0.7


def test_a_picture_stays_whole_whatever_is_left_of_it():
    view = clip(1)
    assert ids(DyCoke().reduce(view)) == list(range(P))
    part = replace(view, tokens=view.tokens[:, 3:], ids=view.ids[:, 3:])
    assert DyCoke().reduce(part).m == P - 3


def test_frames_of_which_tokens_are_gone_are_refused():
    view = clip(4)
    part = replace(view, tokens=view.tokens[:, 3:], ids=view.ids[:, 3:])
    with pytest.raises(WinnowError, match="dycoke needs a token at each of 12 places"):
        DyCoke().reduce(part)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_tokens_are_counted_and_go_first(value):
    view, _ = moving()
    view.tokens[0, [P + 7, 2]] = value
    found = DyCoke().reduce(view)
    assert P + 7 not in ids(found)
    assert P + 2 in ids(found)  # what comes after a broken token is new
    assert int(view.notes["nan_scores"]) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype):
    view = clip(8, 3, b=2)
    half = replace(view, tokens=view.tokens.to(dtype))
    wide = replace(view, tokens=half.tokens.float())
    assert torch.equal(DyCoke().reduce(half).index, DyCoke().reduce(wide).index)


def test_a_batch_is_its_items_alone():
    view = clip(8, 4, b=3, d=33)
    together = DyCoke().reduce(view)
    for i in range(3):
        assert ids(together, i) == ids(DyCoke().reduce(View.of(view.tokens[i : i + 1], layout=view.layout)))


VISUAL, SLOTS = range(3, 23), 30


def decoding(seed, query=None):
    """A cache of 30 slots, of which 20 are visual, and the query of the last one."""
    made = torch.randn(3, 1, 2, SLOTS, 8, generator=torch.Generator().manual_seed(seed))
    kinds = torch.zeros(1, 2, SLOTS, dtype=torch.int8)
    kinds[..., list(VISUAL)] = 2
    query = made[2][:, :, -1:].repeat(1, 2, 1, 1) if query is None else query
    return KVView.of(made[0], made[1], query, kinds=kinds, moment="decode", fresh=1)


@pytest.mark.system("dycoke", "exact")
def test_a_token_reads_all_text_and_the_visual_slots_with_the_most_attention():
    view = decoding(0)
    action, _ = DyCoke(p=0.7).decode(view, State())
    attention = view.attention(1)[0, :, 0].mean(0).tolist()
    best = sorted(VISUAL, key=lambda j: -attention[j])[: int(20 * (1 - 0.7))]
    read = ids(action.rows)
    assert read == sorted({*range(SLOTS)} - {*VISUAL} | {*best})
    assert len(read) == 10 + 6
    assert read[-1] == SLOTS - 1


@pytest.mark.system("dycoke", "exact")
@pytest.mark.parametrize("reuse", [True, False])
def test_where_attention_stays_what_it_was_the_choice_is_not_made_anew(reuse):
    """The code reads all slots then."""
    method = DyCoke(p=0.5, reuse=reuse)
    first, state = method.decode(decoding(0), State())
    view = decoding(0)
    same, after = method.decode(view, state)
    assert ids(same.rows) == (ids(first.rows) if reuse else list(range(SLOTS)))
    other, _ = method.decode(decoding(1), after)
    assert ids(other.rows) == ids(DyCoke(p=0.5).decode(decoding(1), State())[0].rows)
    assert ids(method.replace(similar=2.0).decode(view, state)[0].rows) == ids(first.rows)


def test_without_visual_slots_it_only_looks():
    view = replace(decoding(0), kinds=torch.zeros(1, 2, SLOTS, dtype=torch.int8))
    assert isinstance(DyCoke().decode(view, State())[0], Observe)


ROWS = ("3 W 6", "9", "2 W 4 W 5")
FIRST = 2


def made(build):
    if build in CLIPS:
        return CLIPS[build].model(), CLIPS[build].samples(ROWS), CLIPS[build].collate
    return zoo.model(build), zoo.samples(build, ROWS), zoo.collate


@pytest.mark.parametrize(
    ("build", "k", "similar", "reuse"),
    [
        ("qwen2_5_vl", 0.0, 2.0, True),
        ("qwen2_5_vl", 0.5, 0.7, False),
        ("llava_next_video", 0.5, 0.7, True),
        ("llava_next_video", 0.5, 0.7, False),
    ],
)
def test_decoding_equals_by_hand(build, k, similar, reuse):
    """Of a batch, what each sample alone gives when slots are masked that its tokens do not read."""
    model, samples, collate = made(build)
    forced = torch.randint(10, 200, (len(samples), 6), generator=torch.Generator().manual_seed(3))
    plan = f"dycoke:k={k},p=0.7,layer={FIRST},similar={similar},reuse={str(reuse).lower()}"
    with winnow.compress(model, plan):
        out = kvhand.written(model, collate(samples), forced)
    whole = kvhand.written(model, collate(samples), forced)
    plain, kinds = Reference(model), set()
    for row, sample in enumerate(samples):
        entry = plain.entry(sample)
        hand = by_hand(plain, sample, entry, k=k, p=0.7)
        (held,) = {tuple(seen.held.tolist()) for seen in plain.run(entry, (), hand.cuts).layers[-1:]}
        visual = torch.isin(torch.tensor(held), torch.cat([torch.tensor([], dtype=torch.int64), *entry.items]))
        few = ReadingFew(model, visual, FIRST, 0.7, similar, reuse)
        trace = few.run(entry, forced[row, :-1].tolist(), hand.cuts)
        for step, logits in enumerate(out.logits):
            assert (logits[row] - trace.logits[step]).abs().max() <= 1e-5, (row, step)
        kinds |= {len(read) == int(visual.sum()) for read in few.read if len(visual.nonzero())}
        if visual.any():
            assert (out.logits[-1][row] - whole.logits[-1][row]).abs().max() > 1e-3
    assert kinds == ({True, False} if not reuse else {False})
    for layer in out.past_key_values.layers:
        assert not layer.changed  # nothing is dropped
        assert layer.store.length == layer.seen or k


def test_methods_that_drop_other_slots_are_refused():
    model, (sample,) = zoo.model("qwen2_5_vl"), zoo.samples("qwen2_5_vl", ("3 W 6",))
    forced = torch.full((1, 3), 20)
    for plan, reason in (
        (f"dycoke:layer={FIRST} + snapkv:keep=50%,window=4", "no longer holds them"),
        (f"dycoke:layer={FIRST} + fastv:layer=3,keep=10%", "holds other slots"),
    ):
        with winnow.compress(model, plan), pytest.raises(UnsupportedError, match=reason):
            kvhand.written(model, sample, forced)


def test_a_layer_that_the_model_does_not_have_is_refused():
    with pytest.raises(WinnowError, match="layer"):
        winnow.compress(zoo.model("qwen2_5_vl"), "dycoke:layer=9")


@pytest.mark.parametrize(("name", "value"), [("k", 1.5), ("p", -0.1), ("layer", 0), ("order", "any"), ("similar", 3)])
def test_bad_settings_say_what_is_allowed(name, value):
    with pytest.raises(WinnowError, match=name):
        DyCoke(**{name: value})
