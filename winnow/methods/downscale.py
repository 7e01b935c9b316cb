"""Downscaling as Qwen2-VL does it (arXiv 2409.12191): pictures become as many tokens as there may be, and no more.

Looks at: the height and the width of the picture. Cost: one bicubic resize ahead of the processor, O(H · W).

Models that take pictures at their own resolution spend tokens by area, so that a smaller picture is the plain way to
spend fewer, ahead of everything that a vision tower costs. Both sides are scaled by one number and cut down to whole
tokens, as the image processor does with a picture above its `max_pixels`. A count is never exceeded, and how many
tokens there will be is known from the size alone; a square picture at keep=32 becomes 5 × 5. VisionThink asks about a
picture of a quarter of the tokens first, which is the default here, and shows the whole one where its policy asks to.
Departs from the paper: there the limit is one of the processor, for all pictures alike; here it may be a share of what
each picture would become, and it is part of a plan, whose later methods act on the tokens that are left.
Departs from the released code: its limit is a setting of the processor and no method of its own, so there are no
released settings. A picture is scaled to its last size by Pillow, and the processor has nothing left to scale.
"""

import winnow.contract as wn
from winnow.parts.whole_tokens import grid_within, nearest_grid


@wn.register("downscale")
class Downscale(wn.Method):
    """Scale each picture down to at most so many tokens, at its aspect.

    Args:
        keep: tokens that a picture may become, or their share of those that it would become as it is. A share of a
            small picture is no less than what the processor makes of any; a count below that is refused.
    """

    keep: wn.Budget = wn.Budget("25%")

    at = "pixels"
    modalities = ("image",)

    def steps(self, info: wn.ModelInfo):
        if info.token_side is None:
            raise wn.UnsupportedError(
                "its processor brings pictures to one size, or to tiles of one size, so that a smaller picture saves "
                "nothing that can be promised; use a method that acts on tokens, or a model that takes pictures at "
                "their own resolution, such as Qwen2.5-VL"
            )
        return (wn.Step(wn.Point(self.at), self.scale),)

    def scale(self, view: wn.PictureView, state: wn.State) -> wn.Action:
        """The size at which the whole picture enters."""
        keep, side = self.keep.of(view), view.side or 0
        if not self.keep.is_count:
            keep = max(keep, view.least)
        if keep >= view.n_visual:
            return wn.Observe()
        rows, columns = grid_within(*view.size, keep * side**2, side)
        # Of a strip one side is a single token, whatever its aspect says, and the other has to do with what there is.
        rows, columns = min(rows, keep), min(columns, keep)
        if rows * columns < view.least:
            rows, columns = nearest_grid(*view.size, view.least, keep) or (rows, columns)
        return wn.Recut(size=(rows * side, columns * side))
