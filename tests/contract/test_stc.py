"""STC (arXiv 2512.00891): a stream whose encoder reuses a reference frame, and whose history says what is new."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from winnow.core.layout import Layout
from winnow.core.method import Method
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.signal import Signal
from winnow.core.step import Action, Observe, Reduce, Route, State, Step
from winnow.core.view import View

from .flow import Trace
from .interpreter import Interpreter
from .layouts import clip_tower
from .sight import Sight, provides
from .toy import Picture, ToyVLM, randn

PARTS = ("k", "v", "attention", "mlp")


@dataclass(frozen=True)
class BlockPart(Signal):
    """Keys or values (heads joined), or the output of attention or of the MLP, of one vision block: `[b, N, D]`.

    Keys of a block that has not run are probed.
    """

    block: int
    part: str


@provides(BlockPart)
def _(signal: BlockPart, sight: Sight) -> Tensor:
    def read(trace: Trace) -> Tensor:
        value = getattr(trace, signal.part)
        return value.transpose(0, 1).flatten(1) if signal.part in ("k", "v") else value

    return sight.tower(signal.block, read)


@dataclass(frozen=True)
class STC(Method):
    """Between reference chunks recompute the tokens whose keys changed most; then keep what is new in each frame."""

    ratio: float = 0.25
    interval: int = 2
    keep: int | None = 6

    streaming = True

    def steps(self, info):
        def parts(i: int) -> tuple[Signal, ...]:
            return tuple(BlockPart(i, part) for part in PARTS) if i >= 0 else ()

        blocks = [
            Step(Point("blocks", i), partial(self.encode, i, False), (*parts(i - 1), BlockPart(i, "k")))
            for i in range(info.vision_depth)
        ]
        last = Step(Point.of("features"), partial(self.encode, info.vision_depth, True), parts(info.vision_depth - 1))
        prune = [] if self.keep is None else [Step(Point.of("projected"), self.prune)]
        return (*blocks, last, *prune)

    def encode(self, i: int, joined: bool, view: View, state: State) -> tuple[Action, State]:
        """Before block i: remember block i − 1 of a reference chunk, or route block i of another.

        At `blocks` the frames are lanes; at `features` they are joined, one after the other.
        """
        memory = dict(state.request)
        if i == 0:
            memory["chunk"] = memory.get("chunk", -1) + 1
        if memory["chunk"] % self.interval == 0:
            if i > 0:
                frame = view.n // (1 + int(view.layout.tile.max())) if joined else view.n
                last = {part: view[BlockPart(i - 1, part)][-1, -frame:] for part in PARTS}
                memory["reference"] = memory.get("reference", {}) | {i - 1: last}
            return Observe(), replace(state, request=memory)
        if joined:  # nothing is left to route
            return Observe(), replace(state, request=memory)
        reference, keys = memory["reference"][i], view[BlockPart(i, "k")]
        similar = cosine_similarity(keys, reference["k"], dim=-1)
        u = max(1, int(view.n * self.ratio))
        rows = Reduction.select(similar.topk(u, dim=-1, largest=False).indices.sort(-1).values, view.n)
        cached = view.tokens + reference["attention"] + reference["mlp"]
        return Route(rows, cached, (keys, reference["v"].expand_as(keys))), replace(state, request=memory)

    def prune(self, view: View, state: State) -> tuple[Action, State]:
        """Per frame the tokens least like the frame's mean and the history's, over the calmest half of the channels."""
        frames = 1 + int(view.layout.place[:, 1].max())
        x = view.tokens
        calm = x.var(1).argsort(-1)[:, : x.shape[-1] // 2]
        history = [*state.request.get("history", []), x.mean(1)]  # whole width: channels are chosen anew each time
        unit = normalize(x.gather(2, calm[:, None].expand(-1, x.shape[1], -1)), dim=-1).unflatten(1, (frames, -1))
        memory = normalize(torch.stack(history).mean(0).gather(1, calm), dim=-1)[:, None, None]
        score = likeness(unit, unit.mean(2, keepdim=True)) + likeness(unit, memory)
        per_frame = score.topk(self.keep, dim=-1, largest=False).indices.sort(-1).values
        chosen = per_frame + torch.arange(frames)[:, None] * score.shape[-1]
        state = replace(state, request=dict(state.request) | {"history": history})
        return Reduce(Reduction.select(chosen.flatten(1), view.n)), state


def likeness(a: Tensor, b: Tensor) -> Tensor:
    return sum(torch.exp(-((a - b) ** 2).sum(-1) / (2 * alpha)) for alpha in (0.125, 0.25, 0.5, 1, 2))


H, W = 4, 6


def clip(patches: Tensor) -> Picture:
    """`[F, h·w, D]`."""
    return Picture(patches, clip_tower(H, W, len(patches)), Layout.grid(H, W, len(patches)))


def tower(interpreter: Interpreter, patches: Tensor) -> Tensor:
    """Tower output of one chunk `[F, 1 + h·w, D]`, before anything is pruned."""
    ((lane, _),) = interpreter.encode([(0, clip(patches))])
    return torch.stack([flow.x for flow in lane.tiles])


def by_hand(model: ToyVLM, reference: Tensor, frame: Tensor, u: int) -> Tensor:
    """A partial frame after a reference frame, block by block: full attention of u queries over mixed values."""
    r, h = (torch.cat([model.cls[None], x]) for x in (reference, frame))
    for block in model.blocks:
        q, k_ref, v_ref = block.qkv(block.norm1(r), None)
        a_ref = block.join(block.weights(q, k_ref), v_ref)
        m_ref = block.mlp(block.norm2(r + a_ref))
        q, k, v = block.qkv(block.norm1(h), None)
        joined = lambda x: x.transpose(0, 1).flatten(1)  # noqa: E731
        similar = [torch.cosine_similarity(a, b, dim=0).item() for a, b in zip(joined(k), joined(k_ref), strict=True)]
        rows = sorted(range(len(h)), key=lambda j: similar[j])[:u]
        values = v_ref.clone()
        values[:, rows] = v[:, rows]
        a = a_ref.clone()
        a[rows] = block.join(block.weights(q[:, rows], k), values)
        h = h + a
        m = m_ref.clone()
        m[rows] = block.mlp(block.norm2(h[rows]))
        h, r = h + m, r + a_ref + m_ref
    return h


@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.6])
def test_a_partial_frame_equals_the_cacher_by_hand(ratio: float) -> None:
    model, frames = ToyVLM(), randn(4, H * W, 16, seed=1)
    frames[1:] = frames[:1] + 0.3 * frames[1:]
    interpreter = Interpreter(model, STC(ratio, keep=None))
    found = [tower(interpreter, frame[None])[0] for frame in frames]
    u = max(1, int(25 * ratio))
    for t in (0, 2):
        assert torch.equal(found[t], model.encode(frames[t]))
        expected = by_hand(model, frames[t], frames[t + 1], u)
        torch.testing.assert_close(found[t + 1], expected, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(expected, by_hand(model, frames[0], frames[t + 1], u + 3))


def test_chunks_of_several_frames_refer_to_the_last_frame() -> None:
    model, frames = ToyVLM(), randn(5, H * W, 16, seed=1)
    interpreter = Interpreter(model, STC(0.3, keep=None))
    tower(interpreter, frames[:3])
    found = tower(interpreter, frames[3:])
    for x, frame in zip(found, frames[3:], strict=True):
        torch.testing.assert_close(x, by_hand(model, frames[2], frame, 7), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ratio", [0.04, 0.3, 1.0])
def test_equal_frames_are_exact_at_every_ratio(ratio: float) -> None:
    model, frame = ToyVLM(), randn(H * W, 16, seed=2)
    interpreter = Interpreter(model, STC(ratio, keep=None))
    tower(interpreter, frame[None])
    torch.testing.assert_close(tower(interpreter, frame[None])[0], model.encode(frame), rtol=1e-10, atol=1e-10)


def test_ratio_1_is_exact_and_the_error_falls_with_the_ratio() -> None:
    model, ratios = ToyVLM(), (0.1, 0.3, 0.6, 0.9, 1.0)
    error = dict.fromkeys(ratios, 0.0)
    for seed in range(8):
        a, change = randn(2, H * W, 16, seed=seed)
        b = a + change * (torch.arange(H * W) % 3 == 0)[:, None]
        for ratio in ratios:
            interpreter = Interpreter(model, STC(ratio, keep=None))
            tower(interpreter, a[None])
            error[ratio] += (tower(interpreter, b[None])[0] - model.encode(b)).norm().item()
    assert list(error.values()) == sorted(error.values(), reverse=True)
    assert error[1.0] < 1e-10 < error[0.9]


def test_the_update_set_of_the_first_block_is_what_changed() -> None:
    model, frame = ToyVLM(), randn(H * W, 16, seed=3)
    changed = [1 * W + 2, 1 * W + 3, 2 * W + 2, 2 * W + 3]
    other = frame.clone()
    other[changed] += randn(4, 16, seed=4)
    interpreter = Interpreter(model, STC(4 / 25, keep=None))
    tower(interpreter, frame[None])
    tower(interpreter, other[None])
    routes = [action for _, _, action in interpreter.log if isinstance(action, Route)]
    assert len(routes) == model.info.vision_depth
    assert routes[0].rows.index.tolist() == [[1 + i for i in changed]]


def stream(interpreter: Interpreter, *chunks: list[Picture]) -> list[list[list[int]]]:
    """Kept ids by chunk and stream; `chunks[t][s]` is what stream s sends at time t."""
    kept = []
    for pictures in chunks:
        flows = interpreter.prefill(*([picture, randn(2, 16)] for picture in pictures))
        kept.append([flow.lanes[0].ids.tolist() for flow in flows])
    return kept


def test_the_pruner_keeps_k_of_each_frame_and_the_past_never_changes() -> None:
    frames = randn(6, 2, H * W, 16, seed=5)
    full = stream(Interpreter(ToyVLM(), STC()), *([clip(f)] for f in frames))
    assert full[:3] == stream(Interpreter(ToyVLM(), STC()), *([clip(f)] for f in frames[:3]))
    assert all(len([i for i in one if i < H * W]) == 6 and len(one) == 12 for (one,) in full)
    assert full[3:] != stream(Interpreter(ToyVLM(), STC()), *([clip(f)] for f in frames[3:]))  # it does remember


def test_the_pruner_equals_its_scores_by_hand() -> None:
    model, chunks, means = ToyVLM(), randn(4, 2, H * W, 16, seed=12), []
    found = stream(Interpreter(model, STC(interval=1)), *([clip(c)] for c in chunks))
    for (kept,), chunk in zip(found, chunks, strict=True):
        x = torch.stack([model.projector(model.encode(frame)[1:]) for frame in chunk])
        means.append(x.mean((0, 1)))
        calm = sorted(range(16), key=lambda c: x[..., c].var().item())[:8]
        past = sum(means)[calm] / len(means)
        past = past / past.norm()
        expected = []
        for t, frame in enumerate(x[..., calm]):
            unit = frame / frame.norm(dim=-1, keepdim=True)
            scores = []
            for token in unit:
                apart = [((token - representative) ** 2).sum() for representative in (unit.mean(0), past)]
                scores.append(sum(torch.exp(-d / (2 * a)).item() for d in apart for a in (1 / 8, 1 / 4, 1 / 2, 1, 2)))
            expected += [t * H * W + j for j in sorted(sorted(range(H * W), key=lambda j: scores[j])[:6])]
        assert kept == expected


def test_streams_of_one_batch_equal_themselves_alone() -> None:
    a, b = randn(2, 4, 1, H * W, 16, seed=6)
    both = stream(Interpreter(ToyVLM(), STC()), *([clip(x), clip(y)] for x, y in zip(a, b, strict=True)))
    for s, own in enumerate((a, b)):
        alone = stream(Interpreter(ToyVLM(), STC()), *([clip(x)] for x in own))
        assert [kept[s] for kept in both] == [kept[0] for kept in alone]

    class Joined(STC):
        streaming = False  # then the streams share one memory

    mixed = stream(Interpreter(ToyVLM(), Joined()), *([clip(x), clip(y)] for x, y in zip(a, b, strict=True)))
    assert mixed != both


def pruned(method: STC, frame: Tensor, history: list[Tensor]) -> set[int]:
    view = View.of(frame[None], layout=Layout.grid(1, len(frame)))
    action, _ = method.prune(view, State(request={"history": [h[None] for h in history]}))
    return set(action.reduction.index[0].tolist())


def test_odd_tokens_on_a_constant_background_are_kept() -> None:
    frame = randn(16, seed=7).repeat(49, 1)
    odd = [5, 20, 33]
    frame[odd] = randn(3, 16, seed=8)
    assert pruned(STC(keep=3), frame + 0.01 * randn(49, 16, seed=9), []) == set(odd)


def test_what_the_history_has_seen_is_not_kept() -> None:
    """Half of the frame is a scene that the last 20 frames showed, half is new."""
    a, b = randn(2, 16, seed=10)
    frame = torch.stack([a] * 24 + [b] * 24) + 0.1 * randn(48, 16, seed=11)
    assert pruned(STC(keep=12), frame, [a] * 20) <= set(range(24, 48))
    fresh = pruned(STC(keep=24), frame, [])
    assert 4 <= len([i for i in fresh if i < 24]) <= 20
