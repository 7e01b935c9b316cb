"""The messages of a chat request: roles, texts, and pictures or a video as data: URLs. Nothing is fetched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from winnow.core.errors import UnsupportedError
from winnow.media import MediaError, base64_bytes, open_base64
from winnow.serve.errors import INVALID, ApiError, invalid
from winnow.serve.settings import Settings
from winnow.video import Sampling, Video, open_video

ROLES = ("system", "developer", "user", "assistant")
DETAILS = ("auto", "low", "high")
NOUNS = {"image": "picture", "video": "video"}


@dataclass(frozen=True)
class Shown:
    """A picture or a video as its data: URL, still in base64.

    Attributes:
        modality: image or video.
    """

    modality: str
    url: str


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        parts: in order, texts and what is shown.
    """

    role: str
    parts: tuple[str | Shown, ...]

    @property
    def texts(self) -> Iterator[str]:
        return (part for part in self.parts if isinstance(part, str))

    @property
    def shown(self) -> Iterator[Shown]:
        return (part for part in self.parts if isinstance(part, Shown))


def read_turns(messages: list[Any], settings: Settings) -> list[Turn]:
    """The messages, with what they show still in base64.

    Raises:
        ApiError: a message is not of a kind that is known, or there are too many pictures, videos or characters.
    """
    turns = [_turn(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if turns[-1].role != "user":
        raise invalid("The last message must be the user's.", f"messages[{len(turns) - 1}].role")
    if not any(isinstance(part, Shown) or part.strip() for part in turns[-1].parts):
        raise invalid("The last message holds neither text nor a picture.", f"messages[{len(turns) - 1}].content")
    characters = sum(len(text) for turn in turns for text in turn.texts)
    if characters > settings.text:
        text = f"The messages hold {characters} characters of text; at most {settings.text} are allowed."
        raise invalid(text, "messages", "request_too_large", 413)
    shown = [own.modality for turn in turns for own in turn.shown]
    if "video" in shown and len(shown) > 1:
        text = f"The messages hold a video and {len(shown) - 1} more; one video, or pictures, can be asked about."
        raise invalid(text, "messages", "too_many_videos")
    if len(shown) > settings.pictures:
        text = f"The messages hold {len(shown)} pictures; at most {settings.pictures} are allowed."
        raise invalid(text, "messages", "too_many_images")
    return turns


def _turn(message: Any, at: str) -> Turn:
    if not isinstance(message, dict):
        raise invalid(f"{at} must be an object with role and content.", at)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise invalid(f"{at}.role must be one of {', '.join(ROLES)}.", f"{at}.role", "invalid_value")
    if strange := sorted(set(message) - {"role", "content", "name", "refusal"}):
        raise invalid(f"Unknown parameter: {strange[0][:64]!r} in {at}.", at, "unknown_parameter")
    if isinstance(content, str):
        return Turn(role, (_text(content, f"{at}.content"),))
    if not isinstance(content, list):
        raise invalid(f"{at}.content must be a text, or a list of parts.", f"{at}.content")
    return Turn(role, tuple(_part(part, role, f"{at}.content[{i}]") for i, part in enumerate(content)))


def _part(part: Any, role: str, at: str) -> str | Shown:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and set(part) == {"type", "text"}:
        return _text(part["text"], f"{at}.text")
    modality = kind.removesuffix("_url") if isinstance(kind, str) else ""
    if modality not in NOUNS or set(part) != {"type", kind}:
        wanted = '{"type": "text", "text": …} or {"type": "image_url", "image_url": {"url": "data:…"}}'
        raise invalid(f"{at} must be {wanted}.", at, "invalid_value")
    if role != "user":
        raise invalid(f"{at}: only messages of the user hold {NOUNS[modality]}s.", at, "invalid_value")
    given, at = part[kind], f"{at}.{kind}"
    known = {"url", "detail"} if modality == "image" else {"url"}
    if not isinstance(given, dict) or "url" not in given or not set(given) <= known:
        raise invalid(f'{at} must be {{"url": "data:…"}}.', at, "invalid_value")
    if given.get("detail", "auto") not in DETAILS:
        raise invalid(f"{at}.detail must be one of {', '.join(DETAILS)}.", f"{at}.detail", "invalid_value")
    return Shown(modality, _data_url(given["url"], f"{at}.url", modality))


def _text(text: Any, at: str) -> str:
    if not isinstance(text, str):
        raise invalid(f"{at} must be a text.", at, "invalid_value")
    if re.search("[\ud800-\udfff]", text):
        raise invalid(f"{at} holds half of a surrogate pair, which is no character.", at, "invalid_value")
    return text


def _data_url(url: Any, at: str, modality: str) -> str:
    code = f"invalid_{modality}_url"
    if not isinstance(url, str):
        raise invalid(f"{at} must be a text.", at, code)
    if url[:5].lower() != "data:":
        what = NOUNS[modality]
        text = f"{at} must be a data: URL that holds the {what} in base64; this server fetches and opens nothing."
        raise invalid(text, at, code)
    return url


def open_shown(turns: list[Turn], settings: Settings) -> list[Image.Image] | list[Video]:
    """What a conversation shows, decoded: its pictures in order, or its one video.

    Raises:
        ApiError: something cannot be taken; `code` is that of winnow's `MediaError`.
    """
    shown = [own for turn in turns for own in turn.shown]
    if shown and shown[0].modality == "video":
        return [_video(shown[0].url, settings)]
    return _pictures([own.url for own in shown], settings)


def _video(url: str, settings: Settings) -> Video:
    try:
        data = base64_bytes(url, settings.body, "video")
        return open_video(data, sampling=Sampling.count(settings.frames), limits=settings.video)
    except MediaError as error:
        refused = _refused(f"video: {error}", error.code, error.status)
    except UnsupportedError:  # says what the operator has to install
        refused = _refused("video: this server cannot decode videos", "unsupported_value", 400)
    raise refused


def _pictures(urls: list[str], settings: Settings) -> list[Image.Image]:
    found: list[Image.Image] = []
    pixels = 0
    for url in urls:
        try:
            found.append(open_base64(url, limits=settings.picture))
        except MediaError as error:
            refused = _refused(f"picture {len(found) + 1}: {error}", error.code, error.status)
        else:
            pixels += found[-1].width * found[-1].height
            if pixels <= settings.picture.max_total_pixels:
                continue
            most = settings.picture.max_total_pixels
            refused = _refused(f"the pictures have more than {most} pixels together", "too_large", 413)
        raise refused
    return found


def _refused(message: str, code: str, status: int) -> ApiError:
    return ApiError(message, status=status, kind=INVALID, param="messages", code=code)
