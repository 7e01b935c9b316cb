"""Steps between vision blocks and inside them: keeping all, selections and merges, against the tower worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import zoo
from byhand import Reference
from cases import check_against_hand, picking, same
from probes import Look, Pick, Received, Watched, forward, generate, score
from snapshot import differences, same_weights, snapshot, weights
from torch import Tensor
from towerhand import Tile, in_tower, tiles_of

import winnow
from winnow.core.info import ModelInfo
from winnow.core.layout import CLS
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.step import Action, Reduce, State, Step
from winnow.core.view import View
from winnow.signals.vision import VisionAttention, VisionKeys

DEPTH = {"llava_clip": 5, "llava_siglip": 4, "llava_next": 5, "qwen2_5_vl": 4}
POINTS = ("blocks[0]", "blocks[1]", "blocks[2].mlp", "blocks[3].mlp")


def specials(view: View) -> int:
    """Rows of [CLS] before the patches of a tile."""
    return int((view.layout.kind == CLS).sum())


@dataclass(frozen=True)
class Share(Method):
    """Keeps [CLS] and, of each tile, a share of its patches: those with the largest score of their own row.

    `ragged`: one more or less, by what the tile shows, so that tiles of one call keep unequal numbers.
    """

    share: float = 0.5
    at: str = "blocks[1]"  # type: ignore[misc]
    ragged: bool = False
    slug: ClassVar[str] = "share"
    identity: ClassVar[dict] = {"share": 1.0}

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        return (Step(Point.of(self.at), self._pick),)

    def _pick(self, view: View, state: State) -> tuple[Action, State]:
        first = specials(view)
        lanes = [best(lane, first, self.share, self.ragged) for lane in view.tokens]
        counts = [len(lane) for lane in lanes]
        index = torch.stack([torch.nn.functional.pad(lane, (0, max(counts) - len(lane))) for lane in lanes])
        return Reduce(Reduction.select(index, view.n, counts=counts)), state


def best(tokens: Tensor, first: int, share: float, ragged: bool) -> Tensor:
    """Rows of a tile that `Share` keeps, ascending."""
    scores = score(tokens)[first:]
    count = max(1, int(share * len(scores)) - (int(scores.argmax()) % 3 if ragged else 0))
    kept = scores.argsort(descending=True)[:count] + first
    return torch.cat([torch.arange(first), kept.sort().values])


def sharing(at: str, share: float = 0.5, ragged: bool = False) -> Callable[[str, Tile], None]:
    """By hand, what `Share` does."""

    def act(point: str, tile: Tile) -> None:
        if point == at:
            tile.take(best(tile.x.flatten(1), tile.prefix, share, ragged).tolist())

    return act


@dataclass(frozen=True)
class Couple(Method):
    """Merges each pair of neighbours to their mean, in which both weigh as many patches as they stand for.

    Outputs stand in an order of their own, the last pair first; [CLS] stays alone. `weigh`: attention by size.
    """

    at: tuple[str, ...] = ("blocks[1]", "blocks[2].mlp")  # type: ignore[misc]
    weigh: bool = True
    slug: ClassVar[str] = "couple"
    identity: ClassVar[None] = None

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        return tuple(Step(Point.of(at), self._merge) for at in self.at)

    def _merge(self, view: View, state: State) -> tuple[Action, State]:
        size = state.summed.get("size", torch.ones(view.b, view.n))
        order = pairs(view.n, specials(view))
        cluster = torch.empty(view.n, dtype=torch.int64)
        for to, own in enumerate(order):
            cluster[own] = to
        cluster = cluster.expand(view.b, -1)
        total = torch.zeros(view.b, len(order)).scatter_add(1, cluster, size)
        reduction = Reduction.assign(
            cluster,
            size / total.gather(1, cluster),
            m=len(order),
            representative=torch.tensor([own[-1] for own in order]).expand(view.b, -1),
            ordered=False,
        )
        state = replace(state, summed={**state.summed, "size": size})
        return Reduce(reduction, log_bias=total.log() if self.weigh else None), state


def pairs(n: int, first: int) -> list[list[int]]:
    """[CLS] alone, then pairs of neighbours from the last to the first; an odd last token stays alone."""
    patches = list(range(first, n))
    return [[i] for i in range(first)] + [patches[i : i + 2] for i in range(0, len(patches), 2)][::-1]


def coupling(at: tuple[str, ...], weigh: bool) -> Callable[[str, Tile], None]:
    """By hand, what `Couple` does."""

    def act(point: str, tile: Tile) -> None:
        if point not in at:
            return
        sizes, order = [float(len(group)) for group in tile.groups], pairs(len(tile.ids), tile.prefix)
        rows = [sum(tile.x[i] * sizes[i] for i in own) / sum(sizes[i] for i in own) for own in order]
        groups = [set().union(*(tile.groups[i] for i in own)) for own in order]
        tile.take([own[-1] for own in order], torch.stack(rows))
        tile.groups = groups
        if weigh:
            tile.bias = torch.tensor([len(group) for group in groups]).log()

    return act


# Of the last, sizes are unequal in every picture of every build.
MERGES = [("blocks[1]",), ("blocks[1].mlp",), ("blocks[0]", "blocks[0].mlp", "blocks[1]")]

BATCHES = {"ragged": zoo.RAGGED, "single": zoo.SINGLE, "mixed": zoo.MIXED}


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("at", POINTS)
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_keep_all_is_bit_identical(build, at, rows):
    """Through the real path: every tile passed through the method, and the rows were gathered and put back."""
    model, inputs = zoo.model(build), zoo.inputs(build, rows)
    plain, said = forward(model, inputs).logits, generate(model, inputs)
    watched = Watched(Share(1.0, at=at))
    with winnow.compress(model, watched) as handle:
        assert torch.equal(forward(model, inputs).logits, plain)
        assert same(generate(model, inputs), said)
        ledger = handle.last
    assert sum(watched.items) > 0
    assert [len(item.kept) for item in ledger.items] == [item.layout.n_content for item in ledger.items]
    assert all(item.reductions[0][0] == at for item in ledger.items)
    assert ledger.flops == ledger.flops_full


@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "unequal"])
@pytest.mark.parametrize("at", POINTS)
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_selection_equals_by_hand(build, at, ragged):
    """A batch of pictures with unequal tiles, each tile alone by hand."""
    method = Share(0.6, at=at, ragged=ragged)
    check_against_hand(zoo.model(build), zoo.samples(build, zoo.MIXED), method, in_tower(sharing(at, 0.6, ragged)))


@pytest.mark.parametrize("weigh", [False, True], ids=["even", "weighed"])
@pytest.mark.parametrize("at", MERGES, ids="+".join)
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_merged_tokens_equal_by_hand(build, at, weigh):
    parts = zoo.samples(build, zoo.MIXED)
    check_against_hand(zoo.model(build), parts, Couple(at, weigh), in_tower(coupling(at, weigh)))


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_the_reference_tells_attention_by_size_from_plain_attention(build):
    parts, at = zoo.samples(build, zoo.SINGLE), MERGES[-1]
    with pytest.raises(AssertionError, match="row 0"):
        check_against_hand(zoo.model(build), parts, Couple(at, False), in_tower(coupling(at, True)))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("build", zoo.BUILDS)
def test_bias_and_padding_hold_under_both_attentions(build, implementation):
    model = zoo.model(build)
    model.set_attn_implementation({"vision_config": implementation})
    plan = Plan((Share(0.7, at="blocks[0]", ragged=True), Couple(("blocks[1]", "blocks[2]"))))

    def both(point: str, tile: Tile) -> None:
        sharing("blocks[0]", 0.7, True)(point, tile)
        coupling(("blocks[1]", "blocks[2]"), True)(point, tile)

    check_against_hand(model, zoo.samples(build, zoo.RAGGED), plan, in_tower(both))


def test_frames_of_a_video_are_tiles():
    parts = zoo.samples("qwen2_5_vl", ("3 V 6", "2 A 4 V 3"))
    looked = Look(at="blocks[1]")
    model = zoo.model("qwen2_5_vl")
    with winnow.compress(model, looked):
        forward(model, parts[0])
    assert [tuple(view.tokens.shape[:2]) for view in looked.views] == [(2, 12)]
    videos = zoo.samples("qwen2_5_vl", ("3 V 6", "3 V 5"))
    check_against_hand(model, videos, Share(0.5, ragged=True), in_tower(sharing("blocks[1]", 0.5, True)))


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_steps_in_the_tower_then_in_the_lm_equal_by_hand(build):
    """What the LM's steps see is what the tower left, in its places."""
    act = sharing("blocks[1].mlp", 0.7, True)

    def by_hand(reference, sample, entry):
        hand = in_tower(act)(reference, sample, entry)
        return replace(hand, cuts={**hand.cuts, 2: picking(entry, 3)})

    plan = Plan((Share(0.7, at="blocks[1].mlp", ragged=True), Pick(keep=3, at="layers[2]")))
    check_against_hand(zoo.model(build), zoo.samples(build, zoo.MIXED), plan, by_hand)


@pytest.mark.parametrize("build", ["llava_clip", "llava_siglip", "llava_next"])
def test_at_features_stands_what_the_blocks_left(build):
    """Views in the coordinates of now: tokens, ids, keys with [CLS], attention without; then a step reduces there."""
    model, part = zoo.model(build), zoo.samples(build, ("3 C 6",))[0]
    needs = (VisionAttention(0, query="all"), VisionAttention(3, query="all"), VisionKeys(2))
    look = Look(needs, at="features")
    with winnow.compress(model, Plan((Share(0.5, at="blocks[1]"), look, EveryOther()))) as handle:
        forward(model, part)
        (item,) = handle.last.items
    (view,) = look.views
    prefix = int(build in zoo.WITH_CLS)
    tiles = 5 if build == "llava_next" else 1
    assert view.n == tiles * (12 + prefix)
    assert view[needs[0]].shape == view[needs[1]].shape == (1, tiles * 12)
    assert view[needs[2]].shape[:2] == (1, view.n)
    assert [point for point, _, _ in item.reductions] == ["blocks[1]", "features", "features"]
    left = view.ids[0, ::2].tolist()
    content = [int(view.layout.cell[i]) for i in left if view.layout.cell[i] >= 0]
    assert sorted(item.layout.cell[item.layout.content][item.kept].tolist()) == sorted(content)
    assert torch.equal(item.provenance().representatives, item.kept)


@dataclass(frozen=True)
class EveryOther(Method):
    """At `features`, every second row."""

    at: str = "features"  # type: ignore[misc]
    slug: ClassVar[str] = "every-other"

    def reduce(self, view: View) -> Reduction:
        return Reduction.select(torch.arange(0, view.n, 2).expand(view.b, -1), view.n)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_signals_of_the_tower_equal_by_hand_after_a_reduction(build):
    """Attention that is read behind a merge counts its weights; both kinds follow to the LM's side."""
    model, part = zoo.model(build), zoo.samples(build, ("3 C 6",))[0]
    early, late = VisionAttention(0, query="all"), VisionAttention(3, query="all")
    look = Look((early, late), at="projected")
    at = ("blocks[1]", "blocks[2].mlp")
    with winnow.compress(model, Plan((Couple(at), look))):
        forward(model, part)
    (view,) = look.views
    found: list[tuple[int, float, float]] = []
    first: dict[int, Tensor] = {}

    def act(point: str, tile: Tile) -> None:
        if point == "blocks[0].mlp":
            first[id(tile)] = tile.received.mean(0)
        coupling(at, True)(point, tile)

    (tiles,) = tiles_of(Reference(model), part, act)
    cells = tiles[0].x.shape[0]
    for number, tile in enumerate(tiles):
        for row, token in enumerate(tile.ids):
            if token >= tile.prefix:
                cell = number * 25 + token - tile.prefix
                found.append((cell, float(first[id(tile)][token]), float(tile.received.mean(0)[row])))
    layout = view.layout
    order = {int(layout.cell[i]): place for place, i in enumerate(layout.content)}
    found = sorted((order[cell], a, b) for cell, a, b in found if cell in order)
    assert cells > 1
    assert view.ids[0].tolist() == [place for place, _, _ in found]
    assert (view[early][0] - torch.tensor([a for _, a, _ in found])).abs().max() < 1e-6
    assert (view[late][0] - torch.tensor([b for _, _, b in found])).abs().max() < 1e-6


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_provenance_adds_up_over_blocks(build):
    """Each content token went into the output that says so; sizes are the patches that feed an output."""
    model, inputs = zoo.model(build), zoo.inputs(build, ("3 C 6", "3 C 5"))
    with winnow.compress(model, Couple(("blocks[0]", "blocks[1].mlp", "blocks[3]"))) as handle:
        forward(model, inputs)
        items = handle.last.items
    for item in items:
        whole = item.provenance()
        assert (whole.n, whole.m) == (item.n_visual, len(item.kept))
        assert torch.equal(whole.representatives, item.kept)
        assert whole.is_stochastic
        assert bool(((whole.to_matrix() != 0).sum(0) == 1).all())
        assert bool((whole.to_matrix().gather(1, item.kept[:, None]) > 0).all())


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_a_batch_equals_its_samples(build):
    plan = Plan((Share(0.7, at="blocks[0]", ragged=True), Couple(("blocks[2].mlp",))))
    model, parts = zoo.model(build), zoo.samples(build, zoo.RAGGED)
    with winnow.compress(model, plan) as handle:
        together = forward(model, zoo.collate(parts)).logits[:, -1]
        kept = [item.kept for item in handle.last.items]
        for row, part in enumerate(parts):
            assert (forward(model, part).logits[0, -1] - together[row]).abs().max() < 1e-5
            assert torch.equal(handle.last.items[0].kept, kept[row])


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_detach_leaves_nothing(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    plain = generate(model, inputs)
    before, was = snapshot(model), weights(model)
    for plan in (Share(0.5, at="blocks[1].mlp"), Couple()):
        with winnow.compress(model, plan) as handle:
            changed = forward(model, inputs).logits
            with handle.using("full"):
                assert same(generate(model, inputs), plain)
            with handle.using(Share(0.4, at="blocks[0].mlp")):
                forward(model, inputs)
            assert torch.equal(forward(model, inputs).logits, changed)
        assert differences(before, snapshot(model)) == []
        assert same_weights(was, weights(model))
        assert same(generate(model, inputs), plain)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_the_tower_computes_fewer_rows(build):
    """No masking instead of dropping: the MLPs behind a step read what is left, and no other block is slowed."""
    model, part = zoo.model(build), zoo.samples(build, ("3 C 6",))[0]
    seen: list[int] = []
    blocks = model.model.visual.blocks if build == "qwen2_5_vl" else model.model.vision_tower.encoder.layers
    hooks = [block.mlp.register_forward_pre_hook(lambda m, a: seen.append(a[0].numel() // 48)) for block in blocks]
    forward(model, part)
    full, seen[:] = seen[0], []
    with winnow.compress(model, Share(0.5, at="blocks[1].mlp")):
        forward(model, part)
    for hook in hooks:
        hook.remove()
    prefix = int(build in zoo.WITH_CLS)
    tiles = 5 if build == "llava_next" else 1
    half = 24 if build == "qwen2_5_vl" else tiles * (12 + prefix)
    assert seen == [full] + [half] * (DEPTH[build] - 1)


def test_features_through_an_encoder_call_of_the_users_own():
    """`generate` encodes by itself; so can the user, under the plan."""
    model, inputs = zoo.model("llava_next"), zoo.inputs("llava_next", zoo.RAGGED)
    with winnow.compress(model, Couple()):
        whole = forward(model, inputs).logits
        pictures = {k: inputs[k] for k in ("pixel_values", "image_sizes")}
        with torch.no_grad():
            encoded = model.model.get_image_features(**pictures, return_dict=True)
        rest = {k: v for k, v in inputs.items() if k not in pictures}
        assert torch.equal(forward(model, {**rest, "mm_encoder_outputs": {"image": encoded}}).logits, whole)


def test_by_received_attention_after_merging():
    """A method of the connector that looks at the tower works on what merging left."""
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.RAGGED)
    with winnow.compress(model, Plan((Couple(), Received(keep=3)))) as handle:
        forward(model, inputs)
        assert [len(item.kept) for item in handle.last.items] == [3, 3, 3]
