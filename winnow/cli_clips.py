"""Clips on the command line: `clip:SEED`, files that hold one, and the bundled model that answers about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from winnow.cli_options import on_one_thread, opened
from winnow.core.errors import WinnowError
from winnow.models import load as checkpoints
from winnow.models.inputs import model_inputs
from winnow.overlay import Box
from winnow.reference import video as reference
from winnow.reference.video import ClipProcessor
from winnow.video import Video
from winnow.watch.clip_files import NAME, named_clip
from winnow.watch.clip_inputs import BUNDLED, CHECKPOINT, clip_inputs
from winnow.world.clips import FPS, Clip, Sight, stretches

FOREIGN = (
    "the bundled video reference model knows only winnow's own drawn clips, and its answer to a video means nothing; "
    f"use a real checkpoint: --model {CHECKPOINT}"
)


@dataclass(frozen=True)
class Known:
    """A drawn clip, and the question that is asked about it.

    Attributes:
        truth: the right answer, where the clip knows the question.
        sights: where in which frames the answer is seen.
    """

    drawn: Clip
    question: str
    truth: str | None
    sights: tuple[Sight, ...]

    @staticmethod
    def of(drawn: Clip, asked: str) -> Known:
        """A question; "" is the first one that the clip knows."""
        found = next((q for q in drawn.questions if asked in ("", q.text)), None)
        if found is None:
            return Known(drawn, asked, None, ())
        return Known(drawn, found.text, found.answer, found.evidence)

    def recall(self, item: Any, video: Video) -> float | None:
        """The share of the tokens on the evidence that are left; None without evidence, or if frames were left out."""
        if not self.sights or len(video) != self.drawn.frames:
            return None
        matters = item.layout.covering(stretches(self.sights, self.drawn.side, self.drawn.frames))
        return float(matters[item.kept.numpy()].sum() / max(1, matters.sum()))

    def boxes(self, video: Video) -> dict[int, list[Box]]:
        """The evidence in pixels of a video, by frame."""
        scale = video.frames.shape[2] / self.drawn.side
        place = {number: at for at, number in enumerate(video.sampled.numbers)}
        found: dict[int, list[Box]] = {}
        for frame, box in self.sights:
            if frame in place:
                found.setdefault(place[frame], []).append(
                    (scale * box.x0, scale * box.y0, scale * box.x1, scale * box.y1)
                )
        return found


def is_clip(name: str) -> bool:
    return name.startswith(NAME)


def drawn_video(name: str) -> tuple[Clip, Video]:
    """The clip of `clip:SEED` or `clip:SEED:FRAMES`, and its frames."""
    drawn = named_clip(name)
    return drawn, Video.of(drawn.pixels, fps=FPS)


def inputs_of(model: Any, processor: Any, shown: Any, question: str) -> dict[str, Any]:
    """What `model.generate` takes of a picture or of a video, also of the bundled model."""
    if isinstance(processor, ClipProcessor):
        return clip_inputs(model, processor, shown, question)
    return model_inputs(model, processor, shown, question)


def load_for(films: bool, model: str | None, *, device: str | None, **options: Any) -> tuple[Any, Any]:
    """A model and its processor, as the command line names them.

    Args:
        films: whether the bundled video reference model is asked; else the model that is named, or the one of pictures.
        options: as `winnow.load` takes them.
    """
    if not films:
        return opened(model, device=device, **options)
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if given:
        raise WinnowError(f"{', '.join(given)}: the {BUNDLED} takes --device alone; name a checkpoint with --model.")
    on_one_thread()
    bundled, processor = reference.load()
    return bundled.to(checkpoints.device_of(device)), processor  # type: ignore[arg-type]
