"""`winnow run`: one question about a picture or a video, with and without compression, and what each answer cost."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from winnow.bench.phases import answer
from winnow.cli_clips import FOREIGN, Known, drawn_video, inputs_of, is_clip
from winnow.core.errors import WinnowError
from winnow.core.plan import Plan
from winnow.core.reduction import Reduction
from winnow.core.registry import method_class
from winnow.core.step import Recut
from winnow.engine.compress import compress
from winnow.media import MediaError, open_image
from winnow.overlay import Box, covered, overlay, panel_size, shown_box
from winnow.reference.doubts import doubts
from winnow.video import Sampling, Video, container_of, open_video
from winnow.video.overlay import MOVING, contact_sheet, film, save_film
from winnow.watch.clip_files import clip_in
from winnow.watch.clip_inputs import check_words
from winnow.world import Scene, scene
from winnow.world.clips import FPS, Clip
from winnow.world.export import scene_in

LONGEST = {".png": 2**31 - 1, ".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383}  # pixels of a side


@dataclass(frozen=True)
class Subject:
    """A picture or a video and a question, with what is known of the answer.

    Attributes:
        name: the picture, as the user gave it.
        image: the picture; of a video its first frame.
        truth: the right answer, where the scene knows it.
        evidence: pixels on which the answer depends.
        bundled: whether the picture is a scene of winnow's world, or the video one of its clips.
        clip: what is known of such a clip.
    """

    name: str
    image: Image.Image
    question: str
    truth: str | None = None
    evidence: tuple[Box, ...] = ()
    bundled: bool = False
    video: Video | None = None
    clip: Known | None = None

    @property
    def shown(self) -> Image.Image | Video:
        """What the model is asked about."""
        return self.image if self.video is None else self.video


def sampling_of(count: int | None, fps: float | None, keyframes: bool) -> Sampling | None:
    """The rule of `--frames`, `--fps` or `--keyframes`, of which at most one is given."""
    rules = [Sampling.count(count)] if count is not None else []
    rules += [Sampling.rate(fps)] if fps is not None else []
    rules += [Sampling.keyframes()] if keyframes else []
    if len(rules) > 1:
        raise WinnowError("--frames, --fps and --keyframes exclude one another: give one of them.")
    return rules[0] if rules else None


def subject(picture: str, question: str | None, sampling: Sampling | None = None, bundled: bool = False) -> Subject:
    """Open a file, or draw the scene of `world:SEED` or the clip of `clip:SEED`, which bring questions of their own.

    Args:
        sampling: of a video; where it is given, a GIF is one.
        bundled: whether the bundled model is asked, which reads two frames a second.
    """
    if picture.startswith("world:") and sampling is not None:
        raise WinnowError(f"{picture} is a picture: --frames, --fps and --keyframes are for videos.")
    if is_clip(picture) or _is_video(picture, sampling):
        if question is not None and not question.strip():
            raise WinnowError(f'What do you want to ask about {picture}? Say winnow run {picture} "QUESTION".')
        return _filmed(picture, (question or "").strip(), sampling, bundled)
    if picture.startswith("world:"):
        seed = picture.removeprefix("world:")
        if not seed.isdecimal():
            raise WinnowError(
                f"A bundled scene is world:SEED with a whole number, for example world:7; got {picture!r}."
            )
        drawn: Scene | None = scene(int(seed), split="test")
        image = drawn.image  # type: ignore[union-attr]
    else:
        image = open_image(picture)
        drawn = scene_in(picture, image)
    asked = (question or "").strip()
    if not asked and (question is not None or not (drawn and drawn.questions)):
        raise WinnowError(f'What do you want to ask about {picture}? Say winnow run {picture} "QUESTION".')
    if drawn is None:
        return Subject(picture, image, asked)
    known = next((q for q in drawn.questions if asked in ("", q.text)), None)
    if known is None:
        return Subject(picture, image, asked, bundled=True)
    return Subject(picture, image, known.text, known.answer, known.evidence, True)


def _filmed(name: str, asked: str, sampling: Sampling | None, bundled: bool) -> Subject:
    """A drawn clip, or a file that holds a video."""
    drawn: Clip | None
    if is_clip(name):
        if sampling is not None:
            raise WinnowError(f"{name} is drawn and read whole: --frames, --fps and --keyframes are for files.")
        drawn, video = drawn_video(name)
    else:
        video = open_video(name, sampling=Sampling.rate(FPS) if bundled and sampling is None else sampling)
        drawn = clip_in(name, video.frames)
    if drawn is None and not asked:
        raise WinnowError(f'What do you want to ask about {name}? Say winnow run {name} "QUESTION".')
    if bundled:
        check_words(asked)
    first = Image.fromarray(video.frames[0])
    if drawn is None:
        return Subject(name, first, asked, video=video)
    known = Known.of(drawn, asked)
    return Subject(name, first, known.question, known.truth, bundled=True, video=video, clip=known)


def _is_video(picture: str, sampling: Sampling | None) -> bool:
    """Told by the content. A GIF is a picture unless frames of it are asked for."""
    if picture.startswith("world:"):
        return False
    try:
        container = container_of(picture)
    except MediaError as refused:
        if refused.code == "unsupported_format":
            raise
        return False  # whoever opens it as a picture says what is wrong
    if container is None and sampling is not None:
        raise WinnowError(f"{picture} is not a video: --frames, --fps and --keyframes are for videos.")
    return container is not None and (container != "gif" or sampling is not None)


def warnings(asked: Subject) -> list[str]:
    """Warnings about answers of the bundled models."""
    if asked.video is not None:
        return [] if asked.bundled else [FOREIGN]
    return doubts(asked.question, asked.bundled)


def plans(methods: Sequence[str], keep: str | None, positions: str | None) -> list[Plan]:
    """A plan for each `--method`: a slug, to which `--keep` applies, or a plan string, which has its own settings."""
    made = []
    for spec in methods:
        bare = spec.strip().replace("-", "").replace("_", "").isalnum()
        if keep is not None and not bare:
            raise WinnowError(
                f"--keep and the settings in --method {spec!r} exclude each other: write keep=… in the plan."
            )
        plan: Any = spec if keep is None else method_class(spec.strip()).configured(keep=_number(keep))
        made.append(Plan.of(plan, positions=positions))
    return made


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def compare(
    model: Any,
    processor: Any,
    asked: Subject,
    wanted: Iterable[Plan],
    *,
    max_new_tokens: int = 16,
    runs: int = 3,
    picture: Path | None = None,
) -> dict[str, Any]:
    """Answer without compression and with each plan; the result is what `winnow run --json` prints.

    Args:
        picture: where to save the overlay; with several plans, their methods are added to the name.
    """
    wanted = list(wanted)
    inputs = inputs_of(model, processor, asked.shown, asked.question)
    paths = overlay_paths(picture, wanted)
    asking = {"max_new_tokens": max_new_tokens, "runs": runs}
    text, times = answer(model, processor, inputs, **asking)
    plain: dict[str, Any] = {"answer": text, "ms": times}
    if asked.video is not None:
        plain |= _full_costs(model, processor, inputs)
    results = []
    for plan, path in zip(wanted, paths, strict=True):
        with compress(model, plan, processor=processor) as handle:
            handle.timing = True
            seen, entered = asked, None
            if asked.video is None and handle.bind(plan).changes_pictures:
                entered = handle.pictures([asked.image], asked.question)
                seen = _as_entered(asked, entered)
                own = inputs_of(model, processor, seen.image, asked.question)
                with handle.using(plan, prompt=entered):
                    text, times = answer(model, processor, own, **asking, handle=handle)
            elif asked.video is None:
                text, times = answer(model, processor, inputs, **asking, handle=handle)
            else:
                video = handle.frames(asked.video)
                own = inputs if video is asked.video else inputs_of(model, processor, video, asked.question)
                with handle.using(plan, videos=[video]):
                    text, times = answer(model, processor, own, **asking, handle=handle)
            result, full = _costs(handle.last)
        if entered is not None:
            full = _full_costs(model, processor, inputs)
        plain = full | plain
        result = {
            "method": str(plan),
            "plan": plan.key,
            "answer": text,
            "same": text == plain["answer"],
            **result,
            "ms": times,
        }
        if entered is not None:
            (about_it,) = entered.entered
            result["entered"] = about_it.facts() | {"says": str(about_it)}
        if asked.video is None:
            result |= _picture(seen, processor, handle, path, str(plan))
        else:
            result |= _moving(asked, processor, handle.last, video, path, str(plan))
        results.append(result)
    about = {} if asked.video is None else {"video": asked.video.sampled.facts() | {"says": str(asked.video.sampled)}}
    return about | {
        "ran_on": _where(model),
        "picture": asked.name,
        "question": asked.question,
        "truth": asked.truth,
        "plain": plain,
        "methods": results,
    }


def _as_entered(asked: Subject, prompt: Any) -> Subject:
    """The subject as its picture entered, its evidence where it is now; none where parts of the picture are gone."""
    (entered,), (image,) = prompt.entered, prompt.pictures
    all_there = entered.box == (0, 0, *asked.image.size)
    return replace(asked, image=image, evidence=tuple(map(entered.seen, asked.evidence)) if all_there else ())


def _where(model: Any) -> str:
    """The machine part of a time: device, threads, dtype."""
    device = str(model.device)
    if device == "cpu":
        device += f", {torch.get_num_threads()} threads" if torch.get_num_threads() > 1 else ", 1 thread"
    return f"{device}, {str(model.dtype).removeprefix('torch.')}"


def _costs(ledger: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the ledger says of the compressed run, and of the plain run that it replaces."""
    item = ledger.items[0]
    layers = [samples[0] for samples in ledger.layer_tokens]
    frames = () if item.frames is None else item.frames.reductions
    points = _ahead(item.picture)
    points += [{"point": at, "method": slug, "from": r.n, "to": r.m} for at, slug, r in frames]
    points += [{"point": str(at), "method": slug, "from": r.n, "to": r.m} for at, slug, r in item.reductions]
    compressed = {
        "tokens": {"visual": len(item.kept), "layers": layers, "mean": statistics.fmean(layers)},
        "points": points,
        "flops": ledger.flops,
        "kv_bytes": ledger.kv_bytes,
    }
    logical = ledger.logical[0]
    full = {"tokens": {"visual": item.layout.n_content, "layers": [logical] * len(layers), "mean": logical}}
    return compressed, full | {"flops": ledger.flops_full, "kv_bytes": ledger.kv_bytes_full}


def _ahead(entered: Any) -> list[dict[str, Any]]:
    """What steps ahead of the processor left: of pictures, how many; of one picture, of how many tokens."""
    if entered is None:
        return []
    maps = [(at, slug, r.n, r.m) for at, slug, r in entered.steps if isinstance(r, Reduction)]
    cuts = [(at, slug) for at, slug, r in entered.steps if isinstance(r, Recut)]
    if cuts and entered.grid is not None:
        maps.append((cuts[0][0], " + ".join(slug for _, slug in cuts), prod(entered.full), prod(entered.grid)))
    return [dict(zip(("point", "method", "from", "to"), row, strict=True)) for row in maps]


def _full_costs(model: Any, processor: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """What all sampled frames cost without compression; a plan that chooses frames never sees the others."""
    with compress(model, Plan(()), processor=processor) as handle, torch.inference_mode():
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        return _costs(handle.last)[1]


def _picture(asked: Subject, processor: Any, handle: Any, path: Path | None, name: str) -> dict[str, Any]:
    """Evidence recall, where the evidence is known, and the overlay, where it is wanted."""
    item = handle.last.items[0]
    box = shown_box(processor, asked.image.size)
    found: dict[str, Any] = {}
    if asked.evidence:
        matters = covered(item.layout, asked.evidence, box)
        found["evidence_recall"] = float(matters[item.kept.numpy()].sum() / max(1, matters.sum()))
    if path is not None:
        caption = f"{name}: {len(item.kept)} of {item.layout.n_content} tokens · {asked.question}"
        kept = item.provenance()
        save(overlay(asked.image, item.layout, kept, evidence=asked.evidence, shown=box, caption=caption), path)
        found["overlay"] = str(path)
    return found


def _moving(asked: Subject, processor: Any, ledger: Any, video: Video, path: Path | None, name: str) -> dict[str, Any]:
    """Evidence recall and the overlay of a video: a contact sheet, or a short video where its name asks for one."""
    item = ledger.items[0]
    found: dict[str, Any] = {}
    recall = None if asked.clip is None else asked.clip.recall(item, video)
    if recall is not None:
        found["evidence_recall"] = recall
    if path is None:
        return found
    shown = shown_box(getattr(processor, "video_processor", processor), (video.frames.shape[2], video.frames.shape[1]))
    told: dict[str, Any] = {"shown": shown, "evidence": {} if asked.clip is None else asked.clip.boxes(video)}
    if path.suffix.lower() in MOVING:
        drawn = film(video, item.layout, item.provenance(), **told)
        _write(path, lambda part: save_film(drawn, part))
    else:
        caption = f"{name}: {len(item.kept)} of {item.layout.n_content} tokens · {item.frames} · {asked.question}"
        save(contact_sheet(video, item.layout, item.provenance(), caption=caption, **told), path)
    return found | {"overlay": str(path)}


def overlay_paths(picture: Path | None, wanted: Sequence[Plan]) -> list[Path | None]:
    """Where each plan's overlay goes."""
    if picture is None:
        return [None] * len(wanted)
    if picture.suffix.lower() not in (*LONGEST, *MOVING):
        raise WinnowError(
            f"--overlay {picture} is not the name of a picture; end it in one of {', '.join(LONGEST)}, or for videos "
            f"in {' or '.join(MOVING)}."
        )
    if len(wanted) == 1:
        return [picture]
    names = ["+".join(method.slug for method in plan.methods) for plan in wanted]
    numbered = [n if names.count(n) == 1 else f"{n}-{i + 1}" for i, n in enumerate(names)]
    return [picture.with_stem(f"{picture.stem}-{name}") for name in numbered]


def check_overlays(paths: Iterable[Path | None], asked: Subject) -> None:
    """Refuse overlays that cannot be written, before a model is loaded."""
    for path in filter(None, paths):
        if asked.video is None:
            if path.suffix.lower() in MOVING:
                raise WinnowError(f"--overlay {path} names a short video, and {asked.name} is a picture.")
            _check_sides(path, panel_size(asked.image.size))
        try:
            above = next(folder for folder in path.absolute().parents if folder.exists())
            if path.is_dir():
                wrong = "it is a folder"
            elif not above.is_dir():
                wrong = f"{above} is not a folder"
            else:
                wrong = "" if os.access(above, os.W_OK | os.X_OK) else f"you may not write into {above}"
        except (OSError, ValueError) as error:  # a name that is too long, or that no file can have
            wrong = getattr(error, "strerror", None) or type(error).__name__
        if wrong:
            raise WinnowError(f"The overlay cannot be written to {path}: {wrong}.")


def _check_sides(path: Path, size: tuple[int, int]) -> None:
    longest = LONGEST[path.suffix.lower()]
    if max(size) > longest:
        raise WinnowError(
            f"The overlay cannot be written to {path}: it has {size[0]} × {size[1]} pixels, and {path.suffix} holds at "
            f"most {longest} on a side; name a .png."
        )


def save(image: Image.Image, path: Path) -> None:
    """Write a picture completely or not at all."""
    _check_sides(path, image.size)
    _write(path, image.save)


def _write(path: Path, save_to: Callable[[Path], Any]) -> None:
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    failed = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_to(part)
        os.replace(part, path)
    except WinnowError:
        with contextlib.suppress(OSError, ValueError):
            part.unlink()
        raise
    except Exception as error:  # Pillow has errors of every kind for what a format cannot hold
        failed = getattr(error, "strerror", None) or type(error).__name__
    if failed:
        with contextlib.suppress(OSError, ValueError):
            part.unlink()
        raise WinnowError(f"The overlay cannot be written to {path}: {failed}.")
