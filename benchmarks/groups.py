"""Which methods compare the tokens of an item with one another, so that their time is not that of a score."""

from winnow.contract import Method

# They compare tokens with one another, beside those that declare a table of pairs.
COMPARE = ("aim", "cdpruner", "covipal", "recoverable-compression", "todre", "visiondrop", "vscan")


def compares(kind: type[Method]) -> bool:
    """Whether a method compares the tokens of an item with one another, and does not only score each of them."""
    return kind.pairwise or kind.slug in COMPARE
