"""TS-LLaVA (arXiv 2411.11066): tokens at equal distances over all frames, and a thumbnail of a few frames whole.

Looks at: nothing. Cost: none, beside one more frame for the tower.

The tokens of all frames are one list, frame by frame; those at i (N − 1) / (S − 1) stay, the first and the last among
them. How far apart they are is no multiple of a row, so that what is taken drifts over the places of the frames. The
thumbnail is made before the tower (`winnow.with_thumbnail`): six frames in a picture of the size of one. It is the
last frame of the video (`thumbnail=last`: behind what is sampled, as in the code's mode V2), the first one (`first`, as
in Y2), or a picture of its own in the prompt (`apart`), which stays whole while it has no more tokens than `keep`.
Departs from the paper: there is nothing that is known.
Departs from the released code: indices are exact; the code takes those of a linspace in fp32, one or two of which are
another neighbour of a half (`spacing=float`). It fails where there are fewer tokens than are asked for; here all stay.
Positions are kept by default, as for all methods of winnow; the code numbers them anew.
"""

from typing import Literal

import torch

import winnow.contract as wn
from winnow.parts.evenly import evenly
from winnow.parts.frames import frame_slots


@wn.register("ts-llava")
class TSLLaVA(wn.Method):
    """Keep tokens at equal distances over all frames, and a thumbnail whole.

    Args:
        keep: content tokens of the item, those of a thumbnail among its frames included.
        thumbnail: where the thumbnail is. As a frame of the item it stays whole, and is thinned only where it alone has
            more tokens than `keep`.
        spacing: whether indices are exact, or those of the code.
    """

    keep: wn.Budget = wn.Budget(2880)
    thumbnail: Literal["apart", "last", "first"] = "apart"
    spacing: Literal["exact", "float"] = "exact"

    released = {"thumbnail": "apart", "spacing": "float", "positions": "compact"}
    across_frames = True

    def reduce(self, view: wn.View) -> wn.Reduction:
        count = min(self.keep.of(view), view.n)
        frames, slot = (1, view.ids) if self.thumbnail == "apart" else frame_slots(view, "ts-llava")
        if frames == 1:
            return wn.Reduction.select(self._of(view.n, count, view.ids.device).expand(view.b, -1), view.n)
        places = view.n // frames
        whole, order = min(places, count), slot.argsort(1)
        own = slice(0, places) if self.thumbnail == "first" else slice(view.n - places, view.n)
        others = torch.cat([order[:, : own.start], order[:, own.stop :]], 1)
        parts = [(order[:, own], whole), (others, count - whole)]
        chosen = [rows[:, self._of(rows.shape[1], size, rows.device)] for rows, size in parts if size]
        return wn.Reduction.select(torch.cat(chosen, 1).sort(1).values, view.n)

    def _of(self, n: int, count: int, device: torch.device) -> torch.Tensor:
        return evenly(n, count, device, floats=self.spacing == "float")
