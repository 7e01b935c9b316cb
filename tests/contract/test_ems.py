"""EMS (arXiv 2412.08521): per head evict, then merge into what is kept, in the cache, in prefill and while decoding."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize

from winnow.core.method import Method
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.signal import Signal
from winnow.core.step import Action, KVReduce, Observe, State, Step
from winnow.core.view import View

from .interpreter import Interpreter
from .layouts import picture
from .sight import Sight, provides
from .toy import ToyVLM, causal, randn


@dataclass(frozen=True)
class CacheKeys(Signal):
    """Keys of a layer's cache, `[b, H, N, d]`."""

    layer: int


@dataclass(frozen=True)
class Received(Signal):
    """Attention that each cached token received from rows of this chunk, `[b, H, N]`: a mean over the rows that see it.

    Args:
        rows: the last so many rows, or all of the chunk.
    """

    layer: int
    rows: int | None = None


@provides(CacheKeys)
def _(signal: CacheKeys, sight: Sight) -> Tensor:
    return sight.cache.k


@provides(Received)
def _(signal: Received, sight: Sight) -> Tensor:
    weights = sight.cache.received
    weights = weights if signal.rows is None else weights[:, -signal.rows :]
    rows, n = weights.shape[1:]
    return weights.sum(1) / torch.arange(n, 0, -1).clamp_max(rows)


@dataclass(frozen=True)
class EMS(Method):
    """Keep the tokens that matter to all rows or to the last ones; merge into them what is similar, drop the rest."""

    budget: int = 16
    window: int = 4
    kernel: int = 3
    candidates: int = 4
    mass: float = 0.95
    tau: float = 0.6
    score: str = "both"
    merge_keys: bool = False
    log_mass: bool = False

    def steps(self, info):
        return tuple(
            Step(Point("kv", k), partial(self.act, k), (CacheKeys(k), Received(k), Received(k, self.window)))
            for k in range(info.depth)
        )

    def act(self, k: int, view: View, state: State) -> tuple[Action, State]:
        keys = view[CacheKeys(k)]
        if first := "score" not in state.summed:
            score = self.importance(view[Received(k)], view[Received(k, self.window)])
            state = replace(state, summed={"score": score, "size": torch.ones_like(score)})
        else:
            size = state.summed["size"].clamp_min(1)  # new tokens came with zeros
            state = replace(state, summed={"score": state.summed["score"] + view[Received(k)], "size": size})
        if view.n <= self.budget + (0 if first else self.window):
            return Observe(), state
        cluster, representative = self.classes(keys, state.summed["score"])
        return self.merge(cluster, representative, state), state

    def importance(self, everywhere: Tensor, local: Tensor) -> Tensor:
        """`[b, H, N]`: the larger of the two after their sums are made equal, pooled along positions."""
        everywhere = everywhere * local.sum(-1, keepdim=True) / everywhere.sum(-1, keepdim=True)
        score = {"both": torch.maximum(everywhere, local), "global": everywhere, "local": local}[self.score]
        return max_pool1d(score, self.kernel, stride=1, padding=self.kernel // 2)

    def classes(self, keys: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """For each token the output that it joins (−1: none) `[b, H, N]`; the centres and the window `[b, H, T]`."""
        n, c = keys.shape[2], self.budget - self.window
        old = score[..., : n - self.window]
        order = old.argsort(dim=-1, descending=True, stable=True)  # pooling makes ties: the first of equals
        centre = order[..., :c].sort(-1).values
        share = old.gather(-1, order).cumsum(-1) / old.sum(-1, keepdim=True)
        rank = torch.arange(old.shape[-1])
        reached = torch.cat([torch.zeros_like(share[..., :1]), share[..., :-1]], -1) >= self.mass
        candidate = (rank >= c) & (rank < c + self.candidates * self.budget) & ~reached
        unit = normalize(keys, dim=-1)
        centres = unit.gather(2, centre[..., None].expand(-1, -1, -1, keys.shape[-1]))
        near = unit[:, :, : n - self.window] @ centres.transpose(2, 3)
        near = torch.cat([near, torch.full_like(near[..., :1], self.tau)], -1).argmax(-1)  # class c: the zero class
        joins = torch.zeros_like(candidate).scatter(-1, order, candidate) & (near < c)
        cluster = torch.full(keys.shape[:3], -1)
        cluster[..., : n - self.window] = torch.where(joins, near, -1)
        representative = torch.cat([centre, torch.arange(n - self.window, n).expand(*centre.shape[:2], -1)], -1)
        return cluster.scatter(-1, representative, torch.arange(self.budget).expand_as(representative)), representative

    def merge(self, cluster: Tensor, representative: Tensor, state: State) -> KVReduce:
        live, to = cluster >= 0, cluster.clamp_min(0)
        sums = {
            name: x.new_zeros(representative.shape).scatter_add(-1, to, x * live) for name, x in state.summed.items()
        }
        weight = state.summed["score"] / sums["score"].gather(-1, to)
        merged = Reduction.assign(cluster, weight, m=self.budget, representative=representative)
        keys = merged if self.merge_keys else Reduction.select(representative, cluster.shape[-1])
        return KVReduce(keys, merged, sums["size"].log() if self.log_mass else None)


def by_hand(method: EMS, weights: Tensor, keys: Tensor, values: Tensor):
    """One head of a prefill, in loops: entries {k, v, score, size}. `weights` `[n, n]`."""
    n, w = len(keys), method.window
    local = [sum(weights[i, j] for i in range(max(j, n - w), n)) / min(w, n - j) for j in range(n)]
    everywhere = [sum(weights[i, j] for i in range(j, n)) / (n - j) for j in range(n)]
    scale = sum(local) / sum(everywhere)
    raw = [max(a * scale, b) for a, b in zip(everywhere, local, strict=True)]
    half = method.kernel // 2
    score = [max(raw[max(0, j - half) : j + half + 1]) for j in range(n)]
    return [{"k": keys[j], "v": values[j], "score": score[j], "size": 1.0} for j in range(n)]


def by_hand_compress(method: EMS, entries: list[dict]) -> list[dict]:
    old, c = entries[: -method.window], method.budget - method.window
    order = sorted(range(len(old)), key=lambda j: -old[j]["score"].item())
    total, run, members = sum(e["score"] for e in old), 0.0, {j: [j] for j in sorted(order[:c])}
    for rank, j in enumerate(order):
        if c <= rank < c + method.candidates * method.budget and run / total < method.mass:
            cosine = {i: torch.cosine_similarity(old[j]["k"], old[i]["k"], dim=0).item() for i in members}
            best = max(cosine, key=lambda i: cosine[i])
            if cosine[best] >= method.tau:
                members[best].append(j)
        run = run + old[j]["score"]
    new = []
    for centre, joined in members.items():
        score = sum(old[j]["score"] for j in joined)
        value = sum(old[j]["score"] * old[j]["v"] for j in joined) / score
        new.append({"k": old[centre]["k"], "v": value, "score": score, "size": sum(old[j]["size"] for j in joined)})
    return new + entries[-method.window :]


SAMPLE = [randn(4, 16, seed=1), picture(5, 6, seed=2), randn(5, 16, seed=3)]


@pytest.mark.parametrize("log_mass", [False, True])
def test_prefill_and_decoding_equal_a_loop_over_heads(log_mass: bool) -> None:
    """Nine decoded tokens overflow the cache twice; a merged centre carries the summed score."""
    model, method = ToyVLM(depth=2), EMS(tau=0.3, log_mass=log_mass)
    interpreter = Interpreter(model, method)
    (flow,) = interpreter.prefill(SAMPLE)
    x = torch.cat([SAMPLE[0], model.projector(model.encode(SAMPLE[1].patches[0])[1:]), SAMPLE[2]])
    n, caches = len(x), []
    for layer in model.layers:
        q, k, v = layer.qkv(layer.norm1(x), torch.arange(n))
        weights = layer.weights(q, k, causal(n, n, x.dtype))
        caches.append([by_hand_compress(method, by_hand(method, weights[h], k[h], v[h])) for h in range(2)])
        x = layer(x, torch.arange(n))
    assert max(e["size"] for cache in caches for head in cache for e in head) > 1  # something was merged
    merges, lengths = 0, []
    for t in range(9):
        found = interpreter.decode(flow, token := randn(1, 16, seed=10 + t), n + t)
        for layer, cache in zip(model.layers, caches, strict=True):
            q, k, v = layer.qkv(layer.norm1(token), torch.tensor([n + t]))
            out = []
            for h, head in enumerate(cache):
                head.append({"k": k[h, 0], "v": v[h, 0], "score": 0.0, "size": 1.0})
                logits = torch.stack([q[h, 0] @ e["k"] / math.sqrt(8) for e in head])
                if log_mass:
                    logits = logits + torch.tensor([math.log(e["size"]) for e in head], dtype=logits.dtype)
                weights = logits.softmax(0)
                for e, weight in zip(head, weights, strict=True):
                    e["score"] = e["score"] + weight
                out.append(weights @ torch.stack([e["v"] for e in head]))
                if len(head) > method.budget + method.window:
                    head[:] = by_hand_compress(method, head)
                    merges += 1
            token = token + layer.o(torch.cat(out))[None]
            token = token + layer.mlp(layer.norm2(token))
        torch.testing.assert_close(found, token, rtol=1e-9, atol=1e-9)
        lengths.append(flow.caches[0].k.shape[1])
    assert merges == 4  # two layers, two heads, once each
    assert lengths == [17, 18, 19, 20, 16, 17, 18, 19, 20]


def view_of(keys: Tensor, everywhere: Tensor, local: Tensor, method: EMS) -> View:
    signals = {CacheKeys(0): keys, Received(0): everywhere, Received(0, method.window): local}
    return View.of(keys.transpose(1, 2).flatten(2), signals)


def test_max_of_global_and_local_keeps_both_needles_and_each_alone_loses_one() -> None:
    n, w, early, late = 200, 4, 20, 120
    rows = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        hot, others = (late, range(60, 66)) if i >= n - w else (early, range(30, 36))
        for j in [j for j in (hot, *others) if j <= i]:
            rows[i, j] = 0.5 if j == hot else 0.08
        rows[i, : i + 1] += (1 - rows[i].sum()) / (i + 1)
    seen = torch.arange(n, 0, -1)
    everywhere, local = rows.sum(0) / seen, rows[-w:].sum(0) / seen.clamp_max(w)
    kept = {}
    for score in ("both", "global", "local"):
        method = EMS(budget=10, window=w, kernel=1, score=score)
        view = view_of(randn(1, 1, n, 8), everywhere[None, None], local[None, None], method)
        action, _ = method.act(0, view, State())
        kept[score] = {early, late} & set(action.k.representatives.flatten().tolist())
    assert kept == {"both": {early, late}, "global": {early}, "local": {late}}


def planted(method: EMS, seed: int) -> tuple[View, Tensor, Tensor]:
    """Four heads of 64 tokens: 12 things, each seen about five times with a little noise."""
    of = torch.arange(64) % 12
    keys = randn(1, 4, 12, 8, seed=seed)[:, :, of] * 2 + 0.05 * randn(1, 4, 64, 8, seed=seed + 1)
    values = randn(1, 4, 12, 8, seed=seed + 2)[:, :, of] + randn(1, 4, 64, 8, seed=seed + 3)
    score = randn(1, 4, 64, seed=seed + 4).abs() + 0.1
    return view_of(keys, score, score, method), keys, values


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = q @ k.transpose(-1, -2) / 8**0.5
    return (logits if bias is None else logits + bias[..., None, :]).softmax(-1) @ v


def test_merged_values_come_closer_than_pure_eviction_at_the_same_budget() -> None:
    worse, error = 0, {0.6: 0.0, 2.0: 0.0}
    for seed in range(20):
        one = {}
        for tau in error:
            method = EMS(budget=24, tau=tau, kernel=1)
            view, keys, values = planted(method, 10 * seed)
            action, _ = method.act(0, view, State())
            q = randn(1, 4, 50, 8, seed=10 * seed + 7)
            kept = attend(q, action.k.apply(keys), action.v.apply(values))
            one[tau] = (kept - attend(q, keys, values)).norm().item()
            error[tau] += one[tau]
        worse += one[0.6] > one[2.0]
    assert error[0.6] < 0.9 * error[2.0]
    assert worse <= 2


def test_tau_above_1_is_pure_eviction_bit_for_bit() -> None:
    method = EMS(budget=24, tau=1.01, merge_keys=True)
    view, keys, values = planted(method, 0)
    action, state = method.act(0, view, State())
    order = state.summed["score"][..., :60].argsort(dim=-1, descending=True, stable=True)
    centre = order[..., :20].sort(-1).values
    kept = torch.cat([centre, torch.arange(60, 64).expand(1, 4, -1)], -1)[..., None].expand(-1, -1, -1, 8)
    assert torch.equal(action.v.apply(values), values.gather(2, kept))
    assert torch.equal(action.k.apply(keys), keys.gather(2, kept))
    merging, _ = replace(method, tau=0.6).act(0, view, State())
    assert not torch.allclose(merging.v.apply(values), values.gather(2, kept))


def test_a_budget_of_all_tokens_is_the_plain_model_bit_for_bit() -> None:
    model = ToyVLM()
    outputs = []
    for methods in ((EMS(budget=60),), (EMS(budget=39),), (EMS(budget=38),)):
        interpreter = Interpreter(model, *methods)
        (flow,) = interpreter.prefill(SAMPLE)
        outputs.append(interpreter.decode(flow, randn(1, 16, seed=4), 39))
    x = torch.cat([SAMPLE[0], model.projector(model.encode(SAMPLE[1].patches[0])[1:]), SAMPLE[2], randn(1, 16, seed=4)])
    for layer in model.layers:
        x = layer(x, torch.arange(40))
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], x[-1:], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(outputs[0], outputs[2])


def test_every_token_is_a_centre_a_member_or_dropped() -> None:
    method = EMS(budget=24, kernel=1)
    view, _, _ = planted(method, 50)
    action, _ = method.act(0, view, State())
    feeds = action.v.to_matrix() != 0
    outside = 60 - (feeds.sum((-1, -2)) - 4)
    assert bool((feeds.sum(-2) <= 1).all())
    assert bool((outside > 0).any())
    assert len(set(outside.flatten().tolist())) > 1  # every head merges another number
    assert action.v.is_stochastic
    assert torch.equal(action.v.representatives, action.k.representatives)


def test_duplicates_with_a_log_mass_bias_give_the_full_attention() -> None:
    """48 tokens that are copies of 12, whose scores are equal, become 12 and say how many they are."""
    of = torch.cat([torch.arange(12), torch.arange(48) % 12])
    keys, values = randn(1, 2, 12, 8, seed=1)[:, :, of], randn(1, 2, 12, 8, seed=2)[:, :, of]
    score = torch.cat([torch.full((12,), 2.0), torch.ones(48)]).double().expand(1, 2, 60)
    method = EMS(budget=16, window=4, kernel=1, tau=0.999, mass=1.0, log_mass=True)
    view = view_of(keys, score, score, method)
    action, _ = method.act(0, view, State())
    q = randn(1, 2, 9, 8, seed=3)
    k, v = action.k.apply(keys), action.v.apply(values)
    torch.testing.assert_close(attend(q, k, v, action.log_bias), attend(q, keys, values))
    assert not torch.allclose(attend(q, k, v), attend(q, keys, values))
