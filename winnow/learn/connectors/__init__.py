"""Training of learned connectors on the frozen video reference model: a module for each, named after its slug.

A connector is a method that makes new tokens of a clip's tokens at `projected`. To have one trained by `winnow train
SLUG`, write `winnow/learn/connectors/SLUG.py` (dashes become underscores) with

    class Recipe(recipe.Recipe):
        slug = "SLUG"
        settings = {"keep": 18}      # of the method, for which its weights are
        steps, batch, rate = 300, 12, 1e-3

That is all where the method's own step is differentiable. The harness makes the view that the engine would make, with
the signals of the question that the step lists, and takes the answer of the step: the tokens of an `Emit`, or what a
`Reduction` makes of those of the view, each at the position of its representative. Override what is different:

    make()                the module; default: what the method's `build` makes
    sizes                 of the module, if `make` takes any: they are written beside the weights
    start(module)         what training begins with, where the Glorot start of `untrained` is not meant
    output(module, view)  an `Output` for the b rows of a view: tokens `[b, M, D]`, places `[b, M]`, `there`, and extra
                          losses by name, with their weights in them. `module.training` tells a training step from an
                          answer
    phases(records)       other phases than one on the answers; `answers(module, rows)` is the loss of one batch
    records, frozen       what was recorded of the clips, and the model, for losses of another kind

Training runs the frozen language model behind these tokens, with the cross-entropy of the answers. A connector that
reads no question has several questions behind each clip; one that does, a row for each question. Weights are found at
winnow/reference/video/learned/SLUG.safetensors by `winnow.parts.learned`, and
`python -m winnow.learn.connectors.table SLUG` writes their row of docs/learned-video.md.
"""

from __future__ import annotations

from pathlib import Path

SHARED = {"__init__", "clips", "compared", "fit", "output", "recipe", "table"}


def trainable() -> tuple[str, ...]:
    """The slugs that `winnow train` knows."""
    stems = {path.stem for path in Path(__file__).parent.glob("*.py")} - SHARED
    return tuple(sorted(stem.replace("_", "-") for stem in stems))
