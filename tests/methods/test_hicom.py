"""HICom by its card: blocks are pooled by similarity to the instruction, and queries read everything."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, normalize

from winnow.contract import ClipPatches, ClipText, Emit, Layout, ModelInfo, QuestionTokens, View, WinnowError
from winnow.core.step import State
from winnow.methods.hicom import HICom
from winnow.parts.guided_pooling import Connector
from winnow.parts.learned import untrained
from winnow.parts.sinusoid import sinusoid_naive
from winnow.testing import Picture

from . import connectors
from .stubs import tokens

WIDTH = 32
INFO = ModelInfo(width=WIDTH)
CLIP = Layout.grid(6, 6, 8)  # 2 × 2 × 2 blocks of 4 × 3 × 3


def view_of(x: torch.Tensor, question: torch.Tensor, layout: Layout = CLIP, made=None) -> View:
    view = View.of(x, {QuestionTokens(): question}, layout=layout)
    object.__setattr__(view, "module", made or untrained(lambda: Connector(WIDTH, 32, False), 1))
    return view


def random_view(seed: int = 0, b: int = 1, layout: Layout = CLIP, made=None) -> View:
    return view_of(tokens(seed, layout.n_content, WIDTH, b), tokens(seed + 9, 5, WIDTH, b), layout, made)


def act(view: View, **settings) -> Emit:
    return HICom(weights="untrained", **settings).bind(INFO)[1][0].act(view, State())[0]


def blocks_naive(layout: Layout = CLIP) -> list[list[int]]:
    """The tokens of each block of 4 × 3 × 3, where sides are multiples of them."""
    place = layout.place[layout.content][:, 1:]
    owner = [tuple(int(v) // k for v, k in zip(p, (4, 3, 3), strict=True)) for p in place]
    return [[i for i, own in enumerate(owner) if own == block] for block in sorted(set(owner))]


@pytest.mark.system("hicom", "exact")
def test_without_an_instruction_blocks_are_averaged():
    view = random_view()
    for nothing in (view_of(view.tokens, torch.zeros(1, 5, WIDTH)), random_view(made=keyless())):
        found = act(nothing, queries=0)
        want = torch.stack([view.tokens[0, own].mean(0) for own in blocks_naive()])
        assert (found.tokens[0] - want).abs().max() <= 1e-5


def keyless() -> Connector:
    """Whose keys are all zero."""
    made = untrained(lambda: Connector(WIDTH, 32, False), 1)
    with torch.no_grad():
        made.local.key.gate.fill_(1)
        for parameter in made.local.key.norm.parameters():
            parameter.zero_()
    return made


@pytest.mark.system("hicom", "exact")
def test_blocks_of_one_token_are_the_tokens():
    view = random_view()
    assert torch.equal(act(view, frames=1, side=1, queries=0).tokens, view.tokens)


def pooled_naive(x: torch.Tensor, g: torch.Tensor, scale: float) -> torch.Tensor:
    rows = []
    for own in blocks_naive():
        alike = normalize(x[own], dim=-1) @ normalize(g, dim=-1) * scale if scale else x[own] @ g / WIDTH**0.5
        rows.append((alike.softmax(0)[:, None] * x[own]).sum(0))
    return torch.stack(rows)


def _pools_by_similarity(answer) -> None:
    for seed in range(3):
        view = random_view(seed)
        g = view[QuestionTokens()][0].mean(0)
        for scale in (0.0, 10.0):
            found, weights = answer(view, scale)
            assert (found - pooled_naive(view.tokens[0], g, scale)).abs().max() <= 1e-5
            assert (weights.sum(1) - 1).abs().max() <= 1e-5


def local(view: View, scale: float):
    found = act(view, queries=0, scale=scale)
    return found.tokens[0], found.provenance.matrix[0]


@pytest.mark.system("hicom", "exact")
def test_blocks_are_pooled_by_similarity_to_the_instruction():
    _pools_by_similarity(local)


def averages(view: View, scale: float):
    """A stub: blocks without the instruction."""
    found = act(view_of(view.tokens, torch.zeros(1, 5, WIDTH)), queries=0, scale=scale)
    return found.tokens[0], found.provenance.matrix[0]


def middles(view: View, scale: float):
    """A stub: a token of each block."""
    found = act(view, queries=0, scale=scale).provenance
    return view.tokens[0, found.representative[0]], torch.eye(view.n)[found.representative[0]]


@pytest.mark.parametrize("stub", [averages, middles])
def test_pooling_by_similarity_is_not_what_a_stub_does(stub):
    with pytest.raises(AssertionError):
        _pools_by_similarity(stub)


def planted(seed: int) -> tuple[View, int, torch.Tensor]:
    """A clip in which one token points where the instruction does, its number, and the instruction."""
    generator = torch.Generator().manual_seed(seed)
    x, g = torch.randn(1, CLIP.n_content, WIDTH, generator=generator), torch.randn(1, 1, WIDTH, generator=generator)
    at = int(torch.randint(CLIP.n_content, (1,), generator=generator))
    x[0, at] = g[0, 0] * (1 + torch.rand(1, generator=generator))
    return view_of(x, g), at, g[0, 0]


@pytest.mark.system("hicom", "directional")
def test_the_token_that_matches_fills_its_block():
    """At CLIP's scale, where averaging gives it one part of 36."""
    for seed in range(20):
        view, at, _ = planted(seed)
        share = act(view, queries=0, scale=100.0).provenance.matrix[0, :, at].max()
        assert share > 0.9
        flat = act(view_of(view.tokens, torch.zeros(1, 1, WIDTH)), queries=0, scale=100.0)
        assert abs(float(flat.provenance.matrix[0, :, at].max()) - 1 / 36) <= 1e-6


@pytest.mark.system("hicom", "directional")
def test_what_the_matching_token_says_can_be_read_behind_the_compression():
    """Its length is read off the eight pooled tokens by the token most like the instruction; not off averages."""
    error = {"guided": [], "averaged": []}
    for seed in range(60):
        view, at, g = planted(seed)
        wanted = float(view.tokens[0, at].norm())
        pooled = {
            "guided": act(view, queries=0, scale=100.0).tokens[0],
            "averaged": act(view_of(view.tokens, torch.zeros(1, 1, WIDTH)), queries=0).tokens[0],
        }
        for name, rows in pooled.items():
            error[name].append(abs(float((rows @ normalize(g, dim=0)).max()) - wanted))
    guided, averaged = (torch.tensor(error[name]) for name in ("guided", "averaged"))
    d = averaged - guided
    assert d.mean() - 1.96 * d.std() / len(d) ** 0.5 > 0
    assert guided.mean() < 0.15 * averaged.mean()


@pytest.mark.system("hicom", "exact")
def test_another_instruction_changes_only_blocks_where_it_tells_tokens_apart():
    view = random_view()
    flat, x = blocks_naive()[3], view.tokens.clone()
    x[0, flat] = x[0, flat[0]].clone()  # in this block all are alike
    first, second = (act(view_of(x, tokens(seed, 4, WIDTH)), queries=0).tokens[0] for seed in (5, 6))
    moved = (first - second).abs().amax(1)
    assert moved[3] <= 1e-5
    assert (torch.cat([moved[:3], moved[4:]]) > 1e-2).all()


@pytest.mark.system("hicom", "exact")
def test_queries_read_all_tokens_and_where_they_are():
    view = random_view()
    own, g, x = view.module.overall, view[QuestionTokens()][0].mean(0), view.tokens[0]
    place = CLIP.place[CLIP.content][:, 1:]
    where = torch.tensor([[sinusoid_naive(float(v), WIDTH) for v in p] for p in place]).sum(1)
    scale, shift = own.guide.down(gelu(own.guide.up(g))).chunk(2)
    asked = layer_norm(own.queries * (1 + scale) + shift, (WIDTH,))
    keys, values = own.kv(layer_norm(x, (WIDTH,)) + where).chunk(2, -1)
    share = (own.q(asked) @ keys.T / WIDTH**0.5).softmax(-1)
    want = own.down(gelu(own.up(asked + own.out(share @ values))))
    found = act(view)
    assert found.tokens.shape == (1, 8 + 32, WIDTH)
    assert (found.tokens[0, 8:] - want).abs().max() <= 1e-4
    assert (found.provenance.matrix[0, 8:] - share).abs().max() <= 1e-5
    turned = act(view_of(view.tokens.flip(1), view[QuestionTokens()]))
    assert (turned.tokens[0, 8:] - want).abs().max() > 1e-2


@pytest.mark.system("hicom", "exact")
def test_the_mean_of_a_block_asks_where_it_is_guided():
    made = untrained(lambda: Connector(WIDTH, 32, True), 4)
    view = random_view(made=made)
    g, x = view[QuestionTokens()][0].mean(0), view.tokens[0]
    scale, shift = made.local.guide.down(gelu(made.local.guide.up(g))).chunk(2)
    rows = []
    for own in blocks_naive():
        asked = layer_norm(x[own].mean(0) * (1 + scale) + shift, (WIDTH,))
        rows.append((x[own] @ asked / WIDTH**0.5).softmax(0) @ x[own])
    found = act(view, guide="coarse", queries=0).tokens[0]
    assert (found - torch.stack(rows)).abs().max() <= 1e-4
    assert (found - act(random_view(), queries=0).tokens[0]).abs().max() > 1e-2


@pytest.mark.system("hicom", "exact")
def test_the_space_of_a_clip_takes_the_place_of_both():
    """As released: patches and instruction in CLIP's space, values behind the projector."""
    view = random_view()
    patches, words = tokens(3, CLIP.n_content, 16), tokens(4, 2, 16)
    with_clip = view_of(view.tokens, view[QuestionTokens()], made=view.module)
    signals = {**with_clip.signals, ClipPatches(layer=0): patches, ClipText(pool="pieces"): words}
    object.__setattr__(with_clip, "signals", signals)
    method = HICom.as_released(
        weights="untrained", queries=0, patches=ClipPatches(layer=0), words=ClipText(pool="pieces")
    )
    found = method.act(with_clip).tokens[0]
    g = words[0].mean(0)
    for row, own in zip(found, blocks_naive(), strict=True):
        share = (patches[0, own] @ g / 4).softmax(0)
        assert (row - share @ view.tokens[0, own]).abs().max() <= 1e-5
    with pytest.raises(WinnowError, match="guide=direct"):
        HICom(text="clip", guide="coarse")


def test_learned_gates_change_text_keys_values_and_outputs():
    plain = act(random_view(), queries=0).tokens
    for name in ("text", "key", "value", "readout"):
        made = untrained(lambda: Connector(WIDTH, 32, False), 1)
        with torch.no_grad():
            getattr(made.local, name).gate.fill_(0.5)
        assert (act(random_view(made=made), queries=0).tokens - plain).abs().max() > 1e-2, name


@pytest.mark.parametrize(
    ("layout", "local", "overall"),
    [(CLIP, 8, 32), (Layout.grid(7, 4, 5), 12, 32), (Layout.grid(5, 5), 4, 21), (Picture.tiled(4, 2, 1).lm, 10, 32)],
)
def test_how_many_are_left_follows_from_the_shape(layout, local, overall):
    found = act(random_view(layout=layout))
    assert found.tokens.shape[1] == found.provenance.m == local + overall
    at = found.provenance.representative[0].tolist()
    assert len(set(at)) == len(at)
    assert not found.provenance.ordered
    assert act(random_view(layout=layout), queries=4).tokens.shape[1] == local + 4
    assert found.separators == "drop"


def test_broken_tokens_have_no_weight():
    view = random_view()
    view.tokens[0, 40], view.tokens[0, 41, 2] = torch.nan, torch.inf
    found = act(view)
    assert found.tokens.isfinite().all()
    assert found.provenance.matrix[0, :, [40, 41]].abs().max() == 0
    assert int(view.notes["nan_scores"]) == 2


def test_half_precision_is_computed_in_single():
    view = random_view(b=2)
    half = view_of(view.tokens.bfloat16(), view[QuestionTokens()].bfloat16(), made=view.module)
    single = view_of(half.tokens.float(), half[QuestionTokens()].float(), made=view.module)
    found, want = act(half), act(single)
    assert found.tokens.dtype == torch.bfloat16
    assert torch.equal(found.provenance.matrix, want.provenance.matrix)
    assert (found.tokens.float() - want.tokens).abs().max() <= 0.02 * want.tokens.abs().max()


def test_wrong_settings_are_refused():
    for settings in ({"frames": 0}, {"side": 0}, {"queries": -1}, {"scale": -1.0}, {"guide": "fine"}):
        with pytest.raises(WinnowError, match="allowed"):
            HICom(**settings)


@pytest.mark.system("hicom", "directional")
@pytest.mark.xdist_group("connectors")
def test_trained_it_answers_more_than_untrained():
    assert connectors.of_method("hicom").over_untrained.low > 0
