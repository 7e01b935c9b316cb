"""Chat messages: where their pictures and videos are, what their question is, and messages with some left out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from winnow.core.errors import WinnowError
from winnow.engine.pixels import MARK, Given
from winnow.media import MediaError, open_image
from winnow.video import Video

PICTURES = (
    'give a picture as {"type": "image", "image": …}, a PIL image, an array or tensor of shape (height, width, 3), or '
    'the path of a file; as {"type": "image", "path": …} only a path'
)
_OTHERS = ("image", "path", "url", "base64", "image_url", "video")


class PreparedMessages(list[dict[str, Any]]):
    """Messages that steps of a plan have been over."""


@dataclass(frozen=True, eq=False)
class Found:
    """What is in messages.

    Attributes:
        pictures, videos: (message, part of its content) → what is there, in the order of the prompt.
        text: of the last message of the user.
    """

    pictures: dict[tuple[int, int], Given] = field(default_factory=dict)
    videos: dict[tuple[int, int], Video] = field(default_factory=dict)
    text: str = ""


def read_messages(messages: Any) -> Found:
    """Find what is in messages, and open their pictures; nothing of them is changed.

    Raises:
        WinnowError: they are no messages of one conversation, or were prepared before, or hold something else than
            text, pictures and opened videos.
        MediaError: a picture cannot be opened.
    """
    if isinstance(messages, PreparedMessages):
        raise WinnowError("these messages were prepared already; start from those that you prepared them from.")
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise WinnowError(
            f"got {_kind(messages)} as messages; give those of one conversation, a list such as "
            '[{"role": "user", "content": […]}]; of a batch, prepare each by itself.'
        )
    found, text = Found(), ""
    for number, message in enumerate(messages):
        said = []
        for at, part in _parts(message):
            kind = part.get("type")
            if kind == "text":
                said.append(str(part.get("text", "")))
            elif kind == "image":
                found.pictures[number, at] = _picture(part, len(found.pictures) + 1)
            elif kind == "video":
                found.videos[number, at] = _video(part)
            else:
                raise WinnowError(
                    f"a message holds a part of the type {kind!r}; winnow prepares text, image and video. {PICTURES}."
                )
        if message.get("role") == "user":
            text = "\n".join(said)
    return Found(found.pictures, found.videos, text)


def _parts(message: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The parts of a message, by their place in its content."""
    content = message.get("content")
    if isinstance(content, str) or content is None:
        yield 0, {"type": "text", "text": content or ""}
        return
    if not isinstance(content, list | tuple) or not all(isinstance(part, Mapping) for part in content):
        raise WinnowError(
            f'the content of a message is {_kind(content)}; give text, or parts like [{{"type": "text", "text": …}}].'
        )
    yield from enumerate(content)


def _picture(part: Mapping[str, Any], number: int) -> Given:
    name = next((name for name in ("image", "path") if part.get(name) is not None), None)
    if name is None or (name == "path" and not hasattr(part[name], "__fspath__") and not isinstance(part[name], str)):
        held = ", ".join(key for key in part if key != "type") or "nothing beside its type"
        raise WinnowError(f"picture {number} is a part with {held}; {PICTURES}.")
    source = part[name]
    if isinstance(source, Image.Image) and MARK in source.info:
        raise WinnowError(
            f"picture {number} was cut or scaled already, by {source.info[MARK]}; start from the picture that you had."
        )
    try:
        return Given(source, open_image(source))
    except MediaError as refused:
        refused.args = (f"picture {number}: {refused}",)
        raise


def _video(part: Mapping[str, Any]) -> Video:
    video = part.get("video")
    if not isinstance(video, Video):
        raise WinnowError(
            f'a message holds {_kind(video)} as a video; open it first: {{"type": "video", "video": '
            "winnow.open_video(…)}."
        )
    return video


def rewritten(messages: Any, changed: Mapping[tuple[int, int], Any]) -> PreparedMessages:
    """Messages with other pictures and videos. Dictionaries and lists on the way to them are new ones.

    Args:
        changed: (message, part) → what stands there now; None: the part is left out.
    """
    made = PreparedMessages()
    for number, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list | tuple):
            parts = [
                part if (number, at) not in changed else _replaced(part, changed[number, at])
                for at, part in enumerate(content)
            ]
            message = {**message, "content": [part for part in parts if part is not None]}
        made.append(dict(message))
    return made


def _replaced(part: Mapping[str, Any], value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    kind = str(part["type"])
    return {**{key: own for key, own in part.items() if key not in _OTHERS}, kind: value}


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
