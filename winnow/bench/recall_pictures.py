"""Recall of pictures under a plan for the KV cache: one of several is asked about when all of them have been read.

    turns     each picture comes in a turn of its own, and the cache is cut behind each
    frames    all pictures stand in one prompt, as frames do, and the cache is cut once

The question comes in a turn of its own, behind the last picture, so that every word of the answer is said from what
was left. Asked in two ways that must not be mixed: query-aware, the question stands in front of the pictures of each
turn as well, and so is known when their cache is cut; query-agnostic, it does not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from winnow.bench.encodings import Encodings
from winnow.bench.meters import judge
from winnow.bench.recall import under
from winnow.core.errors import WinnowError
from winnow.models.inputs import placeholder
from winnow.world.albums import Album, album

TASKS = ("turns", "frames")
NEW_TOKENS = 16
_REPLY = "winnowreply"  # where the assistant would answer a picture: nothing is said there, and the cache is cut

Task = Literal["turns", "frames"]
Piece = tuple[str, Sequence[Image.Image]]


@dataclass(frozen=True)
class PictureAnswer:
    """What was answered about the album of `seed`, whose picture number `place` holds the answer."""

    seed: int
    place: int
    said: str
    truth: str

    @property
    def right(self) -> bool:
        return judge(self.said, self.truth)[0]


def measure_pictures(
    model: Any,
    processor: Any,
    plan: Any,
    task: Task,
    n: int = 32,
    pictures: int = 3,
    aware: bool = False,
    *,
    blind: bool = False,
    split: str = "test",
    seed: int = 0,
    max_new_tokens: int = NEW_TOKENS,
    kept: Encodings | None = None,
) -> list[PictureAnswer]:
    """Ask about `n` albums under a plan, decoding greedily.

    Args:
        plan: as `winnow.compress` takes it; "full" or None: the model as it is.
        aware: the question stands in front of the pictures of each turn as well.
        blind: the question alone, without pictures.
        seed: of the first album.
        kept: what pictures of this model were encoded to; the same for every plan that leaves the tower alone.

    Raises:
        WinnowError: the chat template takes no conversation, or there is nothing to measure.
    """
    if task not in TASKS:
        raise WinnowError(f"{task!r} is no task with several pictures; the tasks are {', '.join(TASKS)}")
    if n < 1:
        raise WinnowError(f"n={n}; measure on at least 1 album")
    found = []
    with under(model, plan) as handle:
        for number in range(seed, seed + n):
            drawn = album(number, pictures, split)
            pieces = conversation(processor, drawn, task, aware)
            reads = model if kept is None else kept.reader(model, handle)
            said = _answered(model, processor, reads, pieces[-1:] if blind else pieces, max_new_tokens)
            found.append(PictureAnswer(number, drawn.place, said, drawn.question.answer))
    return found


def conversation(processor: Any, drawn: Album, task: Task, aware: bool) -> list[Piece]:
    """What the model reads, one forward for each piece: text, and the pictures whose placeholders stand in it."""
    groups = [[shown.image] for shown in drawn.scenes] if task == "turns" else [[s.image for s in drawn.scenes]]
    said = [{"type": "text", "text": drawn.question.text}]
    messages: list[dict[str, Any]] = []
    for group in groups:
        messages.append({"role": "user", "content": [{"type": "image"} for _ in group]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": _REPLY}]})
    messages.append({"role": "user", "content": said})
    try:
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except MemoryError:
        raise
    except Exception:  # a template is a program that comes with the checkpoint: it can fail in any way
        text = ""
    parts, mark = text.split(_REPLY), placeholder(processor)
    counts = [part.count(mark) for part in parts]
    if counts != [*map(len, groups), 0] or drawn.question.text not in parts[-1]:
        raise WinnowError(
            f"The chat template of {type(processor).__name__} does not write a conversation about several pictures; "
            "use a checkpoint whose template does."
        )
    if aware:
        parts[:-1] = [_in_front(part, drawn.question.text, mark) for part in parts[:-1]]
    return list(zip(parts, [*groups, []], strict=True))


def _in_front(text: str, question: str, mark: str) -> str:
    """A turn with the question before its first picture: written into the text, as templates may put pictures first."""
    before, _, rest = text.partition(mark)
    at = len(re.sub(r"\S+$", "", before))  # behind what opens the turn, before what opens the picture
    return f"{before[:at]}{question} {before[at:]}{mark}{rest}"


@torch.no_grad()
def _answered(model: Any, processor: Any, reads: Any, pieces: Sequence[Piece], count: int) -> str:
    cache = None
    for number, (text, images) in enumerate(pieces):
        inputs = _inputs(model, processor, text, images, first=not number)
        out = reads(**inputs, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
    ends, said = _ends(model), []
    for _ in range(count):
        token: Tensor = out.logits[:, -1:].argmax(-1)
        if int(token) in ends:
            break
        said.append(int(token))
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
    return str(processor.tokenizer.decode(said, skip_special_tokens=True)).strip()


def _inputs(model: Any, processor: Any, text: str, images: Sequence[Image.Image], first: bool) -> dict[str, Tensor]:
    """A piece as the model takes it; only the first one begins with the start token."""
    start = processor.tokenizer.bos_token
    adds = first and not (start and text.startswith(start))
    made = processor(text=text, return_tensors="pt", add_special_tokens=adds, **({"images": images} if images else {}))
    made.pop("attention_mask", None)  # nothing is padded
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None) for name, value in made.items()
    }


def _ends(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
