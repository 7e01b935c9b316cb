"""VisionZip (arXiv 2412.04467): keep the dominant tokens of the vision encoder, and merge the others into a few.

Looks at: the [CLS] row and the keys of the feature block. Cost: O(V · C · D_head).

A tile gives D dominant tokens ([CLS] itself and the D − 1 patches that it attends to) and C contextual ones: evenly
spaced leftovers, to each of which the mean of those leftovers is added whose keys are most similar to its own. The sum
of target and mean is the released behaviour; `merge="mean"` takes the mean of the whole cluster instead.
Order: [CLS] and dominant patches of the thumbnail (or only tile), dominant patches of the other tiles row by row over
the whole mosaic, the [CLS] of these tiles, contextual tokens tile by tile. Newlines are dropped.
Departs from the paper: nothing.
Departs from the released code: the budget is that of the item, split equally over its tiles and never above its content
tokens; `dominant` and `contextual` as ints are counts of one tile, as published. The code puts the contextual tokens of
the thumbnail before the other tiles (`order=thumbnail`); by default all contextual tokens stand together, as for one
tile. Positions are kept by default, as for all methods of winnow; the code numbers them anew.
"""

from typing import Annotated, Literal

import winnow.contract as wn
from winnow.parts.contextual import of_tower
from winnow.parts.tower import tower_of


@wn.register("visionzip")
class VisionZip(wn.Method):
    """Keep the tokens that [CLS] attends to, and merge the rest into contextual tokens.

    Args:
        keep: all outputs of the item: dominant, [CLS] included, and contextual.
        contextual: share of them that is contextual (10 of 64); with `dominant`, their number in a tile.
        dominant: with `contextual`, the number in a tile, [CLS] included; then `keep` is not used.
        merge: `sum` of target and mean, or `mean` of the cluster.
        order: what comes first, all `dominant` tokens or all tokens of the `thumbnail`.
        row: the attention that ranks patches.
        keys: what contextual tokens are merged by.
    """

    keep: wn.Budget = wn.Budget(64)
    contextual: Annotated[float, wn.Between(0)] = 0.15625
    dominant: Annotated[int, wn.Between(1)] | None = None
    merge: Literal["sum", "mean"] = "sum"
    order: Literal["dominant", "thumbnail"] = "dominant"
    row: wn.VisionAttention = wn.VisionAttention()
    keys: wn.VisionKeys = wn.VisionKeys()

    at = "features"
    separators = "drop"
    identity = None
    released = {"order": "thumbnail", "positions": "compact"}

    def check(self) -> None:
        if self.contextual >= 1 if self.dominant is None else not isinstance(self.contextual, int):
            raise wn.WinnowError(f"visionzip: contextual={self.contextual!r}; allowed: below 1; with dominant an int.")

    def at_budget(self, budget, content: int):
        """Another budget at the same share of contextual tokens."""
        return self.replace(keep=budget, contextual=self._share(), dominant=None)

    def _share(self) -> float:
        """The share of contextual tokens."""
        return self.contextual if self.dominant is None else self.contextual / (self.dominant + self.contextual)

    def counts(self, patches: tuple[int, ...], n_visual: int) -> tuple[tuple[int, int], ...]:
        """Dominant ([CLS] included) and contextual tokens of each tile."""
        each = 0 if self.dominant is None else self.dominant + int(self.contextual)
        total = min(n_visual, each * len(patches)) if each else self.keep.of(n_visual)
        split = wn.split_evenly(total, [p + 1 for p in patches])
        contextual = [min(max(0, n - 1), int(n * self._share() + 0.5)) for n in split]
        return tuple((n - c, c) for n, c in zip(split, contextual, strict=True))

    def reduce(self, view: wn.View) -> wn.Reduction:
        patches = tuple(map(len, tower_of(view, "visionzip").patches))
        counts, first = self.counts(patches, view.n_visual), self.order == "thumbnail"
        return of_tower(
            view, "visionzip", view[self.row], view[self.keys], counts, merge=self.merge, thumbnail_first=first
        )
