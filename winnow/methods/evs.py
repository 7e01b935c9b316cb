"""EVS (arXiv 2510.14624): keep the tokens that differ most from the token at their place in the frame before.

Looks at: the projected tokens only. Cost: O(V · D).

The first frame comes first: nothing lies before it. Of all later tokens those with the lowest cosine to their place in
the frame before stay, whichever frames they are of; the earlier one among equals. A place whose token an earlier method
has removed differs from everything. How many stay follows from the shape of the video alone.
Departs from the paper: by default the item keeps exactly its budget, also where that is less than a frame: then an even
part of the first frame stays, as of a picture, which is one frame. `each` is not in the paper.
Departs from the released code: one frame at least stays whole there (`exact=false`), so that a picture is left as it
is, and the count is cut off from a float. Cosines are taken in fp32. Positions are those of the model; in the code text
goes on behind the width of a frame, also where a frame is higher, and without positions in a grid tokens are numbered
anew.
"""

import torch
from jaxtyping import Float

import winnow.contract as wn
from winnow.parts.changed import NEW, changed
from winnow.parts.frames import frame_grid, frame_of


@wn.register("evs")
class EVS(wn.Method):
    """Keep the first frame, and what changes from frame to frame.

    Args:
        keep: content tokens of the item; as a share, one less the pruning rate.
        exact: whether the item keeps exactly its budget, or at least a whole frame.
        each: tokens of every frame that stay before others of later frames, so that no second takes the whole budget.
    """

    keep: wn.Budget = wn.Budget(0.3)
    exact: bool = True
    each: wn.Count = 0

    rounding = "floor"
    released = {"exact": False, "each": 0, "positions": "keep"}
    across_frames = True

    def score(self, view: wn.View) -> Float[torch.Tensor, "b n"]:
        return changed(view)

    def reduce(self, view: wn.View) -> wn.Reduction:
        score = self.score(view)
        if self.each:
            frame = frame_of(view)
            own = wn.rank_in_tile(wn.comparable(score), frame) < self.each
            score = torch.where(own & (frame > 0), score + NEW, score)
        return wn.top_k(score, self.count(view), view)

    def count(self, view: wn.View) -> int:
        """How many tokens the item keeps."""
        if self.exact:
            return self.keep.of(view)
        total, places = view.n_visual, frame_grid(view.layout, view.ids.device).places
        if self.keep.is_count:
            return max(places, self.keep.of(view))
        pruned = round(1 - float(self.keep.share(total)), 12)
        return max(places, int(total * (1 - pruned)))
