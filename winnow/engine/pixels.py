"""The point `pixels`: steps that say which part of a picture enters and at what size, before a processor sees it."""

from dataclasses import dataclass, replace
from operator import index
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from winnow.core.entered import Entered
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.picture_view import PictureView
from winnow.core.step import Observe, Recut, State
from winnow.engine.bound_plan import BoundPlan
from winnow.media import MediaError, check_size
from winnow.models.picture_sizes import PictureSizes

SIDE = 224  # pixels of the longer side of what steps see: things in it can be told apart
MARK = "winnow"  # in the `info` of a picture that a step has cut or scaled


@dataclass(frozen=True, eq=False)
class Given:
    """A picture of a request.

    Attributes:
        source: as the caller gave it.
        image: the same, opened: upright, RGB.
    """

    source: Any
    image: Image.Image


def small(image: Image.Image, side: int) -> UInt8[np.ndarray, "h w 3"]:
    """A copy with at most `side` pixels on its longer side, each pixel the mean of what it covers."""
    scale = min(1.0, side / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return np.array(image.resize(size, Image.Resampling.BOX))


def cut_picture(
    plan: BoundPlan, given: Given, entered: Entered, sizes: PictureSizes | None
) -> tuple[Any, Image.Image, Entered]:
    """Run the plan's steps at `pixels` on one picture.

    Args:
        sizes: of the model's processor; None where they are not known.

    Returns:
        what the processor is to be given, which is the caller's own object where nothing changed, the same opened, and
        how it entered.
    """
    image, done = given.image, list(entered.steps)
    box: tuple[float, float, float, float] = entered.box
    states: dict[int, State] = {}
    for number, step in plan.pixels:
        slug = plan.resolved.methods[number].slug
        view = _view(plan, number, image, sizes)
        action, states[number] = step.act(view, states.get(number, State()))
        if isinstance(action, Observe):
            continue
        if not isinstance(action, Recut):
            raise UnsupportedError(
                f"{slug} asked for {type(action).__name__} at {step.at}: pictures are cut and scaled by Recut."
            )
        part, size = _checked(action, image, slug)
        if part == (0, 0, *image.size) and size == (image.height, image.width):
            continue
        box = _within(box, part, image)
        image = image.crop(part).resize(size[::-1], Image.Resampling.BICUBIC)
        done.append((str(step.at), slug, Recut(part, size)))
        _check_kept(image, sizes, slug)
    untouched = image is given.image
    if not untouched:
        image.info[MARK] = plan.plan.key
    # A picture that its file says to turn is turned by some processors and not by others.
    turned = untouched and isinstance(given.source, Image.Image) and given.source.size != image.size
    grid = None if sizes is None or turned else sizes.grid(image.height, image.width)
    full = None if sizes is None or turned else sizes.grid(*entered.size)
    about = replace(entered, box=box, scaled=(image.height, image.width), grid=grid, full=full, steps=tuple(done))
    return (given.source if untouched else image), image, about


def _view(plan: BoundPlan, number: int, image: Image.Image, sizes: PictureSizes | None) -> PictureView:
    pixels: Tensor = torch.from_numpy(small(image, SIDE))[None]
    size = image.height, image.width
    known: dict[str, Any] = {}
    if sizes is not None:
        rows, columns = sizes.grid(*size)
        known = {"side": sizes.side, "tokens": rows * columns, "least": sizes.fewest}
    return PictureView(pixels, size, **known, seed=plan.plan.seed, module=plan.modules.get(number))


def _checked(action: Recut, image: Image.Image, slug: str) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """The box and the size of a cut, as whole numbers, if they can be had of this picture."""
    given = f"{slug} cut {action} out of a picture of {image.width} × {image.height} pixels"
    box = _whole((0, 0, *image.size) if action.box is None else action.box, 4)
    if box is None or not (0 <= box[0] < box[2] <= image.width and 0 <= box[1] < box[3] <= image.height):
        raise WinnowError(f"{given}; a box is left, top, right, bottom in whole pixels of it, and not empty.")
    size = _whole((box[3] - box[1], box[2] - box[0]) if action.size is None else action.size, 2)
    if size is None or min(size) < 1:
        raise WinnowError(f"{given}; a size is height and width in whole pixels, each at least 1.")
    try:
        check_size(size[1], size[0])
    except MediaError as error:
        problem = str(error)
    else:
        return box, size  # type: ignore[return-value]
    raise WinnowError(f"{given}, which is beyond what is allowed: {problem}.")


def _whole(numbers: Any, count: int) -> tuple[int, ...] | None:
    try:
        found = tuple(index(number) for number in numbers)
    except TypeError:
        return None
    return found if len(found) == count else None


def _within(
    box: tuple[float, float, float, float], part: tuple[int, int, int, int], image: Image.Image
) -> tuple[float, float, float, float]:
    """A part of what is left, in pixels of the picture that was given."""
    wide, high = (box[2] - box[0]) / image.width, (box[3] - box[1]) / image.height
    left, top, right, bottom = part
    return box[0] + left * wide, box[1] + top * high, box[0] + right * wide, box[1] + bottom * high


def _check_kept(image: Image.Image, sizes: PictureSizes | None, slug: str) -> None:
    """Refuse a size in whole tokens that the processor would change: it is not what the step has promised."""
    if sizes is None or image.height % sizes.side or image.width % sizes.side:
        return
    rows, columns = image.height // sizes.side, image.width // sizes.side
    if sizes.grid(image.height, image.width) != (rows, columns):
        raise WinnowError(
            f"{slug} scaled a picture to {image.width} × {image.height} pixels, {rows} × {columns} tokens, and the "
            f"processor takes {sizes.least} to {sizes.most} pixels: it would scale the picture again. Ask for "
            f"{sizes.fewest} to {sizes.most // sizes.side**2} tokens, or set the processor's size "
            "(shortest_edge, longest_edge)."
        )
