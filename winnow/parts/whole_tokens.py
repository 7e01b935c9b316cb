"""Sizes of pictures whose sides are whole tokens."""

import math


def grid_within(height: int, width: int, pixels: int, side: int) -> tuple[int, int]:
    """Rows and columns of tokens that fit into a number of pixels, at the aspect of a picture.

    The rule by which Qwen2-VL's image processor brings a picture under its `max_pixels`: both sides are scaled by one
    number and cut down to whole tokens, of which there is at least one.

    Args:
        height, width: of the picture.
        side: pixels of one side of a token.
    """
    by = math.sqrt(height * width / pixels)
    return max(1, math.floor(height / by / side)), max(1, math.floor(width / by / side))


def nearest_grid(height: int, width: int, least: int, most: int) -> tuple[int, int] | None:
    """Rows and columns of `least` to `most` tokens whose aspect is nearest to a picture's; None where there are none.

    Of grids that are equally near, the one of most tokens.
    """
    wanted, found = math.log(width / height), []
    for rows in range(1, most + 1):
        fewest, greatest = -(-least // rows), most // rows
        if fewest <= greatest:
            columns = min(max(round(rows * width / height), fewest), greatest)
            found.append((abs(math.log(columns / rows) - wanted), -rows * columns, rows, columns))
    return min(found)[2:] if found else None
