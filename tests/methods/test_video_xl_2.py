"""Video-XL-2 by its card: blocks that read a few blocks before them, and a question that reads a mixed cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import zoo
from clips import CLIPS
from torch import Tensor

import winnow
from tests import kvdecode, kvhand
from tests.parts.test_units import mask_by_hand
from winnow.contract import KVView, Observe, Parted, State
from winnow.core.errors import WinnowError
from winnow.methods.video_xl_2 import VideoXL2
from winnow.reference import video
from winnow.world.clips import ClipSpec, clip

STEPS = torch.randint(2, 120, (3, 4), generator=torch.Generator().manual_seed(5))
SMALL = {"unit": 4, "block": 2, "previous": 1, "chunk": 2, "relevant": 1, "step": 2}
ROWS = {"qwen2_5_vl": ("2 X 4", "3 W 6"), "llava_next_video": ("3 W 6", "2 W 4")}


def random_view(kinds: list[int], b: int = 1, seed: int = 0, moment: str = "before") -> KVView:
    generator = torch.Generator().manual_seed(seed)
    n = len(kinds)
    keys, values, queries = (torch.randn(b, h, n, 8, generator=generator) for h in (2, 2, 4))
    own = torch.tensor(kinds).expand(b, 2, n)
    return KVView.of(keys, values, 3 * queries, kinds=own, moment=moment)


KINDS = [0] * 2 + [2] * 26 + [0] * 3  # six units of four tokens, and one of two


def pooled_by_hand(x: Tensor, kinds: list[int], settings: dict[str, Any], dense: set[int]) -> Tensor:
    """The mixed cache of keys or values `[G, n, d]`, slot by slot."""
    made, number, seen = [], 0, 0
    visual = sum(map(bool, kinds))
    last = (visual - 1) // settings["unit"] // settings["chunk"]
    while number < len(kinds):
        unit, place = divmod(seen, settings["unit"])
        chunk = unit // settings["chunk"]
        if not kinds[number] or chunk in dense | {0, last}:
            made.append(x[:, number])
            seen += bool(kinds[number])
            number += 1
            continue
        size = min(settings["step"], settings["unit"] - place, visual - seen)
        made.append(x[:, number : number + size].mean(1))
        seen, number = seen + size, number + size
    return torch.stack(made, 1)


def relevant_by_hand(view: KVView, settings: dict[str, Any]) -> set[int]:
    """The chunks of the units that the text behind the video attends to most, head by head and row by row."""
    kinds = view.kinds[0, 0].tolist()
    visual = [i for i, kind in enumerate(kinds) if kind]
    rows = range(visual[-1] + 1, view.n)
    total = [0.0] * (1 + (len(visual) - 1) // settings["unit"])
    for head in range(view.queries.shape[1]):
        for row in rows:
            keys = view.keys[0, head // view.group, : row + 1].double()
            weights = (keys @ view.queries[0, head, row].double() * view.scaling).softmax(0)
            for number, slot in enumerate(visual):
                total[number // settings["unit"]] += float(weights[slot])
    order = sorted(range(len(total)), key=lambda unit: (-total[unit], unit))
    return {unit // settings["chunk"] for unit in order[: settings["relevant"]]}


def _is_the_card(left) -> None:
    for seed in range(8):
        view = random_view(KINDS, seed=seed)
        want = relevant_by_hand(view, SMALL)
        for x, got in zip((view.keys, view.values), left(view), strict=True):
            torch.testing.assert_close(got[0], pooled_by_hand(x[0], KINDS, SMALL, want))


def mixed(method: VideoXL2, view: KVView) -> tuple[Tensor, Tensor]:
    action, _ = method.evict(view, State())
    return action.left.k.apply(view.keys), action.left.v.apply(view.values)


@pytest.mark.system("video-xl-2", "exact")
def test_the_mixed_cache_equals_the_card_written_naively():
    _is_the_card(lambda view: mixed(VideoXL2(**SMALL), view))


@pytest.mark.parametrize(
    "stub",
    [
        lambda view: mixed(VideoXL2(**SMALL | {"retrieved": (0,)}), view),  # no chunk but the first is relevant
        lambda view: mixed(VideoXL2(**SMALL | {"step": 4}), view),
        lambda view: (view.keys[:, :, ::2], view.values[:, :, ::2]),
    ],
    ids=["none relevant", "other step", "every second"],
)
def test_the_card_fails_for_a_stub(stub):
    with pytest.raises((AssertionError, RuntimeError)):
        _is_the_card(stub)


@pytest.mark.system("video-xl-2", "exact")
def test_the_length_of_the_cache_and_the_share_of_entries_are_the_formulas():
    view = random_view(KINDS)
    action, _ = VideoXL2(**SMALL | {"retrieved": (2,)}).evict(view, State())
    assert isinstance(action, Parted)
    # Chunks 0, 1 and 3 are whole: 8 + 8 + 2 visual tokens; of chunk 2, 8 tokens give 4; and 5 of text.
    assert action.left.k.m == 18 + 4 + 5
    mask = torch.tensor(mask_by_hand(KINDS, 4, 2, 1))[:28]
    assert view.notes == {"allowed": int(mask.sum()), "entries": 28 * 29 // 2}
    assert view.notes["allowed"] / view.notes["entries"] == pytest.approx(0.80, abs=0.1)


@pytest.mark.system("video-xl-2", "exact")
def test_what_the_question_reads_is_what_the_cache_keeps_and_all_dense_is_everything():
    method = VideoXL2(**SMALL)
    before, state = method.evict(random_view(KINDS, b=2), State())
    behind, after = method.evict(random_view(KINDS, b=2, seed=9, moment="prefill"), state)  # the choice is remembered
    assert torch.equal(before.left.k.to_matrix(), behind.k.to_matrix())
    assert after == State()
    alone = [method.evict(sample, State())[0].left.k.m for sample in map(_alone, (0, 1))]
    assert before.left.k.counts is None or before.left.k.counts == (alone[0],) * 2 + (alone[1],) * 2
    whole = VideoXL2(**SMALL | {"step": 1, "block": 0})
    assert isinstance(whole.evict(random_view(KINDS), State())[0], Observe)
    every = VideoXL2(**SMALL | {"retrieved": tuple(range(7)), "block": 0})
    assert isinstance(every.evict(random_view(KINDS), State())[0], Observe)
    assert isinstance(method.evict(random_view([0] * 9), State())[0], Observe)


def _alone(row: int) -> KVView:
    view = random_view(KINDS, b=2)
    own = (x[row : row + 1] for x in (view.keys, view.values, view.queries))
    return KVView.of(*own, kinds=view.kinds[row : row + 1], moment="before")


def build_of(name: str) -> Any:
    return CLIPS.get(name)


def model_of(name: str) -> Any:
    return zoo.model(name) if build_of(name) is None else build_of(name).model()


def samples_of(name: str) -> list[dict[str, Tensor]]:
    own = build_of(name)
    return zoo.samples(name, ROWS[name]) if own is None else own.samples(ROWS[name])


def kinds_of(model: Any, ids: Tensor) -> list[int]:
    token = getattr(model.config, "video_token_id", None) or model.config.video_token_index
    return [2 if int(i) == token else 0 for i in ids]


@contextmanager
def by_hand(model: Any, kinds: list[int], settings: dict[str, Any], dense: set[int]) -> Iterator[None]:
    """A plain model whose attention is the card's: entry by entry in the prompt, and on a cache pooled by hand."""
    n, end = len(kinds), max(i for i, kind in enumerate(kinds) if kind) + 1
    seen = torch.tensor(mask_by_hand(kinds, settings["unit"], settings["block"], settings["previous"]))

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **kwargs: Any) -> Any:
        if not hasattr(module, "layer_idx") or key.shape[2] < n:  # the vision tower
            return kvhand._attention(lambda *_: None, False, module, query, key, value, mask, **kwargs)
        group, out = query.shape[1] // key.shape[1], []
        small = [pooled_by_hand(x[0, :, :end], kinds[:end], settings, dense) for x in (key, value)]
        first = key.shape[2] - query.shape[2]
        for row in range(query.shape[2]):
            at = first + row
            if at < end:
                keys, values = (x[0][:, seen[at].nonzero()[:, 0]] for x in (key, value))
            else:
                parts = zip(small, (key, value), strict=True)
                keys, values = (torch.cat([a, b[0, :, end : at + 1]], 1) for a, b in parts)
            keys, values = (x.repeat_interleave(group, 0) for x in (keys, values))
            weights = (query[0, :, row, None] @ keys.transpose(1, 2) * kwargs["scaling"]).softmax(-1)
            out.append(weights @ values)
        return torch.cat(out, 1).transpose(0, 1)[None].contiguous(), None

    with kvhand._attending(model, attention):
        yield


@pytest.mark.system("video-xl-2", "model")
@pytest.mark.parametrize("build", sorted(ROWS))
def test_on_a_model_equals_the_card_by_hand(build):
    """The prompt, its question, and decoded tokens."""
    model = model_of(build)
    for sample in samples_of(build):
        kinds = kinds_of(model, sample["input_ids"][0])
        units = -(-sum(map(bool, kinds)) // 4)
        assert units >= 5
        settings = SMALL | {"retrieved": (units // 2,), "chunk": 1}
        with winnow.compress(model, VideoXL2(**settings)) as handle:
            got = kvhand.written(model, sample, STEPS[:1])
            assert handle.last.notes["allowed"] < handle.last.notes["entries"]
        with by_hand(model, kinds, settings, {units // 2}):
            wanted = kvhand.written(model, sample, STEPS[:1])
        kvdecode.close(got.logits, wanted.logits, atol=2e-5)
        plain = kvhand.written(model, sample, STEPS[:1])
        assert (got.logits[0] - plain.logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize("build", sorted(ROWS))
def test_a_padded_batch_equals_its_samples(build):
    samples = samples_of(build)
    own = build_of(build)
    inputs = (zoo if own is None else own).collate(samples)
    kvdecode.Case(model_of(build), inputs, samples).check_batch(VideoXL2(**SMALL), STEPS[:2])


@pytest.mark.system("video-xl-2", "exact")
def test_with_enough_blocks_and_a_step_of_one_the_logits_are_those_of_the_plain_model():
    """As parts, and as nothing at all."""
    model, (sample, _) = model_of("qwen2_5_vl"), samples_of("qwen2_5_vl")
    plain = kvhand.written(model, sample, STEPS[:1])
    with winnow.compress(model, VideoXL2(**SMALL | {"previous": 99, "step": 1})):
        parts = kvhand.written(model, sample, STEPS[:1])
    kvdecode.close(parts.logits, plain.logits)
    with winnow.compress(model, "video-xl-2:block=0,step=1"):
        nothing = kvhand.written(model, sample, STEPS[:1])
    assert all(torch.equal(a, b) for a, b in zip(nothing.logits, plain.logits, strict=True))


def right(plan_of, cases) -> int:
    model, processor = video.load()
    found = 0
    for drawn, question, second in cases:
        with winnow.compress(model, plan_of(second)):
            found += video.answer(model, processor, drawn.pixels, question.text) == question.answer
    return found


@pytest.mark.system("video-xl-2", "directional")
@pytest.mark.xdist_group("samples")
def test_a_word_in_a_chosen_chunk_is_read_and_one_in_another_is_lost_as_the_step_grows():
    """Sixteen seconds, of which one shows a word; a chunk is a second."""
    cases = []
    for seed in range(60):
        drawn = clip(seed, 32, split="test", spec=ClipSpec(needle=True), types=("needle",))
        second = drawn.questions[0].evidence[0].frame // 2 if drawn.questions else 0
        if 1 < second < 14:  # neither the first chunk nor the last, which stay as they are
            cases.append((drawn, drawn.questions[0], second))
        if len(cases) == 8:
            break
    settings = {"unit": 9, "chunk": 1, "block": 0}
    chosen = right(lambda second: VideoXL2(**settings, step=9, retrieved=(second,)), cases)
    other = {step: right(lambda second: VideoXL2(**settings, step=step, retrieved=(0,)), cases) for step in (1, 9)}  # noqa: B023
    assert chosen >= 0.6 * len(cases)
    assert other[1] > other[9]
    assert chosen - other[9] >= 0.3 * len(cases)


@pytest.mark.parametrize("settings", [{"step": 5}, {"unit": 0}, {"chunk": 0}, {"step": 0}, {"retrieved": (-1,)}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(WinnowError):
        VideoXL2(**settings)


def test_an_attention_without_masks_of_its_own_is_refused():
    model, (sample, _) = model_of("qwen2_5_vl"), samples_of("qwen2_5_vl")
    refused = pytest.raises(WinnowError, match="attention that takes any mask")
    with kvhand.evicting(model, lambda *_: None), winnow.compress(model, VideoXL2(**SMALL)), refused:
        kvhand.written(model, sample, STEPS[:1])
