"""Measure on the reference model what papers claim of their methods, and write the page of what was found.

    python tools/findings.py [METHOD…]        print the rows of these methods, or the page
    python tools/findings.py write [MODEL]    docs/findings.md

MODEL is the folder of a second model, on which the first table is repeated: what holds on one training alone says
little. Without it the page keeps its first table, which must be of the same weights.
Claims stand in `tests/methods/claims`; numbers come from the sample that the directional tests use as well.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.methods.claims import CLAIMS, TWINNED, Finding, blind, connectors, twinned  # noqa: E402
from tests.methods.directional import SCENES, Sample, opened  # noqa: E402
from winnow import reference  # noqa: E402
from winnow.core.registry import built_in  # noqa: E402
from winnow.learn.markdown import table  # noqa: E402

TARGET = ROOT / "docs" / "findings.md"
BOTH, ALONE, BLIND = "## On two models", "## Shipped model only", "## Beside choices that look at nothing"
HEAD = f"""# Findings

What papers say of their methods or what their argument rests on, measured on the shipped reference model: {SCENES}
questions about details, one for each scene of the test split, 256 visual tokens. Intervals are paired over scenes, at
95 %. A claim **holds** when the interval of the difference lies on its side of zero, is **contradicted** when it lies
on the other side, and is **open** otherwise. The model is small and its world is drawn: what fails here says where not
to take a claim for granted, not that the paper is wrong about its own models. There are many rows, and their intervals
are not corrected for that; which settings became tests was decided on these same scenes. Learned connectors for videos
were asked about clips, on the video reference model, and their intervals are paired over questions.

`python tools/findings.py write` makes this page from `tests/methods/claims`; claims that hold and that separate a
method from blind selections are tests (those marked *directional* in `tests/methods`).
"""
TWIN = """
The column *twin* is the same on the shipped model's twin, whose language model never missed a token in training and
whose tower is the same (see [the card](reference-model.md)). The twin is not shipped: `make twin` trains it anew, and
this page, the card and [the table of pictures](pictures.md) may each be of another run of that training. What is read
off the tower alone differs by the projector at most; where the two disagree on what happens inside the language model,
the claim hangs on how a model was trained.
"""
NOT_REPEATED = """
None of these rows, nor of those in the section below, has been repeated on the twin or on any other model. The first
table shows how much that matters inside the language model: of claims about what its layers attend to, several turn on
the twin. Where no paper's claim can be measured here (speed, other modalities, schedules that are searched for), the
row asks what the method's argument rests on. What reads the question is given the processor, which tells its words from
those that the chat template puts behind it.
"""
BESIDE = f"""
Each method at {blind.BUDGET} of {blind.CONTENT} tokens after its last step. Its answers are compared with those under
blind choices before the language model, of as many tokens as the method has in the mean over layers: what cuts late
reads more, and is held against more. Evidence is compared with what as many blind tokens as are left at last hold; of
merged tokens only the one that stands for the others counts. Cells are differences, *method less blind*. One draw of
random tokens for each scene. What has no budget runs at a setting of its own (pixelprune: a threshold of 0.2).
"""


def weights() -> str:
    digest = hashlib.sha256((reference.path() / "model.safetensors").read_bytes()).hexdigest()[:12]
    return f"Weights: SHA-256 {digest}…"


def told(what: str, since: float) -> None:
    print(f"{time.monotonic() - since:5.0f} s  {what}", file=sys.stderr, flush=True)


def on_two_models(folder: str) -> str:
    """The first section, measured anew on both models."""
    with opened() as both:
        rows = list(twinned(*both))
    with opened(folder) as both:
        twins = list(twinned(*both))
    lines = [row.line(twin) for row, twin in zip(rows, twins, strict=True)]
    return f"{TWIN}\n{table(['method', 'claim', 'here', 'twin', 'measured'], lines)}\n"


def as_it_stands() -> str:
    """The first section of the page, if it is of the weights that are shipped."""
    page = TARGET.read_text(encoding="utf-8")
    if weights() not in page:
        raise SystemExit(
            f"{TARGET.name} is of other weights; say `python tools/findings.py write MODEL` with the twin."
        )
    return page.split(f"{BOTH}\n", 1)[1].split(f"\n{ALONE}\n", 1)[0]


def claims(samples: tuple[Sample, Sample], slugs: Iterable[str], since: float) -> list[Finding]:
    found: list[Finding] = []
    for slug in slugs:
        found += CLAIMS[slug](*samples)
        told(slug, since)
    return found


def shipped_alone(since: float) -> str:
    """The sections of the shipped model, measured anew."""
    with opened(words=True) as both:
        told("the sample", since)
        rows = claims(both, sorted(CLAIMS), since)
        beside = []
        of_pictures = {slug for slug, entry in built_in().items() if not entry.of_sounds} - set(connectors.CLAIMS)
        for slug in sorted(of_pictures):
            beside.append(blind.beside(both[0], slug))
            told(f"{slug} beside blind choices", since)
    return sections([row.line() for row in rows], [row for row in beside if row is not None])


def sections(lines: list[list[str]], beside: list[blind.Beside]) -> str:
    bare = sorted(set(built_in()) - set(CLAIMS) - set(TWINNED))
    missing = f"\nNo claim is measured of: {', '.join(bare)}.\n" if bare else ""
    return (
        f"\n{ALONE}\n{NOT_REPEATED}\n{table(['method', 'claim', 'here', 'measured'], lines)}\n{missing}"
        f"\n{BLIND}\n{BESIDE}\n{table(blind.HEADS, [row.line() for row in beside])}\n"
        f"\nMethods whose interval lies below zero:\n\n" + "\n".join(blind.below(beside)) + "\n"
    )


def main(args: list[str]) -> int:
    since = time.monotonic()
    slugs = [arg for arg in args if arg in CLAIMS]
    if slugs:
        with opened(words=True) as both:
            print(table(["method", "claim", "here", "measured"], [row.line() for row in claims(both, slugs, since)]))
        return 0
    folders = [arg for arg in args if arg != "write"]
    first = on_two_models(folders[0]) if folders else as_it_stands()
    page = f"{HEAD}\n{BOTH}\n{first}{shipped_alone(since)}\n{weights()}\n"
    if "write" in args:
        TARGET.write_text(page, encoding="utf-8")
    else:
        print(page, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
