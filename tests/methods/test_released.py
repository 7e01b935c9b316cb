"""`slug:released` is the authors' released code: each method against that code's steps, written by hand as its card has
them, on plain tensors; and two tiled plans on a model.

The references loop over lists and know nothing of winnow but the layout of their input.
"""

import pytest
import torch
import zoo
from byhand import Reference, keeping
from torch.nn.functional import normalize

import winnow
from methods.byhand import feature_block
from winnow.core.info import ModelInfo
from winnow.core.plan import Plan
from winnow.core.registry import built_in, method_class
from winnow.core.step import Reduce, State
from winnow.core.view import View
from winnow.signals.language import LMAttention
from winnow.signals.vision import VisionAttention
from winnow.testing import Picture

from .stubs import ids, scores, tokens

LLAVA = ModelInfo("LLaVA", depth=32, vision_depth=24, feature_layer=-2)
# Of these there is no code, or none of the form that is here; the code of most others numbers positions anew.
NO_CODE = {
    "audio-guided",
    *("a-tome", "audio-pool", "audio-segments", "kffocus", "speechprune", "visual-context-window-extension"),
    *("covipal", "efficientvla", "explainability-compression", "fopru", "todre", "token-correlation-compression"),
    *("crosslmm", "langdc", "omnivid", "selective-s4", "token-transforming", "videostreaming"),
}
KEEP_POSITIONS = {
    *("dart", "diffrate", "dyvte", "evs", "fastv", "fastvid", "fitprune", "pixelprune", "tome", "v2drop", "vflowopt"),
    "centerclip",  # no language model stands behind it
    "qtsplus",
    "vtw",
}
BUILT_IN = {slug for slug, entry in built_in().items() if not entry.of_cache and not entry.of_input}
RELEASED = sorted(BUILT_IN - NO_CODE)


def released(text: str):
    """The steps of a plan as released, on LLaVA-1.5's numbers."""
    (method,) = Plan.of(text).methods
    return method.bind(LLAVA)[1]


def shown(step, *values: torch.Tensor) -> dict:
    """Values for the signals that a step needs, under all names by which it reads them."""
    return step.signals(dict(zip(step.needs, values, strict=True)).__getitem__)


def acted(step, view: View) -> Reduce:
    return step.act(view, State())[0]


def best(row: list[float], k: int) -> list[int]:
    return sorted(sorted(range(len(row)), key=lambda j: -row[j])[:k])


def test_every_method_says_what_its_authors_code_is_or_that_there_is_none():
    assert {slug for slug in BUILT_IN if method_class(slug).released is None} == NO_CODE
    kept = {slug for slug in RELEASED if Plan.of(f"{slug}:released").positions == "keep"}
    assert kept == KEEP_POSITIONS


@pytest.mark.parametrize("slug", RELEASED)
def test_what_released_changes_is_said_where_the_method_departs(slug):
    """A setting that differs from its default by choice stands in the header, with the reason."""
    cls = method_class(slug)
    header = " ".join((__import__(cls.__module__, fromlist=["x"]).__doc__ or "").split())
    departs = header.partition("Departs from the released code:")[2]
    changed = {name for name, value in cls.released.items() if name in cls.settings() and value != cls.defaults()[name]}
    for name in changed - {"row"}:
        assert f"`{name}=" in departs, name
    if cls.released["positions"] == "compact":
        assert "ositions are" in departs or "positions=compact" in departs


@pytest.mark.system("fastervlm", "exact")
@pytest.mark.parametrize("side", [6, 24])
def test_fastervlm_of_one_tile(side):
    n, (step,) = side * side, released("fastervlm:released,keep=9")
    row = scores(1, n)
    layout = Picture.grid(side, side).tower
    action = acted(step, View.of(tokens(1, 1 + n), shown(step, row), layout=layout))
    assert str(step.at) == "features"
    assert step.needs == (VisionAttention(22),)
    assert action.separators == "keep"
    assert ids(action.reduction) == [1 + j for j in best(row[0].tolist(), 9)]


@pytest.mark.system("fastervlm", "exact")
def test_fastervlm_of_tiles_takes_the_same_number_of_all_patches_of_each():
    picture, (step,) = Picture.tiled(5, 2, 2), released("fastervlm:released,keep=20")
    row = scores(2, 125)
    view = View.of(tokens(0, 130), shown(step, row), layout=picture.tower, n_visual=90)
    want = [26 * t + 1 + j for t in range(5) for j in best(row[0, 25 * t : 25 * (t + 1)].tolist(), 4)]
    assert ids(acted(step, view).reduction) == want
    (step,) = released("fastervlm:released,keep=20%")  # of all patches, five of each tile
    assert acted(step, view).reduction.m == 25


def hiprune(middle, deep, width, keep, alpha=0.1):
    """One tile: flat neighbours, clamped to the tile."""
    anchors = best(middle, round(keep * alpha / 5))
    last = len(middle) - 1
    chosen = {min(max(a + d, 0), last) for a in anchors for d in (0, -1, 1, -width, width)}
    rest = best([s - (10 if j in chosen else 0) for j, s in enumerate(deep)], keep - len(chosen))
    return sorted(chosen | set(rest))


@pytest.mark.system("hiprune", "exact")
@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("keep", [64, 128, 192])
def test_hiprune_of_one_tile(keep, alpha):
    for seed in range(4):
        (step,) = released(f"hiprune:released,keep={keep},alpha={alpha}")
        middle, deep = scores(seed, 576), scores(seed + 9, 576)
        if seed == 0:
            middle[0, [0, 3, 23, 24, 575, 560]] += 1  # corners and edges, where clamping and wrapping show
        layout = Picture.grid(24, 24).tower
        action = acted(step, View.of(tokens(0, 577, 4), shown(step, middle, deep), layout=layout))
        want = hiprune(middle[0].tolist(), deep[0].tolist(), 24, keep, alpha)
        assert [layer.layer for layer in step.needs] == [8, 22]
        assert ids(action.reduction) == [1 + j for j in want]


@pytest.mark.system("hiprune", "exact")
def test_hiprune_clamps_what_lies_beyond_the_ends_of_a_tile():
    """The token above the first row is the first token, the one below the last row the last."""
    middle, deep = torch.zeros(1, 20), torch.linspace(0.9, 0.1, 20)[None]
    middle[0, 2], middle[0, 17] = 2, 1  # of 4 × 5: the upper neighbour of 2 is clamped to 0, the lower of 17 to 19
    (step,) = released("hiprune:released,keep=10,alpha=1.0")
    view = View.of(tokens(0, 21), shown(step, middle, deep), layout=Picture.grid(4, 5).tower)
    assert ids(acted(step, view).reduction) == [1 + j for j in (0, 1, 2, 3, 7, 12, 16, 17, 18, 19)]


@pytest.mark.system("hiprune", "exact")
def test_hiprune_of_tiles_drops_the_remainder():
    picture, (step,) = Picture.tiled(5, 2, 1), released("hiprune:released,keep=38,alpha=0.5")
    middle, deep = scores(3, 75), scores(4, 75)
    view = View.of(tokens(0, 78), shown(step, middle, deep), layout=picture.tower)
    want = []
    for t in range(3):
        own = slice(25 * t, 25 * (t + 1))
        want += [26 * t + 1 + j for j in hiprune(middle[0, own].tolist(), deep[0, own].tolist(), 5, 38 // 3, 0.5)]
    assert ids(acted(step, view).reduction) == want


def divprune(x, k):
    unit = normalize(x.double(), dim=-1)
    far = (1 - unit @ unit.T).tolist()
    n = len(far)
    chosen = [max(range(n), key=lambda j: sorted(far[i][j] for i in range(n))[1])]
    while len(chosen) < k:
        chosen.append(max(range(n), key=lambda j: -1 if j in chosen else min(far[i][j] for i in chosen)))
    return sorted(chosen)


@pytest.mark.system("divprune", "exact")
@pytest.mark.parametrize(("n", "share"), [(40, 0.098), (25, 0.1), (35, 0.1), (25, 0.5), (27, 0.5)])
def test_divprune_rounds_as_python_does(n, share):
    """2.5 is 2, 3.5 is 4, 12.5 is 12."""
    (step,) = released(f"divprune:released,keep={share}")
    x = tokens(n, n, 12)
    assert ids(acted(step, View.of(x)).reduction) == divprune(x[0], round(share * n))


@pytest.mark.system("vtc-cls", "exact")
def test_vtc_cls_sums_from_its_start_to_the_feature_block():
    (step,) = released("vtc-cls:released,keep=16,start=14")
    rows = {signal: scores(i, 100) for i, signal in enumerate(step.needs)}
    assert list(rows) == [VisionAttention(block) for block in range(14, 23)]
    want = best(sum(row[0].double() for row in rows.values()).tolist(), 16)
    assert ids(acted(step, View.of(tokens(0, 100), rows)).reduction) == want


@pytest.mark.system("fastv", "exact")
@pytest.mark.parametrize(("n", "dropped"), [(576, 0.5), (576, 0.75), (25, 0.5), (27, 0.5), (10, 0.75), (50, 0.25)])
def test_fastv_rounds_as_python_does(n, dropped):
    (step,) = released(f"fastv:released,keep={1 - dropped}")
    row = scores(n, n)
    assert (str(step.at), step.needs) == ("layers[2]", (LMAttention(1),))
    found = acted(step, View.of(tokens(0, n, 4), shown(step, row))).reduction
    assert ids(found) == best(row[0].tolist(), round(n * (1 - dropped)))


@pytest.mark.system("pyramiddrop", "exact")
@pytest.mark.parametrize("n", [576, 575, 25, 9])
def test_pyramiddrop_cuts_down_from_the_number_at_entry(n):
    held = list(range(n))
    for number, (layer, ratio) in enumerate(((8, 0.5), (16, 0.25), (24, 0.125))):
        step = released("pyramiddrop:released")[number]
        assert (str(step.at), step.needs) == (f"layers[{layer}]", (LMAttention(layer),))
        row = scores(layer, len(held))
        view = View.of(tokens(0, len(held), 4), shown(step, row), n_visual=n)
        held = [held[j] for j in ids(acted(step, view).reduction)]
        assert len(held) == int(n * ratio)


def visionzip(x, row, keys, dominant, contextual):
    """One tile `[1 + N, …]`: dominant rows with the number of each (0 is [CLS]), and contextual rows."""
    picked = best(row, dominant - 1)
    rest = [j for j in range(len(row)) if j not in picked]
    step = max(1, len(rest) // contextual)
    targets = [rest[i * step] for i in range(contextual)]
    unit = normalize(keys[1:].double(), dim=-1)
    joined = {t: [] for t in targets}
    for j in rest:
        if j not in targets:
            joined[max(targets, key=lambda t: float(unit[j] @ unit[t]))].append(x[1 + j])
    merged = [x[1 + t] + (torch.stack(joined[t]).mean(0) if joined[t] else 0) for t in targets]
    return [0, *(1 + j for j in picked)], merged


@pytest.mark.system("visionzip", "exact")
def test_visionzip_of_one_tile_is_dominant_then_contextual():
    (step,) = released("visionzip:released")
    layout = Picture.grid(24, 24).tower
    x, row, keys = tokens(0, 577), scores(0, 576), tokens(1, 577, 8)
    action = acted(step, View.of(x, shown(step, row, keys), layout=layout))
    kept, merged = visionzip(x[0], row[0].tolist(), keys[0], 54, 10)
    assert action.separators == "drop"
    torch.testing.assert_close(action.reduction.apply(x)[0], torch.cat([x[0, kept], torch.stack(merged)]))


@pytest.mark.system("visionzip", "exact")
@pytest.mark.parametrize(("dominant", "contextual"), [(5, 3), (9, 2), (2, 1)])
def test_visionzip_of_tiles_puts_all_of_the_thumbnail_first(dominant, contextual):
    """Then the crops: dominant patches row by row over the mosaic, [CLS] of each, contextual tokens of each."""
    picture, side = Picture.tiled(5, 2, 2), 5
    (step,) = released(f"visionzip:released,dominant={dominant},contextual={contextual}")
    x, row, keys = tokens(0, 130), scores(5, 125), tokens(1, 130, 8)
    view = View.of(x, shown(step, row, keys), layout=picture.tower)
    tiles = []
    for t in range(5):
        own, patches = slice(26 * t, 26 * (t + 1)), slice(25 * t, 25 * (t + 1))
        kept, merged = visionzip(x[0, own], row[0, patches].tolist(), keys[0, own], dominant, contextual)
        tiles.append((26 * t, kept, merged))
    _, kept, merged = tiles[0]
    want = [x[0, j] for j in kept] + merged
    mosaic = {}
    for t, (start, kept, _) in enumerate(tiles[1:]):
        for j in kept[1:]:
            line, col = divmod(j - 1, side)
            mosaic[t // 2 * side + line, t % 2 * side + col] = x[0, start + j]
    want += [mosaic[spot] for spot in sorted(mosaic)]
    want += [x[0, start] for start, _, _ in tiles[1:]]
    want += [token for _, _, merged in tiles[1:] for token in merged]
    torch.testing.assert_close(acted(step, view).reduction.apply(x)[0], torch.stack(want))


PICTURES = ("3 A 6", "3 B 9", "3 C 5")  # unpadded in height, in width, and not at all


def among_all_patches(reference, sample, choose):
    """The content ids of each picture that are left when each tile chose among all its patches."""
    entry, kept = reference.entry(sample), []
    for number, cells in enumerate(entry.cells):
        tiles = reference.vision(sample).cls[0][number].shape[1] // reference.cells
        chosen = {t * reference.cells + j for t in range(tiles) for j in choose(number, t, tiles)}
        kept.append(torch.tensor([i for i, cell in enumerate(cells.tolist()) if cell in chosen]))
    return entry, kept


@pytest.mark.parametrize("slug", ["fastervlm", "hiprune"])
@pytest.mark.parametrize("row", PICTURES)
def test_tiles_on_a_model_choose_among_all_patches_and_lose_what_unpadding_removes(slug, row):
    model = zoo.model("llava_next")
    reference, (sample,) = Reference(model), zoo.samples("llava_next", (row,))
    side, cells = 5, reference.cells
    vision, feature, keep = reference.vision(sample), feature_block(reference), 45

    def choose(number, tile, tiles):
        own = slice(tile * cells, (tile + 1) * cells)
        if slug == "fastervlm":
            return best(vision.cls[feature][number].mean(0)[own].tolist(), keep // tiles)
        middle = vision.received[0][number].mean(0)[own].tolist()
        return hiprune(middle, vision.received[feature][number].mean(0)[own].tolist(), side, keep // tiles, 0.5)

    entry, kept = among_all_patches(reference, sample, choose)
    plan = Plan.of(f"{slug}:released,keep={keep}" + (",alpha=0.5,object_layer=0" if slug == "hiprune" else ""))
    with winnow.compress(model, plan) as handle, torch.no_grad():
        logits = model(**sample).logits[0, -1]
        (item,) = handle.last.items
        assert handle.last.positions == "compact"
    assert item.kept.tolist() == kept[0].tolist()
    assert (len(kept[0]) < keep) == (row != "3 C 5")
    torch.testing.assert_close(
        logits, reference.run(entry, cuts={0: keeping(entry, kept)}, compact=True).logits[0], rtol=1e-4, atol=1e-5
    )
