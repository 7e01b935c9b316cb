"""Why an answer of the bundled reference model may mean nothing: it knows one world and about three hundred words."""

from __future__ import annotations

from winnow.reference import unknown_words

CHECKPOINT = "llava-hf/llava-1.5-7b-hf"  # what a picture that the bundled model does not know is for
FOREIGN = (
    "the bundled reference model knows only winnow's own world of drawn scenes, and its answer to this picture means "
    f"nothing; use a real checkpoint: --model {CHECKPOINT}"
)


def doubts(question: str, from_world: bool) -> list[str]:
    """Warnings for a person who asks the bundled model.

    Args:
        from_world: whether the picture is a scene of winnow's world.
    """
    unknown = unknown_words(question)
    found = [] if from_world else [FOREIGN]
    if unknown and from_world:
        found.append(
            f"the bundled reference model does not know the words {', '.join(unknown)}, so its answer means nothing; "
            "winnow world show draws scenes with the questions that it does know."
        )
    return found
