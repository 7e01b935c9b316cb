"""Deep Forcing by its card: sinks that are moved in time, what newest frames look at, and models that decode."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import winnow
from tests import kvdecode, kvhand
from tests.kvdecode import LENGTHS
from winnow.cache.rotary import Rotary
from winnow.contract import KVBudget, KVReduce, KVView, ModelInfo, Observe, Repose, State, WinnowError
from winnow.core.errors import UnsupportedError
from winnow.learn.generation.writer import IN_TIME, ROTARY, TIME, FrameCache
from winnow.methods import deep_forcing as module
from winnow.methods.deep_forcing import DeepForcing

FRAME = 4
TOY = DeepForcing(sink=3, recent=2, window=8, top=2, frame=FRAME)
FRAMES = 26


def frames(seed=0, heads=4, d=16):
    """Queries, keys and values of frames, two query heads for each KV head."""
    g = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randn(2, h, FRAME, d, generator=g) for h in (heads, heads // 2, heads // 2)) for _ in range(FRAMES)
    ]


def streamed(method):
    """Keys and values that are held after each frame."""
    cache, found = FrameCache(method.steps(ModelInfo())), []
    for q, k, v in frames():
        cache.add(k, v)
        cache.settle(q)
        found.append(cache.held[:2])
    return found


def turned(x, by, frequencies, interleaved):
    """One key, a number of steps later, pair by pair as complex numbers in double precision."""
    x, r = x.double(), len(frequencies)
    a, b = (x[: 2 * r : 2], x[1 : 2 * r : 2]) if interleaved else (x[:r], x[r : 2 * r])
    turn = torch.complex(a, b) * torch.polar(torch.ones(r).double(), by * frequencies.double())
    made = torch.stack([turn.real, turn.imag], 1).flatten() if interleaved else torch.cat([turn.real, turn.imag])
    return torch.cat([made, x[2 * r :]])


class Lane:
    """One head of one sample by hand: which tokens are held, and when each is now."""

    def __init__(self, method, frequencies, interleaved):
        self.method, self.rope = method, (frequencies, interleaved)
        self.held, self.by = [], []

    def read(self, keys):
        return torch.stack([turned(keys[i], by, *self.rope) for i, by in zip(self.held, self.by, strict=True)])

    def add(self, tokens):
        self.held += tokens
        self.by += [0] * len(tokens)

    def settle(self, queries, keys):
        """Queries of the newest tokens, of all heads that read this one; keys as they were first."""
        m = self.method
        size, n = m.frame, len(self.held)
        if n <= m.window * size:
            return
        first, last = m.sink * size, m.recent * size
        now, scores = self.read(keys), {}
        for place in range(first, n - last):
            scores[place] = float((queries[:, -last:].double() @ now[place]).sum())
        best = sorted(sorted(scores, key=lambda place: (-scores[place], place))[: m.top * size])
        self.held = [self.held[p] for p in [*range(first), *best, *range(n - last, n)]]
        end, count = self.held[-1] // size, len(self.held)
        self.by = [end - (count - 1 - j) // size - token // size for j, token in enumerate(self.held)]


def streamed_by_hand():
    found, given = [], frames()
    only_time = ROTARY.frequencies.clone()
    only_time[TIME:] = 0
    lanes = [[Lane(TOY, only_time, True) for _ in range(2)] for _ in range(2)]
    for number in range(FRAMES):
        queries, keys, values = (torch.cat([own[i] for own in given[: number + 1]], 2) for i in range(3))
        rows = []
        for i, own in enumerate(lanes):
            for head, lane in enumerate(own):
                lane.add(list(range(number * FRAME, (number + 1) * FRAME)))
                lane.settle(queries[i, 2 * head : 2 * head + 2], keys[i, head])
                rows.append((lane.read(keys[i, head]), values[i, head, lane.held].double()))
        found.append(tuple(torch.stack(part).unflatten(0, (2, 2)) for part in zip(*rows, strict=True)))
    return found


def check_stream(method):
    for ours, wanted in zip(streamed(method), streamed_by_hand(), strict=True):
        for a, b in zip(ours, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=1e-5)


@pytest.mark.system("deep-forcing", "exact")
def test_a_stream_of_frames_is_held_as_by_hand():
    check_stream(TOY)
    sizes = [held[0].shape[2] // FRAME for held in streamed(TOY)]
    assert sizes[:10] == [1, 2, 3, 4, 5, 6, 7, 8, 7, 8]
    assert max(sizes) == 8


@pytest.mark.parametrize("stub", ["in place", "newest", "attention", "all axes", "rest in order", "no sink"])
def test_that_fails_for_a_stub(stub, monkeypatch):
    method = TOY
    if stub in ("newest", "attention"):
        method = TOY.replace(by=stub)
    elif stub == "in place":
        method = TOY.replace(move=False)
    elif stub == "no sink":
        method = TOY.replace(sink=0, top=5)
    elif stub == "all axes":
        monkeypatch.setattr("winnow.learn.generation.writer.IN_TIME", ROTARY)
    else:
        monkeypatch.setattr(module, "closing", lambda slots, frame: slots * 0 + 1)
    with pytest.raises(AssertionError):
        check_stream(method)


@pytest.mark.system("deep-forcing", "exact")
def test_what_is_held_follows_without_a_gap_and_places_in_a_frame_stay():
    """Keys whose phase says when and where they are: after any time it is that of frames one after the other."""
    for move in (True, False):
        method = TOY.replace(move=move)
        cache = FrameCache(method.steps(ModelInfo()))
        ones = torch.zeros(1, 1, FRAME, 16)
        ones[..., ::2] = 1
        for number in range(FRAMES):
            at = torch.full((1, 1, FRAME), number)
            cache.add(IN_TIME.turn(ones, at), ones)
            cache.settle(IN_TIME.turn(ones, at))
        keys = cache.held[0]
        n = keys.shape[2]
        wanted = IN_TIME.turn(
            torch.zeros(1, 1, n, 16).index_fill(3, torch.arange(0, 16, 2), 1.0),
            (FRAMES - 1 - (n - 1 - torch.arange(n)) // FRAME)[None, None],
        )
        assert torch.allclose(keys, wanted, atol=1e-4) == move
        assert torch.equal(keys[..., 2 * TIME :], ones[:, :, :1, 2 * TIME :].expand(-1, -1, n, -1))


def view(n, **known):
    g = torch.Generator().manual_seed(n)
    keys, values, queries = (torch.randn(2, h, n, 16, generator=g) for h in (2, 2, 4))
    return KVView.of(keys, values, queries, rotary=Rotary(torch.tensor([1.0, 0.1])), **known)


def test_what_fits_the_window_is_left_alone_and_what_does_not_moves_once():
    method = DeepForcing(sink=4, recent=3, window=12, top=3)
    whole, state = method.evict(view(12), State())
    assert isinstance(whole, Observe)
    assert isinstance(method.close(view(12), state)[0], Observe)
    action, state = method.evict(view(13), State())
    assert isinstance(action, KVReduce)
    assert action.k.m == 10
    left = view(10, slots=action.k.index, seen=13)
    moved, state = method.close(
        left, state if not state.token else State({k: x[:, :, :10] for k, x in state.token.items()})
    )
    assert isinstance(moved, Repose)
    now = action.k.index + moved.positions
    assert torch.equal(now, torch.arange(3, 13).expand(2, 2, -1))


def test_attention_of_the_newest_frames_and_what_is_newest_choose_as_they_say():
    own = view(40)
    method = DeepForcing(sink=4, recent=5, window=30, top=12)
    keys = own.keys.repeat_interleave(2, 1)
    logits = (own.queries[:, :, -5:] @ keys.mT / 4).masked_fill(torch.ones(5, 40).triu(36).bool(), -torch.inf)
    seen = logits.softmax(-1).sum(2).unflatten(1, (2, 2)).mean(2)[..., 4:35]
    wanted = seen.topk(12).indices.sort().values + 4
    assert torch.equal(method.replace(by="attention").shorten(own).k.index[..., 4:16], wanted)
    assert method.replace(by="newest").shorten(own).k.index.tolist() == [[[*range(4), *range(23, 40)]] * 2] * 2


@pytest.mark.parametrize(
    "settings",
    [{"window": 20}, {"recent": 0}, {"frame": 0}, {"sink": -1}, {"by": "norm"}, {"top": 8}, {"move": 2}],
)
def test_wrong_settings(settings):
    with pytest.raises(WinnowError):
        DeepForcing(**settings)


def test_a_budget_is_a_window_of_the_same_shares():
    made = DeepForcing().at_budget(210, 1000)
    assert (made.sink, made.recent, made.top, made.window) == (100, 40, 70, 210)
    made = DeepForcing().at_budget("1%", 300)
    assert (made.sink, made.recent, made.top, made.window) == (1, 1, 1, 3)
    assert DeepForcing().at_budget(KVBudget(1), 9).window == 1


def test_positions_that_do_not_count_tokens_are_refused_unless_nothing_moves():
    info = ModelInfo(mrope=True, depth=2)
    with pytest.raises(UnsupportedError, match="move=false"):
        DeepForcing().steps(info)
    assert len(DeepForcing(move=False).steps(info)) == 2
    assert len(DeepForcing().steps(ModelInfo(depth=2))) == 4


STEPS = torch.randint(2, 120, (3, 12), generator=torch.Generator().manual_seed(5))
PLAN = "deep-forcing:sink=4,recent=3,window=13,top=4"


@contextlib.contextmanager
def by_hand(model, method, lengths):
    """The model with its full cache, of which each head reads what its lane holds, turned as that says."""
    frequencies = model.model.rotary_emb.inv_freq
    lanes, queries = {}, {}

    def attention(layer, query, key, value, mask, scaling=None, **kwargs):
        n, new = key.shape[2], query.shape[2]
        h, g = query.shape[1], key.shape[1]
        if new == n:
            lanes[layer.layer_idx] = [[Lane(method, frequencies, False) for _ in range(g)] for _ in lengths]
            queries[layer.layer_idx] = query
        else:
            queries[layer.layer_idx] = torch.cat([queries[layer.layer_idx], query], 2)
        out = torch.zeros_like(query)
        for row, own in enumerate(lanes[layer.layer_idx]):
            start = LENGTHS_LONGEST - lengths[row]
            for head, lane in enumerate(own):
                lane.add(list(range(start, n)) if new == n else [n - 1])
                heads = slice(head * h // g, (head + 1) * h // g)
                keys = lane.read(key[row, head])
                logits = query[row, heads].double() @ keys.T * scaling
                if new == n:
                    logits[:, :start] = 0
                    ahead = torch.tensor(lane.held) > torch.arange(n)[:, None]
                    logits = logits.masked_fill(ahead & (torch.arange(n) >= start)[:, None], -torch.inf)
                read = logits.softmax(-1) @ value[row, head, lane.held].double()
                out[row, heads] = read.to(out.dtype)
                lane.settle(queries[layer.layer_idx][row, heads], key[row, head])
        return out.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("forced", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("forced", eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("forced")
    try:
        yield lanes
    finally:
        model.set_attn_implementation(before)


LENGTHS_LONGEST = max(LENGTHS)


@pytest.mark.parametrize("build", ["llama", "qwen3"])
@pytest.mark.system("deep-forcing", "model")
def test_decoding_under_the_policy_is_the_run_by_hand(build):
    """A left-padded batch: samples reach the window one after the other."""
    model, inputs = kvhand.text_model(build), kvhand.prompt(LENGTHS)
    method = winnow.Plan.of(PLAN).methods[0]
    with winnow.compress(model, PLAN):
        got = kvhand.written(model, inputs, STEPS)
    with by_hand(model, method, LENGTHS) as lanes:
        wanted = kvhand.written(model, inputs, STEPS)
    for step, (a, b) in enumerate(zip(got.logits, wanted.logits, strict=True)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=lambda m, step=step: f"step {step}: {m}")
    held = got.past_key_values.layers[1].store
    for row in range(3):
        real = held.length - (0 if held.real is None else int((~held.real[row]).sum()))
        assert real == len(lanes[1][row][0].held) <= 13
    plain = kvhand.written(model, inputs, STEPS)
    with winnow.compress(model, PLAN + ",move=false"):
        unmoved = kvhand.written(model, inputs, STEPS)
    for other in (plain, unmoved):
        assert (got.logits[-1] - other.logits[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("build", ["llama", "qwen3"])
def test_a_batch_decodes_as_its_samples(build):
    kvdecode.case(build).check_batch(PLAN, STEPS, atol=1e-4)
