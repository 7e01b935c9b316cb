"""Recipes of FitPrune: how many image tokens each layer of the LM drops."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How many of some number of tokens leave behind each layer.

    Attributes:
        of: the number for which it was fitted.
        drops: what each layer of the model that it was fitted on drops.
    """

    of: int
    drops: tuple[int, ...]

    @property
    def ends_at(self) -> float:
        """The share that is left behind the last layer."""
        return 1 - sum(self.drops) / self.of

    def cuts(self, depth: int) -> dict[int, int]:
        """The layers of an LM before which tokens leave, and how many layers of the recipe are done there."""
        done = [layer * len(self.drops) // depth for layer in range(depth)]
        return {k: done[k] for k in range(1, depth) if any(self.drops[done[k - 1] : done[k]])}

    def left(self, n: int, done: int) -> int:
        """What is left of n tokens: each layer drops its share, rounded down."""
        return n - sum(drop * n // self.of for drop in self.drops[:done])

    def stretched(self, n: int, done: int, last: int, end: int) -> int:
        """The same with all drops larger or smaller alike, so that `end` are left when `last` layers are done."""
        return n - (n - end) * sum(self.drops[:done]) // sum(self.drops[:last])


def _read(of: int, rows: dict[int, str]) -> dict[int, Recipe]:
    return {saved: Recipe(of, tuple(map(int, row.split()))) for saved, row in rows.items()}


# By the tokens of the pictures that they were fitted on, and the percentage of FLOPs that they save; 32 layers.
RECIPES = {
    576: _read(576, {
        10: "0 0 1 2 1 0 1 4 5 5 11 4 2 2 0 0 1 1 2 4 2 10 1 1 1 2 1 1 0 1 0 0",
        20: "0 0 3 3 1 1 4 16 14 15 24 4 2 3 2 0 6 0 5 13 4 19 2 1 1 1 1 1 2 1 0 0",
        30: "0 0 7 6 4 5 16 40 24 21 24 4 2 3 4 0 16 0 11 26 6 32 3 1 0 1 2 2 4 0 0 0",
        40: "0 1 21 13 14 11 41 53 29 15 14 5 1 4 5 1 26 1 13 28 6 27 2 1 0 0 1 1 2 0 0 0",
        50: "3 7 49 24 29 17 59 41 26 8 10 6 2 5 7 2 30 3 13 27 5 23 2 1 0 0 1 1 2 0 0 0",
        55: "6 17 69 31 34 19 59 30 23 6 8 7 2 5 8 2 29 4 12 25 4 19 2 1 0 0 1 0 1 0 0 0",
        60: "14 33 89 36 36 20 55 21 18 4 7 5 2 5 7 4 26 5 11 24 4 18 2 1 0 0 1 0 1 0 0 0",
        70: "48 79 118 41 33 17 36 9 9 2 3 2 1 3 4 8 18 7 8 20 4 13 2 1 0 0 1 0 1 0 0 0",
        80: "128 127 118 35 26 8 13 3 2 1 0 0 0 2 1 8 7 8 5 11 2 6 1 1 0 0 0 1 0 0 0 0",
        90: "262 153 80 19 13 1 2 0 0 0 0 0 0 0 0 1 1 2 1 2 0 1 0 0 0 0 0 1 0 0 0 0",
    }),
    2880: _read(2880, {
        40: "7 73 162 124 119 148 131 151 105 26 30 17 5 19 44 10 73 60 67 61 32 39 0 3 1 5 0 0 0 0 0 0",
        60: "98 313 279 218 201 221 167 132 63 12 11 5 1 8 26 13 83 57 56 58 24 42 0 2 1 5 0 0 0 0 0 0",
    }),
}  # fmt: skip
