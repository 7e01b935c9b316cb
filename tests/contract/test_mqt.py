"""MQT (arXiv 2405.19315): a learned resampler whose tokens are no linear map of the old ones (`Emit`, `build`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from winnow.core.errors import WinnowError
from winnow.core.layout import CONTENT, Layout
from winnow.core.method import Method
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.step import Emit, State, Step
from winnow.core.view import View
from winnow.methods.tome import ToMe

from .interpreter import Interpreter
from .layouts import picture
from .sight import Sight, look_up, provides
from .signals import TowerFeatures
from .toy import ToyVLM, randn


@provides(TowerFeatures)
def _(signal: TowerFeatures, sight: Sight) -> Tensor:
    return look_up(*sight.lane.features, sight.tower_rows())


def sincos(side: int, width: int) -> Tensor:
    """2-D table `[side², width]`: half of the width for rows, half for columns."""
    omega = 1 / 100 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * omega
    one = torch.cat([angle.sin(), angle.cos()], -1)
    return torch.cat([one[:, None].expand(-1, side, -1), one[None].expand(side, -1, -1)], -1).flatten(0, 1)


class Resampler(nn.Module):
    """M ordered queries, one cross-attention, one matrix to the LM's width."""

    def __init__(self, side: int, width: int, out: int, heads: int, key_content: bool) -> None:
        super().__init__()
        self.side, self.key_content = side, key_content
        self.queries = nn.Parameter(torch.randn(side * side, width))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width) for _ in range(3))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.out = nn.Linear(width, out, bias=False)
        self.register_buffer("pos", sincos(side, width))

    def key_positions(self, h: int, w: int) -> Tensor:
        """The table at the patches of an h × w grid."""
        table = self.pos.T.reshape(1, -1, self.side, self.side)
        return interpolate(table, size=(h, w), mode="bicubic").flatten(2)[0].T

    def forward(self, x: Tensor, key_pos: Tensor, m: int) -> tuple[Tensor, Tensor]:
        """`[b, N, C]` and `[b, N, C]` to m tokens and the attention `[b, heads, m, N]`."""
        q = self.norm_q(self.queries[:m] + self.pos[:m]).expand(len(x), -1, -1)
        k = self.norm_k(x + key_pos if self.key_content else key_pos)
        found, weights = self.attention(q, k, self.norm_v(x), average_attn_weights=False)
        return self.out(found), weights


@dataclass(frozen=True)
class MQT(Method):
    """The first m of M learned queries read the picture."""

    m: int = 6
    side: int = 4
    key_content: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.m <= self.side**2:
            raise WinnowError(f"m={self.m}; allowed: 1 … {self.side**2} queries.")

    def build(self, info) -> Resampler:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Resampler(self.side, info.vision_width, info.width, 2, self.key_content)

    def steps(self, info):
        return (Step(Point.of("projected"), self.encode, (TowerFeatures(),)),)

    def encode(self, view: View, state: State) -> tuple[Emit, State]:
        place = view.layout.place[view.layout.content]
        table = view.module.key_positions(place[:, 2].max() + 1, place[:, 3].max() + 1)
        tokens, _ = view.module(view[TowerFeatures()], table[view.ids], self.m)
        return Emit(tokens, layout=latents(self.m)), state


def latents(m: int) -> Layout:
    """m content tokens, each of which looks at the whole picture."""
    none = np.full(m, -1)
    whole = np.tile([0.0, 0.0, 1.0, 1.0], (m, 1))
    rows = {
        "kind": np.full(m, CONTENT),
        "tile": none,
        "cell": none.copy(),
        "place": np.full((m, 4), -1),
        "boxes": whole,
    }
    return Layout.of(("latents", m), [rows])


@dataclass(frozen=True)
class FirstHalf(Method):
    """Before LM layer 2, keep the first half of the tokens."""

    def steps(self, info):
        half = lambda view, state: Reduction.select(torch.arange(view.n // 2).expand(view.b, -1), view.n)  # noqa: E731
        return (Step(Point("layers", 2), half),)


TEXT, ITEM, QUESTION = randn(3, 16, seed=1), picture(6, 5, newline=True, seed=2), randn(4, 16, seed=3)


def emitted(method: Method, item=ITEM) -> Tensor:
    (flow,) = Interpreter(ToyVLM(), method).prefill([TEXT, item, QUESTION])
    return flow.hidden[0][3:-4]


def test_equals_the_resampler_and_the_plain_layers_by_hand() -> None:
    model, method = ToyVLM(), MQT()
    interpreter = Interpreter(model, method)
    flows = interpreter.prefill([TEXT, ITEM, QUESTION], [QUESTION], [ITEM, TEXT, picture(4, 4), QUESTION])
    module = interpreter.modules[0]
    tokens, _ = module(model.encode(ITEM.patches[0])[None, 1:], module.key_positions(6, 5)[None], 6)
    x = torch.cat([TEXT, tokens[0], QUESTION])
    for layer in model.layers:
        x = layer(x, torch.arange(13))  # contiguous positions; the newlines have gone with the grid
    torch.testing.assert_close(flows[0].x, x, rtol=1e-10, atol=1e-10)
    assert [len(flow.x) for flow in flows] == [13, 4, 6 + 3 + 6 + 4]


@pytest.mark.parametrize("m", [1, 2, 7, 15])
@pytest.mark.parametrize("key_content", [True, False])
def test_fewer_tokens_are_a_prefix_of_more(m: int, key_content: bool) -> None:
    full = emitted(MQT(16, key_content=key_content))
    assert full.shape == (16, 16)
    torch.testing.assert_close(emitted(MQT(m, key_content=key_content)), full[:m], rtol=1e-12, atol=1e-12)


def test_the_prefix_test_fails_where_queries_see_each_other() -> None:
    class Mixed(Resampler):
        def forward(self, x, key_pos, m):
            tokens, weights = super().forward(x, key_pos, m)
            return tokens + tokens.mean(1, keepdim=True), weights

    @dataclass(frozen=True)
    class Stub(MQT):
        def build(self, info):
            module = super().build(info)
            module.__class__ = Mixed
            return module

    assert not torch.allclose(emitted(Stub(7)), emitted(Stub(16))[:7], rtol=1e-3)


def test_m_outside_its_range_is_refused() -> None:
    for m in (0, 17, -1):
        with pytest.raises(WinnowError, match="allowed: 1 … 16"):
            MQT(m)


def test_without_key_content_attention_does_not_see_the_picture() -> None:
    a, b = randn(1, 30, 16, seed=4), randn(1, 30, 16, seed=5)
    for key_content in (False, True):
        module = MQT(key_content=key_content).build(ToyVLM().info).double()
        pos = module.key_positions(6, 5)[None]
        same = torch.equal(module(a, pos, 6)[1], module(b, pos, 6)[1])
        assert same is not key_content
        assert not torch.allclose(module(a, pos, 6)[0], module(b, pos, 6)[0])


def test_one_module_serves_two_models_and_settings_stay_plain() -> None:
    """Parameters belong to the attachment, not to the frozen settings, which compare and hash by value."""
    first, second = Interpreter(ToyVLM(), MQT()), Interpreter(ToyVLM(seed=1), MQT())
    assert first.modules[0] is not second.modules[0]
    assert first.plan.methods == second.plan.methods
    assert hash(MQT()) == hash(MQT(6))


def test_reads_what_the_encoder_merged_and_feeds_what_the_decoder_cuts() -> None:
    """ToMe before it shortens what it reads, in place of the right patches; a cut in the decoder follows."""
    model = ToyVLM(depth=8)
    interpreter = Interpreter(model, ToMe(2), MQT(8), FirstHalf())
    (flow,) = interpreter.prefill([TEXT, ITEM, QUESTION])
    assert [trace.u1.shape[0] - 7 for trace in flow.traces.values()] == [8, 8, 4, 4, 4, 4, 4, 4]
    lane = flow.lanes[0]
    tile = lane.tiles[0]
    patches = (tile.lanes[0].ids != 0).nonzero()[:, 0]
    order = patches[tile.lanes[0].ids[patches].argsort()]  # the LM's order
    module = interpreter.modules[1]
    table = module.key_positions(6, 5)[tile.lanes[0].ids[order] - 1]
    expected, _ = module(tile.x[order][None], table[None], 8)
    torch.testing.assert_close(flow.hidden[0][3:11], expected[0], rtol=1e-10, atol=1e-10)
