"""PixelPrune by its card: exact counts on drawn grids, and a decoder that knows only what is kept and the rule."""

from __future__ import annotations

import families
import pytest
import torch
from families import RAGGED, by_hand, content
from masked import Cut
from probes import generate, new_tokens, step_logits
from torch.nn.functional import unfold

import winnow
from tests.methods.directional import at_random, gap
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.plan import Plan
from winnow.core.reduction import Reduction
from winnow.core.view import View
from winnow.methods.pixelprune import CELLS, PixelPrune
from winnow.signals.vision import Pixels
from winnow.testing import WITH_CLS, Picture

from .stubs import STUBS, first_k, ids, tokens, uniform

WIDE = Layout.grid(8, 10)


def _view(cells: torch.Tensor, layout: Layout = WIDE) -> View:
    """`[b, N, values]` of cells, from 0 to 1, as a processor gives them."""
    cells = (cells if cells.ndim == 3 else cells[None]) * 2 - 1
    return View.of(tokens(0, cells.shape[1], 4, b=len(cells)), {CELLS: cells}, layout=layout)


def _drawn(grid: torch.Tensor) -> torch.Tensor:
    """Cells of one value each."""
    return grid.flatten()[:, None].expand(-1, 5).float()


def _grids() -> dict[str, tuple[torch.Tensor, int]]:
    def rectangle(rows: slice, cols: slice) -> torch.Tensor:
        grid = torch.zeros(8, 10)
        grid[rows, cols] = 1
        return grid

    line, col = torch.arange(8)[:, None], torch.arange(10)
    return {
        "constant": (torch.zeros(8, 10), 1),
        "left and right": (rectangle(slice(0, 8), slice(4, 10)), 2),
        "upper and lower": (rectangle(slice(3, 8), slice(0, 10)), 2),
        "inner rectangle": (rectangle(slice(2, 5), slice(3, 7)), 4),
        "rectangle at the right": (rectangle(slice(2, 5), slice(6, 10)), 3),
        "rectangle at the bottom": (rectangle(slice(4, 8), slice(3, 7)), 3),
        "odd cell": (rectangle(slice(4, 5), slice(5, 6)), 4),
        "checkerboard": ((line + col) % 2, 80),
    }


@pytest.mark.system("pixelprune", "exact")
@pytest.mark.parametrize("name", _grids())
def test_counts_of_drawn_grids(name):
    grid, count = _grids()[name]
    kept = ids(PixelPrune().reduce(_view(_drawn(grid))))
    assert kept[0] == 0
    assert len(kept) == count
    if name == "inner rectangle":  # its corner, the cell to the right of its first row, the one below its first column
        assert kept == [0, 23, 27, 53]


def _decoded(cells: torch.Tensor, kept: list[int], h: int, w: int, threshold: float) -> torch.Tensor:
    """The picture of one who has the kept cells and knows the rule."""
    made: list[list[torch.Tensor]] = [[None] * w for _ in range(h)]  # type: ignore[list-item]
    alike = lambda a, b: float((a - b).abs().max()) <= threshold  # noqa: E731
    for r in range(h):
        for c in range(w):
            if r * w + c in kept:
                made[r][c] = cells[r * w + c]
            elif not r or not c:
                made[r][c] = made[r - 1][c] if r else made[r][c - 1]
            else:
                a, b, between = made[r][c - 1], made[r - 1][c], made[r - 1][c - 1]
                made[r][c] = b if alike(between, a) and not alike(between, b) else a
    return torch.stack([torch.stack(row) for row in made]).flatten(0, 1)


def _can_be_decoded(reduce):
    worst = 0.0
    for seed in range(28):
        generator, (h, w) = torch.Generator().manual_seed(seed), ((8, 10), (1, 9), (7, 1), (5, 5))[seed % 4]
        for threshold in (0.0, 0.2):
            levels = 3 if threshold == 0 else 12
            cells = _drawn(torch.randint(0, levels, (h, w), generator=generator)) / levels
            if threshold:  # with smooth parts, where errors would add up
                cells = cells * 0.3 + torch.linspace(0, 0.7, h * w)[:, None]
            view = _view(cells, Layout.grid(h, w))
            shown = view[CELLS][0] * 0.5 + 0.5
            error = (_decoded(shown, ids(reduce(view, threshold)), h, w, threshold) - shown).abs().max()
            assert error <= threshold
            worst = max(worst, float(error))
    return worst


@pytest.mark.system("pixelprune", "exact")
def test_a_decoder_has_the_picture_bit_for_bit_and_within_the_threshold():
    assert _can_be_decoded(lambda view, threshold: PixelPrune(threshold=threshold).reduce(view)) > 0.1


def _by_variance(view, threshold):
    """Cells that differ from the mean of the picture: flat areas lose their first cell."""
    cells = view[CELLS][0]
    return Reduction.select(((cells - cells.mean(0)).abs().amax(-1) > 0.3)[None])


def _first_of_each_kind(view, threshold):
    """Cells that have not been seen before, anywhere."""
    cells = view[CELLS][0].tolist()
    return Reduction.select(torch.tensor([[cell not in cells[:i] for i, cell in enumerate(cells)]]))


@pytest.mark.parametrize("stub", [*STUBS, _by_variance, _first_of_each_kind])
def test_what_a_stub_keeps_cannot_be_decoded(stub):
    blind = (lambda view, threshold: stub(view, view.n // 2)) if stub in STUBS else stub
    with pytest.raises(AssertionError):
        _can_be_decoded(blind)


@pytest.mark.system("pixelprune", "exact")
def test_a_slow_ramp_drifts_unless_it_is_anchored():
    ramp = torch.arange(10).expand(8, 10) * 0.01
    kept = ids(PixelPrune(threshold=0.055).reduce(_view(_drawn(ramp))))
    assert [j for j in kept if j < 10] == [0, 6]
    assert ids(PixelPrune(threshold=0.055, anchored=False).reduce(_view(_drawn(ramp)))) == [0]


def _authors(cells: torch.Tensor, h: int, w: int, threshold: float, metric: str, anchored: bool) -> list[int]:
    """The released selector: the neighbour that is missing in a first row or column is the other one."""

    def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
        apart = a - b
        far = {"max": apart.abs().max(), "mae": apart.abs().mean(), "rmse": apart.pow(2).mean().sqrt()}[metric]
        return bool(far <= threshold)

    grid = cells.unflatten(0, (h, w))
    stands, kept = grid.clone(), [0]
    for i in range(1, h * w):
        r, c = divmod(i, w)
        a = stands[r, c - 1] if c else stands[r - 1, 0]
        guess = a
        if r and c and alike(stands[r - 1, c - 1], a) and not alike(stands[r - 1, c - 1], stands[r - 1, c]):
            guess = stands[r - 1, c]
        if not alike(grid[r, c], guess):
            kept.append(i)
        elif anchored:
            stands[r, c] = guess
    return kept


@pytest.mark.system("pixelprune", "exact")
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("metric", ["max", "mae", "rmse"])
def test_released_equals_the_released_code(metric, anchored):
    assert Plan.of("pixelprune:released").positions == "keep"
    for seed, threshold in enumerate((0.0, 0.05, 0.1, 0.2, 0.3)):
        for h, w in ((8, 10), (1, 9), (7, 1)):
            generator = torch.Generator().manual_seed(seed)
            cells = (
                torch.randint(0, 4, (h * w, 1), generator=generator) / 8
                + torch.rand(h * w, 12, generator=generator) * 0.1
            )
            cells[torch.rand(h * w, generator=generator) < 0.5] = 0.25
            view = _view(cells, Layout.grid(h, w))
            method = PixelPrune.as_released(threshold=threshold, metric=metric, anchored=anchored)
            want = _authors(view[CELLS][0] * 0.5 + 0.5, h, w, threshold, metric, anchored)
            assert ids(method.reduce(view)) == want


@pytest.mark.system("pixelprune", "exact")
def test_at_threshold_zero_the_scan_along_diagonals_is_that_without_one():
    for seed in range(15):
        cells = _drawn(torch.randint(0, 2, (8, 10), generator=torch.Generator().manual_seed(seed)))
        serial = PixelPrune(threshold=1e-9).reduce(_view(cells))
        assert ids(PixelPrune().reduce(_view(cells))) == ids(serial)


@pytest.mark.system("pixelprune", "exact")
def test_two_pictures_in_a_batch_are_two_pictures():
    cells = torch.stack([_drawn(_grids()[name][0]) for name in ("odd cell", "checkerboard", "inner rectangle")])
    for threshold in (0, 0.1):
        both = PixelPrune(threshold=threshold).reduce(_view(cells))
        assert both.counts == (4, 80, 4)
        for lane in range(3):
            assert ids(both, lane) == ids(PixelPrune(threshold=threshold).reduce(_view(cells[lane])))


def test_where_nothing_is_predicted_all_cells_stay_in_place():
    found = PixelPrune().reduce(_view(torch.rand(80, 5, generator=torch.Generator().manual_seed(0))))
    assert (found.is_selection, found.ordered, ids(found)) == (True, True, list(range(80)))


def test_cls_stays_and_ids_count_it():
    """At blocks the ids of a view are rows of the tower; a zero row of pixels stands for [CLS]."""
    layout = Layout.grid(8, 10, cls=True)
    cells = torch.cat([torch.zeros(1, 5), _drawn(_grids()["inner rectangle"][0])])
    assert ids(PixelPrune().reduce(_view(cells, layout))) == [0, 1, 24, 28, 54]


def test_after_an_earlier_step_the_scan_knows_what_is_gone():
    """Of an empty picture, the first cell that is left of each row that has nothing above it."""
    left = torch.tensor([[3, 4, 5, 13, 14, 40, 41]])
    view = View(tokens(0, 7), WIDE, left, 80, {CELLS: torch.zeros(1, 7, 5)})
    assert left[0, ids(PixelPrune(block=-1).reduce(view))].tolist() == [3, 40]


def test_crops_are_scanned_by_themselves():
    layout = Picture.tiled(4, 2, 1).lm
    kept = ids(PixelPrune(block=-1).reduce(_view(torch.zeros(48, 5), layout)))
    assert layout.tiles[kept].tolist() == [0, 1, 2]


def test_a_broken_cell_explains_nothing_and_is_not_kept():
    cells = _drawn(torch.zeros(8, 10)).clone()
    cells[[0, 25], 2] = torch.nan
    cells[33, 0] = torch.inf
    for threshold in (0, 0.1):
        view = _view(cells)
        kept = ids(PixelPrune(threshold=threshold).reduce(view))
        assert not {0, 25, 33} & set(kept)
        assert int(view.notes["nan_scores"]) == 3
    assert ids(PixelPrune().reduce(_view(torch.full((80, 5), torch.nan)))) == [0]


def test_half_precision_is_compared_in_fp32():
    cells = torch.rand(80, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = PixelPrune(threshold=0.4).reduce(_view(cells.float()))
    view = View.of(tokens(0, 80), {CELLS: _view(cells.float())[CELLS].bfloat16()}, layout=WIDE)
    same = View.of(tokens(0, 80), {CELLS: view[CELLS].float()}, layout=WIDE)
    assert ids(PixelPrune(threshold=0.4).reduce(view)) == ids(PixelPrune(threshold=0.4).reduce(same))
    assert 1 < wide.m < 80


def test_thresholds_are_of_pixel_values():
    """A step of 0.2 of a picture that was divided by 0.25 is one of 0.8 in what the encoder is given."""
    cells = torch.zeros(1, 80, 5)
    cells[:, 1:] = 0.8
    view = View.of(tokens(0, 80), {CELLS: cells}, layout=WIDE)
    counts = [PixelPrune(threshold=t, std=0.25).reduce(view).m for t in (0.19, 0.21)]
    assert counts == [3, 1]


def test_points_and_settings():
    read = PixelPrune().signals()[0].read(Pixels(torch.ones(3, 4)))
    assert read.shape == (3, 4)
    at = lambda **settings: str(PixelPrune(**settings).checked_steps(WITH_CLS)[0].at)  # noqa: E731
    assert (at(), at(block=3), at(block=-1)) == ("blocks[0]", "blocks[3]", "projected")
    with pytest.raises(UnsupportedError, match="acts at blocks"):
        PixelPrune().checked_steps(ModelInfo())
    with pytest.raises(UnsupportedError, match="pixels of each token"):
        PixelPrune(block=-1).checked_steps(ModelInfo(vision_depth=0))
    for wrong in ({"threshold": 1.5}, {"metric": "l2"}, {"block": -2}, {"std": 0}):
        with pytest.raises(WinnowError, match=next(iter(wrong))):
            PixelPrune(**wrong)


def _pruned_tower(visual, threshold: float) -> None:
    """By hand: hooks that let only patches of kept cells into the blocks of a plain tower of grids.

    Patches have been embedded, and their rotations made, on the whole grid. What mergers make goes back to its places.
    """
    run: dict[str, torch.Tensor] = {}

    def enter(module, args, kwargs):
        pixels, grids = (
            args[0] if args else kwargs["hidden_states"],
            kwargs.get("grid_thw", args[1] if args[1:] else None),
        )
        units, first = pixels.flatten(1).unflatten(0, (-1, 4)).flatten(1) * 0.5, 0
        kept, ends = [], [0]
        for t, h, w in grids.tolist():
            for _ in range(t):
                own = units[first : first + h * w // 4]
                kept += [first + i for i in _authors(own, h // 2, w // 2, threshold, "rmse", True)]
                ends.append(4 * len(kept))
                first += len(own)
        run.update(units=torch.tensor(kept), total=torch.tensor(first), ends=torch.tensor(ends, dtype=torch.int32))
        run["patches"] = (run["units"][:, None] * 4 + torch.arange(4)).flatten()

    def before(index):
        def take(module, args, kwargs):
            kwargs = kwargs | {"cu_seqlens": run["ends"]}
            kwargs["position_embeddings"] = tuple(x[run["patches"]] for x in kwargs["position_embeddings"])
            return (args[0][run["patches"]] if index == 0 else args[0], *args[1:]), kwargs

        return take

    def placed(module, args, made):
        whole = made.new_zeros(int(run["total"]), made.shape[1])
        whole[run["units"]] = made
        return whole

    visual.register_forward_pre_hook(enter, with_kwargs=True)
    for index, block in enumerate(visual.blocks):
        block.register_forward_pre_hook(before(index), with_kwargs=True)
    for merger in (visual.merger, *getattr(visual, "deepstack_merger_list", ())):
        merger.register_forward_hook(placed)


@pytest.mark.system("pixelprune", "model")
@pytest.mark.parametrize("build", ["qwen2_vl", "qwen3_vl", "qwen3_5"])
def test_towers_of_grids_by_hand(build):
    """Also DeepStack, and M-RoPE: kept cells, and the text behind them, stand where they stood."""
    own = families.build(build)
    model, parts = own.model(), own.samples(RAGGED)
    inputs, plain = own.collate(parts), own.model()
    _pruned_tower(plain.model.visual, 0.707)
    with winnow.compress(model, "pixelprune:threshold=0.707,metric=rmse") as handle:
        output, ledger = generate(model, inputs), handle.last
    logits, said = step_logits(output), new_tokens(output, inputs)
    shares = []
    for row, part in enumerate(parts):
        items = [item for item in ledger.items if item.row == row]
        positions = content(model, part, items)
        cells = iter([x.flatten(1).unflatten(0, (-1, 4)).flatten(1) * 0.5 for x in _pictures(part)])
        kept = [
            _authors(next(cells), h // 2, w // 2, 0.707, "rmse", True)
            for _, h, w in part.get("image_grid_thw", torch.empty(0, 3)).tolist()
        ]
        stay = [at[i] for at, i in zip(positions, kept, strict=True)]
        want = by_hand(plain, part, positions, said[row, :-1].tolist(), Cut(0, lambda rows, left, stay=stay: stay))
        assert [item.kept.tolist() for item in items] == kept
        assert (logits[row] - want.logits).abs().max() <= 1e-5 * want.logits.abs().max()
        shares += [len(i) / len(at) for at, i in zip(positions, kept, strict=True)]
    assert 0.1 < min(shares) < max(shares) < 0.95


def _pictures(part):
    grids = part.get("image_grid_thw")
    return () if grids is None else part["pixel_values"].split(grids.prod(-1).tolist())


@pytest.fixture(scope="module")
def pruned(samples):
    """Of each scene of the sample a view of its pixels, and how many cells are left at a threshold of 0.2."""
    pixels = torch.cat([request.inputs["pixel_values"] for request in samples[0].requests])
    layout = samples[0].layout
    side = pixels.shape[-1] // int(layout.n_content**0.5)
    cells = unfold(pixels, side, stride=side).transpose(1, 2)
    views = [View.of(cells[i : i + 1, :, :4], {CELLS: cells[i : i + 1]}, layout=layout) for i in range(len(cells))]
    kept = [PixelPrune(threshold=0.2, std=0.27).reduce(view) for view in views]
    return views, kept


BLIND = (first_k, uniform, at_random)


def _finds_evidence(sample, pruned, select):
    """More of it than as many cells that are chosen blindly."""
    views, kept = pruned

    def recall(pick):
        return sample.recall(torch.cat([pick(view, own).kept for view, own in zip(views, kept, strict=True)]))

    for blind in BLIND:
        more = gap(recall(select), recall(lambda view, own, blind=blind: blind(view, own.m)))
        assert more.low > 0


@pytest.mark.system("pixelprune", "directional")
@pytest.mark.xdist_group("samples")
def test_cells_that_pixels_do_not_explain_hold_the_evidence(sample, pruned):
    _finds_evidence(sample, pruned, lambda view, own: own)


@pytest.mark.xdist_group("samples")
@pytest.mark.parametrize("stub", BLIND)
def test_a_stub_finds_no_evidence(sample, pruned, stub):
    with pytest.raises(AssertionError):
        _finds_evidence(sample, pruned, lambda view, own: stub(view, own.m))


def _page(seed: int, inked: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A white page of 20 × 16 cells with glyphs in some of its lines, and which cells have one."""
    generator = torch.Generator().manual_seed(seed)
    glyphs = torch.rand(30, 12, generator=generator)
    ink = torch.zeros(20, 16, dtype=torch.bool)
    ink[1 : 1 + int(18 * inked), 2:14] = torch.rand(int(18 * inked), 12, generator=generator) < 0.8
    ink[2::3] = False
    chosen = glyphs[torch.randint(0, 30, (320,), generator=generator)]
    return torch.where(ink.flatten()[:, None], chosen, torch.ones(12)), ink.flatten()


def _reads_pages(reduce):
    """Every glyph is kept that does not equal its neighbour, and paper is not."""
    shares = []
    for inked in (0.1, 0.4, 0.7, 1.0):
        share = []
        for seed in range(4):
            cells, ink = _page(seed, inked)
            view = _view(cells, Layout.grid(20, 16))
            kept = reduce(view).kept[0]
            twin = torch.zeros(20, 16, dtype=torch.bool)
            grid = cells.unflatten(0, (20, 16))
            twin[:, 1:] |= (grid[:, 1:] == grid[:, :-1]).all(-1)
            twin[1:] |= (grid[1:] == grid[:-1]).all(-1)
            assert kept[ink & ~twin.flatten()].all()
            share.append(kept.float().mean().item())
        shares.append(sum(share) / 4)
    assert shares == sorted(shares)
    assert shares[0] < 0.25 < shares[-1]


@pytest.mark.system("pixelprune", "directional")
def test_what_is_kept_of_a_page_grows_with_its_ink_and_no_glyph_is_lost():
    _reads_pages(PixelPrune().reduce)


@pytest.mark.parametrize("stub", [first_k, uniform, at_random])
def test_a_stub_loses_glyphs(stub):
    with pytest.raises(AssertionError):
        _reads_pages(lambda view: stub(view, PixelPrune().reduce(view).m))
