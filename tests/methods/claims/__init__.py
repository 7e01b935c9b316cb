"""What papers claim of their methods, measured on the sample of `tests/methods/directional.py`.

Each method has a function that yields a row for each of its claims, in the file of what it looks at; `twinned` holds
those that a second model was asked too. `tools/findings.py` runs them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.methods.directional import Sample
from winnow.core.registry import built_in

from . import blind, clips, connectors, crops, encoder, language, learned, question, sounds, tower, windows
from .finding import Finding
from .twinned import TWINNED, twinned

__all__ = ["CLAIMS", "TWINNED", "Claims", "Finding", "blind", "twinned"]

Claims = Callable[[Sample, Sample], Iterator[Finding]]  # the sample, and the same with halves exchanged

GROUPS = (encoder, tower, question, crops, language, learned, clips, connectors, sounds, windows)
CLAIMS: dict[str, Claims] = {
    slug: claims for group in GROUPS for slug, claims in group.CLAIMS.items() if slug in built_in()
}
