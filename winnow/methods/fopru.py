"""FoPru (arXiv 2411.14164): keep the patches that get most attention in the vision encoder, or whole rows of them.

Looks at: attention received from all queries, in the feature block; needs no [CLS]. Cost: the attention of one block,
O(V² · D), streamed; then O(V log V).

`strategy=rank` keeps the best tokens of the item, wherever they lie. `strategy=row` adds up the scores of each row of
the grid and keeps the best rows as a whole: of H rows of a tile round(share · H), at least one. The count is then that
of these rows, and a count as budget is taken as the share that it is of the item. In a video a row is one of a frame.
Departs from the paper: what it says of the attention that is read allows several readings; here it is the mean over
heads and over all queries, in the block whose output is projected. With tiles (LLaVA-NeXT) rows are chosen in each
tile, and the newlines of rows that are dropped stay. Positions are kept by default, as for all methods of winnow.
Departs from the released code: no code has been released.
"""

from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Int

import winnow.contract as wn
from winnow.parts.rows import row_sums, rows_of


@wn.register("fopru")
class FoPru(wn.Method):
    """Keep the tokens, or the rows of tokens, that get most attention in the vision encoder.

    Args:
        keep: content tokens of the item; with `row`, the nearest number of whole rows of each tile.
        strategy: `rank` keeps single tokens, `row` whole rows.
        row: the attention that ranks them; `VisionAttention(query=cls)` reads that of [CLS].
    """

    keep: wn.Budget = wn.Budget("25%")
    strategy: Literal["rank", "row"] = "rank"
    row: wn.VisionAttention = wn.VisionAttention(query="all")

    def reduce(self, view: wn.View) -> wn.Reduction:
        score = view[self.row]
        return wn.top_k(score, self.keep.of(view), view) if self.strategy == "rank" else self._whole_rows(score, view)

    def _whole_rows(self, score: torch.Tensor, view: wn.View) -> wn.Reduction:
        rows, share = rows_of(view.layout, view.ids.device), self.keep.share(view.n_visual)
        quota = tuple(max(1, int((2 * share * height + 1) // 2)) for height in rows.heights)
        best = wn.rank_in_tile(row_sums(wn.comparable(score, view), view.ids, rows), rows.tile.expand(view.b, -1))
        kept = (best < _on(quota, view.ids.device)[rows.tile]).gather(1, rows.row[view.ids])
        if view.n < view.layout.n_content or rows.widths is None:
            return wn.Reduction.select(kept)  # the one host read: what an earlier method has left of each row
        count = sum(k * width for k, width in zip(quota, rows.widths, strict=True))
        return wn.Reduction.select(kept, counts=(count,) * view.b)


@lru_cache(maxsize=128)
def _on(quota: tuple[int, ...], device: torch.device) -> Int[torch.Tensor, " t"]:
    return torch.tensor(quota, device=device)
