"""Audio-guided budgets: windows that are heard keep more, exactly so many tokens, and the sound of the same prompt."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import zoo
from builds.grids import AUDIO, AUDIO_END, AUDIO_START, END, START, VIDEO
from builds.qwen_omni import HEARS
from builds.qwen_omni import SOUND as SOUND_OF_BUILDS
from cases import same
from families import by_hand
from masked import Cut
from probes import forward, generate, new_tokens, step_logits

import winnow
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.layout import Layout
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.point import Point
from winnow.core.step import Observe, Step
from winnow.core.view import View
from winnow.engine.bound_plan import BoundPlan
from winnow.methods.audio_guided import AudioGuided
from winnow.methods.evs import EVS
from winnow.models.families import family_of
from winnow.signals.sound import SoundAttention
from winnow.testing import WITH_CLS

from .byhand.audio_guided import SETTINGS, chosen
from .directional import gap
from .sounds import filmed, left_of
from .stubs import STUBS, ids, tokens

T, H, W = 8, 3, 4
P = H * W
SOUND = 200  # tokens of 40 ms: 8 s, four windows of 2 s, and two frames in each


def clip(received=None, seed=0, b=1, t=T):
    received = torch.rand(b, SOUND, generator=torch.Generator().manual_seed(seed)) if received is None else received
    return View.of(tokens(seed, t * P, 16, b), received, layout=Layout.grid(H, W, t))


def bang(window=2):
    """Attention that falls on one window of 50 tokens."""
    received = torch.rand(1, SOUND, generator=torch.Generator().manual_seed(1))
    received[:, 50 * window : 50 * window + 50] += 1
    return received


def by_window(kept: list[int], frames: int = T, windows: int = 4) -> list[int]:
    """How many tokens stay in each window of two frames."""
    return torch.tensor(kept).div(frames // windows * P, rounding_mode="floor").bincount(minlength=windows).tolist()


@pytest.mark.system("audio-guided", "exact")
@pytest.mark.parametrize("keep", [1, 10, 40, T * P - 1, T * P])
@pytest.mark.parametrize("window", [7, 50, 64, 1000])
def test_what_stays_is_what_the_plain_loops_keep(keep, window):
    for seed in range(4):
        view = clip(seed=seed)
        want = chosen(view.tokens[0], T, view[SoundAttention()][0].tolist(), keep, window, 0.3)
        found = AudioGuided(keep=keep, window=window, top=0.3).reduce(view)
        assert ids(found) == want
        assert found.m == keep


def a_bang_is_seen(reduce) -> None:
    """The window in which all is heard keeps more than any other, and those keep as many as one another."""
    for window in range(4):
        kept = by_window(ids(reduce(clip(bang(window)), 32)))
        assert sum(kept) == 32
        others = kept[:window] + kept[window + 1 :]
        assert kept[window] > 2 * max(others) > 0
        assert max(others) - min(others) <= 1


@pytest.mark.system("audio-guided", "exact")
def test_a_window_with_a_bang_keeps_most_of_the_budget():
    a_bang_is_seen(lambda view, k: AudioGuided(keep=k).reduce(view))


@pytest.mark.parametrize("deaf", [*STUBS, lambda view, k: EVS(keep=k).reduce(view)])
def test_a_bang_tells_what_hears_nothing(deaf):
    with pytest.raises(AssertionError):
        a_bang_is_seen(deaf)


@pytest.mark.system("audio-guided", "exact")
def test_without_a_sound_it_is_evs():
    silent = torch.zeros(1, 0)
    for seed in range(4):
        view = clip(silent, seed)
        for keep in (5, 30, "50%"):
            assert ids(AudioGuided(keep=keep).reduce(view)) == ids(EVS(keep=keep).reduce(view))


def test_ties_go_to_the_first_and_broken_tokens_of_the_sound_are_heard_last():
    flat = ids(AudioGuided(keep=32, top=0.25).reduce(clip(torch.ones(1, SOUND))))
    assert by_window(flat) == by_window(ids(AudioGuided(keep=32).reduce(clip(bang(0)))))
    view = clip(bang(1).index_fill(1, torch.arange(50, 100), torch.nan))
    kept = by_window(ids(AudioGuided(keep=32).reduce(view)))
    assert kept[1] == min(kept)
    assert int(view.notes["nan_scores"]) == 50


def test_broken_tokens_of_the_video_have_no_share_and_fill_up():
    view = clip(bang())
    view.tokens[0, : 2 * P] = torch.nan
    kept = ids(AudioGuided(keep=40).reduce(view))
    assert len(kept) == 40
    assert min(kept) >= 2 * P
    assert len(ids(AudioGuided(keep=T * P - 3).reduce(view))) == T * P - 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_fp32(dtype):
    view = clip(bang())
    half = View.of(view.tokens.to(dtype), bang(), layout=view.layout)
    wide = View.of(half.tokens.float(), bang(), layout=view.layout)
    assert ids(AudioGuided(keep=30).reduce(half)) == ids(AudioGuided(keep=30).reduce(wide))


def test_a_batch_equals_its_items():
    view = clip(b=3)
    together = AudioGuided(keep=30).reduce(view)
    for lane in range(3):
        own = View.of(view.tokens[lane : lane + 1], view[SoundAttention()][lane : lane + 1], layout=view.layout)
        assert ids(together, lane) == ids(AudioGuided(keep=30).reduce(own))


@pytest.mark.system("audio-guided", "directional")
def test_more_is_left_of_what_is_seen_while_it_is_heard():
    """Drawn sounds, whose loudness stands for attention; a thing is seen while an event is heard, others always."""
    made = [filmed(seed) for seed in range(40)]
    own = [left_of(AudioGuided(keep="10%", window=12, top=0.5).reduce(one.view), one) for one in made]
    equal = [left_of(EVS(keep="10%").reduce(one.view), one) for one in made]
    assert gap(torch.tensor(own).numpy(), torch.tensor(equal).numpy()).low > 0


@pytest.mark.parametrize("settings", [{"low": 0.6, "high": 0.5}, {"window": 0}, {"top": 0.0}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(WinnowError, match="audio-guided"):
        AudioGuided(**settings)


@dataclass(frozen=True)
class Early(Method):
    """Looks at the sound where the prompt is not known yet."""

    where: str = "features"
    slug: ClassVar[str] = "early"

    def steps(self, info):
        return (Step(Point.of(self.where), lambda view, state: Observe(), (SoundAttention(),)),)


ROWS = ("3 U 2 V 6", "2 V 3 U 5", "9", "4 V 2", "2 A 3 V 1 U 2")
THINKER = "qwen2_5_omni_thinker"
TOLERANCE = 1e-5  # of the largest logit: two orders of the same sums in float32


def received_by(model, part) -> list[float]:
    """Attention received in the last layer of the encoder of sounds, in stretches, and of two frames the mean."""
    if "input_features" not in part:
        return []
    box: dict = {}
    module = model.audio_tower.layers[-1].self_attn
    hooks = [
        getattr(module, name).register_forward_hook(lambda m, a, out, name=name: box.update({name: out}))
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        model.get_audio_features(part["input_features"], part["feature_attention_mask"])
    for hook in hooks:
        hook.remove()
    d, stretch = module.head_dim, model.audio_tower.n_window
    total = []
    for q, k in zip(box["q_proj"].split(stretch), box["k_proj"].split(stretch), strict=True):
        heads = [(q[:, i : i + d] @ k[:, i : i + d].T / d**0.5).softmax(1) for i in range(0, q.shape[1], d)]
        total += torch.stack(heads).mean(0).sum(0).tolist()
    return [(a + b) / 2 for a, b in zip(total[::2], total[1::2], strict=False)]


@functools.cache
def made(build):
    return HEARS[build].model()


@pytest.mark.system("audio-guided", "model")
@pytest.mark.parametrize("build", HEARS)
def test_on_a_model_that_hears_it_is_the_plain_model_without_the_rest(build):
    model, parts = made(build), HEARS[build].samples(ROWS)
    inputs = HEARS[build].collate(parts)
    with winnow.compress(model, AudioGuided(**SETTINGS)) as handle:
        output, ledger = generate(model, inputs), handle.last
    logits, said = step_logits(output), new_tokens(output, inputs)
    for row, part in enumerate(parts):
        at = (part["input_ids"][0] == model.config.video_token_id).nonzero()[:, 0]
        received, positions = received_by(model, part), [at] if len(at) else []
        sizes = {"window": SETTINGS["window"], "top": SETTINGS["top"]}

        def choose(rows, left, received=received, sizes=sizes):
            return [at[chosen(rows[at], 2, received, 10, **sizes)] for at in left]

        want = by_hand(model, part, positions, said[row, :-1].tolist(), Cut(0, choose))
        assert float((logits[row] - want.logits).abs().max() / want.logits.abs().max()) <= TOLERANCE, row
        items = [item for item in ledger.items if item.row == row and item.modality == "video"]
        assert [at[item.kept].tolist() for item in items] == [kept.tolist() for kept in want.kept]
        others = [item for item in ledger.items if item.row == row and item.modality != "video"]
        assert all(len(item.kept) == item.n_visual and not item.reductions for item in others)


@pytest.mark.parametrize("build", HEARS)
def test_keep_all_is_bit_identical(build):
    model, inputs = made(build), HEARS[build].batch(ROWS)
    plain = generate(model, inputs)
    with winnow.compress(model, AudioGuided(keep="100%")):
        assert same(generate(model, inputs), plain)


def test_what_is_heard_changes_what_is_seen():
    """The same video beside another sound; so the sound of the prompt is what is listened to."""
    model, part = made(THINKER), HEARS[THINKER].sample("3 U 2 V 6")
    kept = set()
    with winnow.compress(model, AudioGuided(**SETTINGS)) as handle:
        for seed in range(8):
            noise = torch.randn(part["input_features"].shape, generator=torch.Generator().manual_seed(seed))
            forward(model, part | {"input_features": noise})
            kept |= {tuple(item.kept.tolist()) for item in handle.last.items if item.modality == "video"}
    assert len(kept) > 1


def test_a_prompt_of_more_sounds_than_videos_is_refused():
    build = HEARS[THINKER]
    with winnow.compress(made(THINKER), AudioGuided()) as handle:
        for row in ("2 U 1 U 3 V 4", "2 V 1 V 3 U 4"):
            with pytest.raises(UnsupportedError, match="which sound"):
                forward(handle.model, build.sample(row))
        forward(handle.model, build.sample("1 V 2 U 3 V 2 U 4"))
        assert [item.modality for item in handle.last.items] == ["video", "audio"] * 2


def test_each_video_has_its_own_sound():
    model, part = made(THINKER), HEARS[THINKER].sample("1 V 2 U 3 V 2 U 4")
    with winnow.compress(model, AudioGuided(**SETTINGS)) as handle:
        forward(model, part)
        items = [item for item in handle.last.items if item.modality == "video"]
    sounds = [
        received_by(model, {name: part[name][i : i + 1] for name in ("input_features", "feature_attention_mask")})
        for i in (0, 1)
    ]
    rows = model.get_video_features(part["pixel_values_videos"], part["video_grid_thw"]).pooler_output
    for item, received, x in zip(items, sounds, rows, strict=True):
        assert item.kept.tolist() == chosen(x.detach(), 2, received, 10, SETTINGS["window"], SETTINGS["top"])


@pytest.mark.parametrize("build", HEARS)
def test_a_sound_that_stands_between_the_frames_is_that_of_the_video(build):
    """As processors write it with `use_audio_in_video`: what is heard in two seconds stands behind what is seen."""
    model, part = made(build), HEARS[build].sample("3 U 2 V 6")
    frame, sound = [VIDEO] * 12, [AUDIO] * (SOUND_OF_BUILDS // 4)
    ids = torch.tensor([[11, 12, START, AUDIO_START, *frame, *sound, *frame, AUDIO_END, END, 21, 22]])
    part |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    part |= {"video_second_per_grid": torch.tensor([4.0]), "use_audio_in_video": True}
    with winnow.compress(model, AudioGuided(**SETTINGS)) as handle:
        output, ledger = generate(model, part), handle.last
    at, received = (ids[0] == VIDEO).nonzero()[:, 0], received_by(model, part)

    def choose(rows, left):
        return [at[chosen(rows[at], 2, received, 10, SETTINGS["window"], SETTINGS["top"])]]

    said = new_tokens(output, part)[0, :-1].tolist()
    want = by_hand(model, part, [at], said, Cut(0, choose))
    apart = (step_logits(output)[0] - want.logits).abs().max() / want.logits.abs().max()
    assert float(apart) <= TOLERANCE
    (kept,) = [at[item.kept].tolist() for item in ledger.items if item.modality == "video"]
    assert kept == want.kept[0].tolist()


def test_inputs_with_a_sound_are_not_prepared():
    with pytest.raises(UnsupportedError, match="hold audio"):
        winnow.prepare(made("qwen2_5_omni_full"), HEARS["qwen2_5_omni_full"].sample("3 U 2 V 6"), "audio-guided")


def test_a_model_without_ears_is_refused():
    """A video is read there, and no sound beside it."""
    model = zoo.model("qwen2_5_vl")
    assert family_of(model).ear is None
    with pytest.raises(UnsupportedError, match="sees no encoder of sounds"):
        winnow.compress(model, "audio-guided:keep=25%")


@pytest.mark.parametrize("at", ["features", "blocks[1]"])
def test_the_sound_of_a_video_is_not_known_in_its_tower(at):
    with pytest.raises(WinnowError, match="which sound belongs to a video is known in the prompt"):
        BoundPlan.of(Plan((Early(at),)), replace(WITH_CLS, modalities=("video", "audio")))
