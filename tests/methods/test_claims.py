"""The claims that `tools/findings.py` measures: which methods have some, and when one holds."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.methods.claims import CLAIMS, TWINNED, blind
from tests.methods.claims.finding import compared, nearer
from tests.methods.directional import Gap
from winnow.core.registry import METHODS_DIR, built_in

PAGE = METHODS_DIR.parent.parent / "docs" / "findings.md"
LESS, MORE = np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.7, 0.6])


def test_every_method_has_a_claim_and_the_page_names_it():
    # Ahead of the processor there are no tokens of the reference model, which reads one picture at one size.
    of_pictures = {slug for slug, entry in built_in().items() if not entry.of_cache and not entry.of_input}
    assert not set(CLAIMS) & set(TWINNED)
    assert {*CLAIMS, *TWINNED} == of_pictures
    named = {row.split(",")[0] for row in re.findall(r"^\| ([a-z0-9-]+(?:,[^|]*)?) \|", PAGE.read_text(), re.M)}
    assert of_pictures <= named


@pytest.mark.parametrize(("claimed", "first", "second"), [(compared, MORE, LESS), (nearer, LESS, MORE)])
def test_a_claim_holds_on_its_side_of_zero(claimed, first, second):
    assert claimed("m", "c", "w", ("a", "b"), first, second).verdict == "holds"
    assert claimed("m", "c", "w", ("a", "b"), second, first).verdict == "contradicted"
    assert claimed("m", "c", "w", ("a", "b"), first, first).verdict == "open"
    assert "a 0.600, b 0.200" in compared("m", "c", "w", ("a", "b"), MORE, LESS).line()[-1]


def test_below_is_who_lies_below_with_the_whole_interval():
    worse, open_, better = (Gap(x, x - 0.1, x + 0.1) for x in (-0.2, -0.05, 0.2))
    names = list(blind.BLIND)
    rows = [
        blind.Beside("worse", 32, 32, 0.1, dict.fromkeys(names, worse), 0.1, dict.fromkeys(names, better)),
        blind.Beside("open", 32, 32, 0.1, dict.fromkeys(names, open_), 0.1, dict.fromkeys(names, open_)),
    ]
    lines = blind.below(rows)
    assert [line.rsplit(": ", 1)[1] for line in lines] == ["worse", "none"] * 2
    assert all(len(row.line()) == len(blind.HEADS) for row in rows)
