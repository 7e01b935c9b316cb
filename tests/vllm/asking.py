"""Questions, the answers of an engine, and those of the library under the same plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from checkpoints import CHECKPOINTS, model_and_processor
from PIL import Image

import winnow
from winnow.models.families import family_of
from winnow.video import Video

TOKENS = 10


@dataclass(frozen=True)
class Film:
    """A drawn video.

    Attributes:
        fps: frames in a second, all of which are given.
    """

    seed: int
    frames: int
    width: int
    height: int
    fps: float

    @property
    def pixels(self) -> np.ndarray:
        """`[frames, height, width, 3]` one picture that turns into another."""
        first, last = (np.asarray(picture(self.seed + own, self.width, self.height), np.float32) for own in (0, 100))
        return np.stack([first + (last - first) * i / self.frames for i in range(self.frames)]).astype(np.uint8)

    @property
    def about(self) -> dict[str, Any]:
        return {
            "total_num_frames": self.frames,
            "fps": self.fps,
            "duration": self.frames / self.fps,
            "frames_indices": list(range(self.frames)),
            "video_backend": "opencv",
        }


@dataclass(frozen=True)
class Case:
    """A prompt with pictures, each given by its seed and size, and videos.

    Attributes:
        words: of the prompt; `@` stands for a picture, `#` for a video.
        pictures: seed, width and height of each.
        plan: that the request names; None: compression is off.
    """

    words: str
    pictures: tuple[tuple[int, int, int], ...]
    plan: str | None
    films: tuple[Film, ...] = ()

    def prompt(self, name: str) -> str:
        made = CHECKPOINTS[name]
        return f"user {self.words.replace('@', made.image).replace('#', made.video)} assistant :"

    @property
    def images(self) -> list[Image.Image]:
        return [picture(*own) for own in self.pictures]

    @property
    def named(self) -> list[Video]:
        """The videos as the library is told of them where frames are pictures; a picture is a video of one frame."""
        films, images = iter(self.films), iter(self.images)
        found = []
        for word in self.words.split():
            if word == "#":
                film = next(films)
                found.append(Video.of(film.pixels, fps=film.fps))
            elif word == "@":
                found.append(Video.of(np.asarray(next(images))[None], fps=1))
        return found

    def request(self, name: str, **more: Any) -> dict[str, Any]:
        """The request of vLLM's engine."""
        winnow = {"plan": self.plan} | more if self.plan or more else False
        shown: dict[str, Any] = {"image": self.images} if self.pictures else {}
        if self.films:
            shown["video"] = [(film.pixels, film.about | {"do_sample_frames": False}) for film in self.films]
        return {"prompt": self.prompt(name), "multi_modal_data": shown, "mm_processor_kwargs": {"winnow": winnow}}


def picture(seed: int, width: int, height: int) -> Image.Image:
    """A picture of coloured areas."""
    small = np.random.RandomState(seed).randint(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def answers(engine: Any, requests: Sequence[dict[str, Any]]) -> list[tuple[list[int], int]]:
    """What the engine says to requests that it is given together, and how many tokens it reads of each."""
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    outputs = engine.generate(list(requests), settings, use_tqdm=False)
    return [(list(own.outputs[0].token_ids), len(own.prompt_token_ids)) for own in outputs]


def cached(engine: Any, request: dict[str, Any]) -> int:
    """How many tokens of a request were read before."""
    from vllm import SamplingParams

    return engine.generate([request], SamplingParams(max_tokens=1), use_tqdm=False)[0].num_cached_tokens


class Library:
    """The library on the same checkpoint."""

    def __init__(self, name: str) -> None:
        self.name, self.made = name, CHECKPOINTS[name]
        self.model, self.processor = model_and_processor(name)
        family = family_of(self.model)
        self.mrope, self.short, self.apart = family.mrope, family.short, family.frames_apart

    def inputs(self, case: Case) -> Any:
        images: Any = [case.images] if self.made.nested else case.images
        shown: dict[str, Any] = {"images": images} if case.pictures else {}
        if case.films:
            shown |= {
                "videos": [film.pixels for film in case.films],
                "video_metadata": [film.about for film in case.films],
                "do_sample_frames": False,
            }
        return self.processor(text=[case.prompt(self.name)], return_tensors="pt", **shown)

    @torch.no_grad()
    def answer(self, case: Case) -> tuple[list[int], int]:
        """What the library says under the same plan, and how many tokens it reads.

        vLLM numbers the tokens of a prompt without gaps where positions have one axis. The library does so under
        `positions=compact`, which it has for language models that attend to everything before; for the others its
        shortened inputs are given to the plain model without their positions, which then numbers them.
        """
        if self.apart and case.films and case.plan:
            return self.said(self.rows(case))
        plan, inputs = case.plan or "full", self.inputs(case)
        keeps = self.mrope or not self.short or case.plan is None
        prepared = winnow.prepare(self.model, inputs, plan, positions="keep" if keeps else "compact")
        given = prepared.inputs
        if self.mrope or not keeps:
            handle = winnow.compress(self.model, plan, positions="keep" if keeps else "compact")
            given = dict(inputs)
        else:
            handle = None
            # On CPUs vLLM has no attention in which a picture's tokens see each other (Gemma 3): they see those before.
            for name in ("position_ids", "prefill_chunk_size", "token_type_ids"):
                given.pop(name, None)
        said = self.model.generate(**given, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=3)
        if handle is not None:
            handle.detach()
        return said[0, given["input_ids"].shape[1] :].tolist(), prepared.sizes[0]

    @torch.no_grad()
    def said(self, rows: torch.Tensor) -> tuple[list[int], int]:
        """What the plain model says to what its language model is given, `[1, m, D]`, and how many rows those are."""
        said = self.model.generate(
            inputs_embeds=rows, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=3
        )
        return said[0].tolist(), rows.shape[1]

    @torch.no_grad()
    def rows(self, case: Case) -> torch.Tensor:
        """`[1, m, D]` what the layers of the language model are given where the library is told of videos.

        `winnow.prepare` cannot be told.
        """
        seen: list[torch.Tensor] = []
        first = self.model.get_decoder().layers[0]
        hook = first.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        videos = case.named if case.films else None
        with winnow.compress(self.model, case.plan) as handle, handle.using(handle.plan, videos=videos):
            self.model(**self.inputs(case))
        hook.remove()
        (rows,) = seen
        return rows
