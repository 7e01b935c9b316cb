"""STC by its card: what is new in a frame and in the stream; and the reuse of still tokens in a block of the tower."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import zoo
from torch import Tensor
from torch.nn.functional import normalize

from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.step import State
from winnow.core.view import View
from winnow.methods.stc import STC

from .stubs import STUBS, ids, tokens

H, W, D = 7, 7, 16
P = H * W


def clip(x: Tensor, grid: tuple[int, int] = (H, W)) -> View:
    """`[b, t, P, D]` as items of t frames."""
    return View.of(x.flatten(1, 2), layout=Layout.grid(*grid, x.shape[1]))


def stream(method: STC, frames: Tensor, grid: tuple[int, int] = (H, W)) -> list[list[int]]:
    """`[t, P, D]` frame by frame, each with what was remembered of those before."""
    state, kept = State(), []
    for frame in frames:
        action, state = method.prune(clip(frame[None, None], grid), state)
        kept.append(ids(action.reduction))
    return kept


class AsReleased:
    """The authors' pruner in plain words: a list of means, each in the channels of its own chunk."""

    def __init__(self) -> None:
        self.means: list[Tensor] = []

    def __call__(self, x: Tensor, t: int, k: int) -> list[int]:
        spread = [float(x[:, c].var(unbiased=False)) for c in range(x.shape[1])]
        calm = sorted(range(x.shape[1]), key=lambda c: spread[c])[: x.shape[1] // 2]
        frames = x[:, calm].unflatten(0, (t, -1))
        self.means.append(frames.mean((0, 1)))
        memory = normalize(torch.stack(self.means).mean(0), dim=0)
        kept = []
        for number, frame in enumerate(normalize(frames, dim=-1)):
            scores = []
            for token in frame:
                apart = [float(((token - centre) ** 2).sum()) for centre in (frame.mean(0), memory)]
                scores.append(sum(torch.tensor(-d / (2 * 2.0**p)).exp() for d in apart for p in range(-3, 2)))
            best = sorted(range(len(frame)), key=lambda j: float(scores[j]))[:k]
            kept += [number * len(frame) + j for j in sorted(best)]
        return kept


def released(keep: int | str) -> STC:
    (method,) = Plan.of(f"stc:released,keep={keep}").methods
    return method  # type: ignore[return-value]


@pytest.mark.system("stc", "exact")
def test_as_released_it_keeps_what_the_code_keeps() -> None:
    """Chunk after chunk, of one frame and of several, with means of channels that are not the same ones."""
    for seed in range(4):
        code, state = AsReleased(), State()
        for number, t in enumerate((1, 3, 1, 2)):
            x = tokens(10 * seed + number, t * P, D)[0].double() * torch.linspace(0.5, 2, D).roll(number)
            action, state = released(9).prune(clip(x.unflatten(0, (t, P))[None]), state)
            assert ids(action.reduction) == code(x, t, 9)


def test_the_channels_that_the_code_averages_are_not_the_same_ones() -> None:
    """Else `compat` would say nothing."""
    x = torch.stack([tokens(i, P, D)[0] * torch.linspace(0.5, 2, D).roll(5 * i) for i in range(6)])
    assert stream(released(9), x) != stream(released(9).replace(compat=False), x)


@pytest.mark.system("stc", "exact")
@pytest.mark.parametrize("chunk", [1, 2])
def test_it_equals_its_scores_by_hand(chunk: int) -> None:
    """The history at its full width; the last chunk may be shorter."""
    x = tokens(3, 5 * P, D)[0].double().unflatten(0, (5, P)) * torch.linspace(0.5, 2, D)
    means, want = [], []
    for first in range(0, 5, chunk):
        frames = x[first : first + chunk]
        flat = frames.flatten(0, 1)
        means.append(flat.mean(0))
        calm = sorted(range(D), key=lambda c: float(flat[:, c].var()))[: D // 2]
        past = normalize(torch.stack(means).mean(0)[calm], dim=0)
        for number, frame in enumerate(normalize(frames[..., calm], dim=-1), first):
            scores = [
                sum(float((-((one - c) ** 2).sum() / (2 * a)).exp()) for c in (frame.mean(0), past) for a in ALPHAS)
                for one in frame
            ]
            want += [number * P + j for j in sorted(sorted(range(P), key=lambda j: scores[j])[:6])]
    assert ids(STC(keep=30, chunk=chunk).reduce(clip(x[None]))) == want
    assert ids(STC(keep=6, each=True, chunk=chunk).reduce(clip(x[None]))) == want


ALPHAS = (1 / 8, 1 / 4, 1 / 2, 1, 2)


@pytest.mark.system("stc", "exact")
def test_a_stream_is_the_video_that_it_makes() -> None:
    """Frame by frame with a history, or all at once: no frame sees a later one."""
    x = tokens(4, 6 * P, D)[0].unflatten(0, (6, P))
    whole = ids(STC(keep=5, each=True).reduce(clip(x[None])))
    one_by_one = stream(STC(keep=5), x)
    assert [t * P + j for t, own in enumerate(one_by_one) for j in own] == whole
    assert stream(STC(keep=5), x[:3]) == one_by_one[:3]
    assert stream(STC(keep=5), x[3:]) != one_by_one[3:]  # it does remember


@pytest.mark.system("stc", "exact")
def test_odd_tokens_on_a_background_are_kept() -> None:
    tells_odd_ones(lambda view, k: STC(keep=k).reduce(view))


@pytest.mark.parametrize("stub", STUBS)
def test_odd_tokens_tell_a_stub(stub) -> None:
    with pytest.raises(AssertionError):
        tells_odd_ones(stub)


def tells_odd_ones(reduce) -> None:
    for seed in range(5):
        frame = tokens(seed, 1, D)[0].repeat(P, 1) + 0.01 * tokens(seed + 50, P, D)[0]
        odd = [5, 20, 33]
        frame[odd] = tokens(seed + 100, 3, D)[0]
        assert ids(reduce(clip(frame[None, None]), 3)) == odd


@pytest.mark.system("stc", "directional")
def test_what_the_history_has_seen_is_not_kept() -> None:
    """Half of the frame is a scene that 20 frames showed, half is new: in each drawing only the new half is kept.

    Without a history either half is kept as often as the other, from drawing to drawing.
    """
    old = []
    for seed in range(20):
        a, b = normalize(tokens(seed, 2, D)[0], dim=-1)
        frame = torch.stack([a] * 24 + [b] * 24) + 0.02 * tokens(seed + 100, 48, D)[0]
        past = a + 0.02 * tokens(seed + 200, 20 * 48, D)[0].unflatten(0, (20, 48))
        kept = stream(STC(keep=12), torch.cat([past, frame[None]]), (6, 8))[-1]
        assert set(kept) <= set(range(24, 48))
        fresh = stream(STC(keep=12), frame[None], (6, 8))[0]
        old.append(len([j for j in fresh if j < 24]) / 12)
        for stub in STUBS:
            assert len([j for j in ids(stub(clip(frame[None, None], (6, 8)), 12)) if j < 24]) >= 4
    mean, error = torch.tensor(old).mean(), torch.tensor(old).std() / len(old) ** 0.5
    assert abs(mean - 0.5) <= 2 * error


def test_the_items_of_a_view_do_not_see_one_another_and_are_all_remembered() -> None:
    x = tokens(5, 3 * P, D)[0].unflatten(0, (3, P))
    together, state = STC(keep=5).prune(clip(x[:, None]), State())
    assert [ids(together.reduction, i) for i in range(3)] == [stream(STC(keep=5), frame[None])[0] for frame in x]
    total, count = state.request["history"]
    assert count == 3
    torch.testing.assert_close(total, x.mean(1).sum(0))


def test_the_history_does_not_grow() -> None:
    state, sizes = State(), set()
    for frame in tokens(6, 30 * P, D)[0].unflatten(0, (30, P)):
        _, state = STC(keep=5).prune(clip(frame[None, None]), state)
        sizes.add(sum(x.numel() for x in state.request["history"]))
    assert sizes == {D + 1}


def test_a_budget_is_dealt_evenly_over_frames_or_counted_in_each() -> None:
    view = clip(tokens(7, 4 * P, D)[0].unflatten(0, (4, P))[None])

    def counts(method: STC) -> list[int]:
        return torch.tensor(ids(method.reduce(view))).div(P, rounding_mode="floor").bincount(minlength=4).tolist()

    assert counts(STC(keep=22)) == [6, 6, 5, 5]
    assert counts(STC(keep=5, each=True)) == [5] * 4
    assert counts(STC(keep="10%", each=True)) == [5] * 4
    assert counts(STC(keep=1000, each=True)) == [P] * 4


def test_after_an_earlier_reduction_frames_keep_what_they_have() -> None:
    view = clip(tokens(8, 2 * P, D)[0].unflatten(0, (2, P))[None])
    left = torch.cat([torch.arange(3), torch.arange(P, 2 * P)])
    part = replace(view, tokens=view.tokens[:, left], ids=left[None])
    for method, want in ((STC(keep=5, each=True), [3, 5]), (STC(keep=30), [3, 27])):
        frames = torch.tensor(ids(method.reduce(part))) >= 3
        assert [int((~frames).sum()), int(frames.sum())] == want


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_tokens_go_first_and_spoil_no_history(value: float) -> None:
    x = tokens(9, 3 * P, D)[0].unflatten(0, (3, P))
    x[0, 4] = value
    view = clip(x[None])
    found = ids(STC(keep=3 * P - 1).reduce(view))
    assert 4 not in found
    assert len(found) == 3 * P - 1
    assert int(view.notes["nan_scores"]) == 1
    _, state = STC(keep=3).prune(clip(x[None]), State())
    assert bool(state.request["history"][0].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    x = tokens(13, 2 * P, D)[0].unflatten(0, (2, P))[None].to(dtype)
    assert ids(STC(keep=20).reduce(clip(x))) == ids(STC(keep=20).reduce(clip(x.float())))


def test_tiles_of_a_picture_are_one_frame() -> None:
    from winnow.testing import Picture

    layout = Picture.tiled(4, 2, 1).lm
    view = View.of(tokens(14, layout.n_content, D), layout=layout)
    flat = View.of(view.tokens, layout=Layout.grid(1, layout.n_content))
    assert ids(STC(keep=9).reduce(view)) == ids(STC(keep=9).reduce(flat))


@pytest.mark.parametrize(("name", "value"), [("keep", 1.5), ("each", 2), ("chunk", -1), ("compat", "yes")])
def test_bad_settings_say_what_is_allowed(name: str, value: object) -> None:
    with pytest.raises(WinnowError, match=name):
        STC(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("build", ["llava_clip", "qwen2_5_vl"])
def test_in_a_stream_the_history_goes_on(build: str) -> None:
    """The same frame twice: the second one is judged by what was before, as by hand."""
    import winnow

    model = zoo.model(build)
    parts = [zoo.sample(build, "3 A 2", seed=seed) for seed in (0, 1, 2)]
    seen: list[list[int]] = []
    with winnow.stream(model, "stc:keep=6 + streaming-llm:keep=200") as session:
        for part in parts:
            session.feed(part)
            seen.append(session._handle.last.items[0].kept.tolist())  # type: ignore[union-attr]
    plain, state = zoo.model(build).model, State()
    for part, found in zip(parts, seen, strict=True):
        pixels = {name: part[name] for name in ("pixel_values", "image_grid_thw") if name in part}
        with torch.no_grad():
            rows = plain.get_image_features(**pixels, return_dict=True).pooler_output[0]
        action, state = STC(keep=6).prune(View.of(rows[None], layout=Layout.sequence(len(rows))), state)
        assert ids(action.reduction) == found
