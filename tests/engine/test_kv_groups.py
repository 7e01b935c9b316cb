"""Slots with a weight of their own, heads that hold unequal numbers, and what methods remember of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import winnow
from tests import kvhand
from winnow.cache import varlen
from winnow.cache.groups import Group
from winnow.cache.memory import Memory
from winnow.cache.ragged import Ragged
from winnow.cache.run import reduced
from winnow.contract import CacheMethod, KVBudget, KVReduce, KVView, Observe, Reduction, State, best_slots, register

STEPS = torch.randint(2, 120, (3, 8), generator=torch.Generator().manual_seed(5))
SINKS, LAST = 1, 3


class Seen:
    """What a step was shown while tokens were decoded."""

    views: list[KVView] = []  # noqa: RUF012


@register("one-for-the-rest", stages=("cache",))
class OneForTheRest(CacheMethod):
    """The first slot, the mean of the rest with its weight, and the last three; in `full` heads all slots."""

    decodes = True

    keep: KVBudget = KVBudget("20%")
    full: int = 0

    def evict(self, view: KVView, state: State) -> Any:
        if view.moment == "decode":
            Seen.views.append(view)
            return Observe(), state
        cluster = torch.arange(view.n).expand(view.b, view.heads, -1).clone()
        count = view.n - SINKS - LAST
        cluster[:, self.full :, SINKS:] = (cluster[:, self.full :, SINKS:] - count + 1).clamp_min(SINKS)
        weight = torch.ones_like(cluster, dtype=torch.float32)
        weight[:, self.full :, SINKS : SINKS + count] /= count
        m = view.n if self.full else SINKS + 1 + LAST
        rep = torch.arange(m).expand(view.b, view.heads, -1).clone()
        rep[:, self.full :, SINKS:] = (rep[:, self.full :, SINKS:] + count - 1).clamp_max(view.n - 1)
        bias = torch.zeros(view.b, view.heads, m)
        bias[:, self.full :, SINKS] = torch.tensor(float(count)).log()
        counts = None
        if self.full:
            counts = ((view.n,) * self.full + (SINKS + 1 + LAST,) * (view.heads - self.full)) * view.b
        index = torch.arange(view.n).expand_as(cluster)
        one = Reduction(view.n, m, index, cluster, weight, counts=counts, representative=rep)
        return KVReduce(one, one, bias), State({"from": torch.full((view.b, view.heads, view.n), 7.0)})


def one_for_the_rest(lengths: tuple[int, ...], full: int, prompt: int) -> kvhand.Held:
    """The same from the full cache: hidden slots, and one more slot with the mean and the log of their number."""

    def held(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, g, n, _ = keys.shape
        means = [x[:, :, :1].clone() for x in (keys, values)]
        added = torch.zeros(b, g, n + 1)
        for row, length in enumerate(lengths):
            start, stop = prompt - length + SINKS, prompt - LAST
            added[row, :, : prompt - length] = -torch.inf
            added[row, :full, -1] = -torch.inf
            added[row, full:, start:stop] = -torch.inf
            added[row, full:, -1] = torch.tensor(float(stop - start)).log()
            for mean, x in zip(means, (keys, values), strict=True):
                mean[row, full:, 0] = x[row, full:, start:stop].mean(1)
        return torch.cat([keys, means[0]], 2), torch.cat([values, means[1]], 2), added

    return held


@pytest.mark.parametrize("lengths", [(21, 21, 21), (19, 26, 11)])
@pytest.mark.parametrize("full", [0, 1], ids=["dense", "ragged"])
def test_a_slot_with_a_weight_is_one_more_slot_of_the_softmax(full: int, lengths: tuple[int, ...]) -> None:
    model, inputs = kvhand.text_model("llama"), kvhand.prompt(lengths)
    Seen.views.clear()
    with winnow.compress(model, f"one-for-the-rest:full={full}"):
        got = kvhand.written(model, inputs, STEPS)
    with kvhand.holding(model, one_for_the_rest(lengths, full, max(lengths))):
        wanted = kvhand.written(model, inputs, STEPS)
    plain = kvhand.written(model, inputs, STEPS)
    for a, b in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert (got.logits[-1] - plain.logits[-1]).abs().max() > 1e-3
    for view in Seen.views:  # a later step sees the weight, and which heads it has
        if view.own_heads in (None, (1,)):
            logits = view.queries @ view.keys.repeat_interleave(view.group, 1).transpose(2, 3) * view.scaling
            logits = logits + view.bias.repeat_interleave(view.group, 1)[:, :, None]
            torch.testing.assert_close(view.attention(), logits.softmax(-1))
        else:
            assert view.own_heads == (0,)
    assert {view.own_heads for view in Seen.views} == ({(0,), (1,)} if full else {None})


@pytest.mark.parametrize("q", [1, 3])
def test_ragged_heads_in_one_call_give_what_each_gives_alone(q: int) -> None:
    """What runs on a GPU, weights of slots included."""
    generator = torch.Generator().manual_seed(0)
    lanes = [
        (*(torch.randn(n, 8, generator=generator) for _ in range(2)), torch.arange(n, dtype=torch.int32), torch.rand(n))
        for n in (9, 4, 5, 12)
    ]
    store, query = Ragged.of(lanes, 2, True), torch.randn(2, 4, q, 8, generator=generator)
    torch.testing.assert_close(store._attend_padded(query, None, 0.3), store.attend(query, None, 0.3))
    logits = query[0, 3, -1] @ lanes[1][0].T * 0.3 + lanes[1][3]
    torch.testing.assert_close(store.attend(query, None, 0.3)[0, -1, 3], logits.softmax(-1) @ lanes[1][1])


def _documented(query: Tensor, keys: Tensor, values: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
                scale: float, enable_gqa: bool, seqused_k: Tensor) -> Tensor:  # fmt: skip
    """`torch.nn.attention.varlen.varlen_attn` as its documentation says, for one query to a sequence."""
    assert {x.dtype for x in (cu_q, cu_k, seqused_k)} == {torch.int32}
    assert (max_q, max_k, keys.shape[1], enable_gqa) == (1, int(seqused_k.max()), 1, True)
    assert cu_k[-1] <= keys.shape[0]
    out = []
    for i, (start, used) in enumerate(zip(cu_k[:-1].tolist(), seqused_k.tolist(), strict=True)):
        assert start + used <= int(cu_k[i + 1])
        asked = query[int(cu_q[i]) : int(cu_q[i + 1])]
        own = slice(start, start + used)
        out.append((asked @ keys[own, 0].T * scale).softmax(-1) @ values[own, 0])
    return torch.cat(out)


def test_ragged_heads_in_the_kernel_of_a_gpu_give_what_each_gives_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given to the kernel, before and after tokens were added and lanes were laid out anew; its room is never
    read. The kernel itself runs on GPUs alone: a stand-in does here what its documentation says."""
    monkeypatch.setattr("winnow.cache.varlen.kernel", lambda: _documented)
    generator = torch.Generator().manual_seed(0)
    lanes = [
        (*(torch.randn(n, 8, generator=generator) for _ in range(2)), torch.arange(n, dtype=torch.int32), torch.rand(n))
        for n in (9, 4, 5, 12)
    ]
    store, query = Ragged.of(lanes, 2, False), torch.randn(2, 4, 1, 8, generator=generator)
    room = torch.ones(store.flat_keys.shape[0], dtype=torch.bool)
    for start, n in zip(store._starts, store.lengths, strict=True):
        room[start : start + n] = False
    store.flat_keys[room] = store.flat_values[room] = torch.nan
    for turn in range(20):  # more than there is room for
        torch.testing.assert_close(store._attend_varlen(query, 0.3), store.attend(query, None, 0.3))
        store.append(*torch.randn(2, 2, 2, 1, 8, generator=generator), seen=12 + turn)
    assert store.lengths == [29, 24, 25, 32]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernel runs on GPUs alone")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_of_a_gpu_is_taken_and_is_as_right_as_padding(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    lanes = [
        (*(torch.randn(n, 64, generator=generator).to("cuda", dtype) for _ in range(2)),
         torch.arange(n, dtype=torch.int32).cuda(), torch.zeros(n).cuda())
        for n in (900, 40, 513, 1200)
    ]  # fmt: skip
    store = Ragged.of(lanes, 2, False)
    query = torch.randn(2, 4, 1, 64, generator=generator).to("cuda", dtype)
    if varlen.kernel() is None:
        pytest.skip("this torch has no kernel that passes over room: it came with 2.12")
    assert varlen.able(query, store.flat_values)
    padded = store._attend_padded(query, None, 0.125)
    torch.testing.assert_close(store.attend(query, None, 0.125), padded, rtol=2e-2, atol=2e-3)


def test_merged_slots_are_summed_in_fp32() -> None:
    x = (1 + torch.rand(1, 1, 3000, 8, generator=torch.Generator().manual_seed(0))).bfloat16()
    to, weight = torch.zeros(1, 1, 3000, dtype=torch.int64), torch.full((1, 1, 3000), 1 / 3000)
    mean = Reduction.assign(to, weight, m=1)
    wanted = x.double().mean(2, keepdim=True).bfloat16()
    assert torch.equal(reduced(mean, x), wanted)
    assert not torch.equal(mean.apply(x), wanted)


def _state(heads: int, n: int) -> State:
    head = torch.arange(heads, dtype=torch.float32)[None, :, None] * 100
    x = head + torch.arange(n)
    return State({"a": x}, {"i": torch.ones(1)}, {}, {"s": torch.ones(1, heads, n, 2)})


def test_state_follows_heads_that_part_and_meet_again() -> None:
    memory, whole = Memory(), Group((0,))
    memory.put(0, whole, _state(3, 6))
    index = torch.tensor([[[0, 2, 4, 5], [1, 2, 0, 0], [3, 5, 0, 0]]])
    cut = Reduction.select(index, 6, counts=(4, 2, 2))
    memory.reduce({0}, whole, cut.representatives, cut)
    memory.split(whole, (4, 2, 2), 3, ragged=True)
    first, rest = Group((0,), (0,)), Group((0,), (1, 2))
    assert memory.of(0, first, 4).token["a"].tolist() == [[[0, 2, 4, 5]]]
    assert memory.of(0, rest, 3).token["a"].tolist() == [[[101, 102, 0], [203, 205, 0]]]
    met = memory.of(0, Group((0,), (0, 1)), 4)  # after an eviction head 0 holds as many as head 1
    assert met.token["a"].tolist() == [[[0, 2, 4, 5], [101, 102, 0, 0]]]
    assert met.item["i"].tolist() == [1]
    assert memory.of(0, Group((0,), (2,)), 2).token["a"].tolist() == [[[203, 205]]]
    parted = memory.of(0, first, 4)
    assert parted.token["a"].tolist() == [[[0, 2, 4, 5]]]


def test_sums_go_over_all_that_feeds_an_output() -> None:
    memory, whole = Memory(), Group((0,))
    x = torch.arange(1.0, 7)[None, None, :, None] * torch.tensor([1.0, 10.0])
    memory.put(0, whole, State(summed={"s": x}))
    weight = torch.tensor([[[0.25, 0.75, 1.0, 0.5, 0.0]]])
    one = Reduction.edges(
        torch.tensor([[[0, 1, 2, 3, 4]]]), torch.tensor([[[0, 0, 1, -1, 1]]]), weight, n=6, m=2,
        representative=torch.tensor([[[0, 2]]]),
    )  # fmt: skip
    memory.reduce({0}, whole, one.representatives, one)
    wanted = [[[[3.0, 30.0], [3.0, 30.0]]]]
    assert memory.of(0, whole, 2).summed["s"].tolist() == wanted
    memory = Memory()
    memory.put(0, whole, State(summed={"s": x}))
    mixed = Reduction.mix(one.to_matrix(), representative=one.representatives)
    memory.reduce({0}, whole, mixed.representatives, mixed)
    assert memory.of(0, whole, 2).summed["s"].tolist() == wanted


def test_b5_sinks_and_window_win_over_a_smaller_budget() -> None:
    x = torch.randn(1, 2, 20, 8, generator=torch.Generator().manual_seed(0))
    view = KVView.of(x, x)
    for first, wanted in ((0, [12, 13, 14, 15, 16, 17, 18, 19]), (3, [0, 1, 2, 17, 18, 19])):
        kept = best_slots(torch.rand(1, 2, 20), KVBudget(5), view, first=first, last=8 if not first else 3)
        assert kept is not None
        assert kept.k.index[0].tolist() == [wanted] * 2
