"""The messages of a chat request: roles, texts, and pictures as data: URLs. Nothing is fetched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from winnow.media import MediaError, open_base64
from winnow.serve.errors import INVALID, ApiError, invalid
from winnow.serve.settings import Settings

ROLES = ("system", "developer", "user", "assistant")
DETAILS = ("auto", "low", "high")


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        parts: in order, texts and pictures; a picture is its data: URL, still in base64, in a one-tuple.
    """

    role: str
    parts: tuple[str | tuple[str], ...]

    @property
    def texts(self) -> Iterator[str]:
        return (part for part in self.parts if isinstance(part, str))

    @property
    def urls(self) -> Iterator[str]:
        return (part[0] for part in self.parts if not isinstance(part, str))


def read_turns(messages: list[Any], settings: Settings) -> list[Turn]:
    """The messages, with their pictures still in base64.

    Raises:
        ApiError: a message is not of a kind that is known, or there are too many pictures or characters.
    """
    turns = [_turn(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if turns[-1].role != "user":
        raise invalid("The last message must be the user's.", f"messages[{len(turns) - 1}].role")
    if not any(part if isinstance(part, tuple) else part.strip() for part in turns[-1].parts):
        raise invalid("The last message holds neither text nor a picture.", f"messages[{len(turns) - 1}].content")
    characters = sum(len(text) for turn in turns for text in turn.texts)
    if characters > settings.text:
        text = f"The messages hold {characters} characters of text; at most {settings.text} are allowed."
        raise invalid(text, "messages", "request_too_large", 413)
    count = sum(1 for turn in turns for _ in turn.urls)
    if count > settings.pictures:
        text = f"The messages hold {count} pictures; at most {settings.pictures} are allowed."
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


def _part(part: Any, role: str, at: str) -> str | tuple[str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and set(part) == {"type", "text"}:
        return _text(part["text"], f"{at}.text")
    if kind != "image_url" or set(part) != {"type", "image_url"}:
        wanted = '{"type": "text", "text": …} or {"type": "image_url", "image_url": {"url": "data:…"}}'
        raise invalid(f"{at} must be {wanted}.", at, "invalid_value")
    if role != "user":
        raise invalid(f"{at}: only messages of the user hold pictures.", at, "invalid_value")
    image = part["image_url"]
    if not isinstance(image, dict) or "url" not in image or not set(image) <= {"url", "detail"}:
        raise invalid(f'{at}.image_url must be {{"url": "data:…"}}.', f"{at}.image_url", "invalid_value")
    if image.get("detail", "auto") not in DETAILS:
        allowed = ", ".join(DETAILS)
        raise invalid(f"{at}.image_url.detail must be one of {allowed}.", f"{at}.image_url.detail", "invalid_value")
    return (_data_url(image["url"], f"{at}.image_url.url"),)


def _text(text: Any, at: str) -> str:
    if not isinstance(text, str):
        raise invalid(f"{at} must be a text.", at, "invalid_value")
    if re.search("[\ud800-\udfff]", text):
        raise invalid(f"{at} holds half of a surrogate pair, which is no character.", at, "invalid_value")
    return text


def _data_url(url: Any, at: str) -> str:
    if not isinstance(url, str):
        raise invalid(f"{at} must be a text.", at, "invalid_image_url")
    if url[:5].lower() != "data:":
        text = f"{at} must be a data: URL that holds the picture in base64; this server fetches and opens nothing."
        raise invalid(text, at, "invalid_image_url")
    return url


def open_pictures(turns: list[Turn], settings: Settings) -> list[Image.Image]:
    """The pictures of a conversation, decoded, in order.

    Raises:
        ApiError: one cannot be taken; `code` is that of winnow's `MediaError`.
    """
    found: list[Image.Image] = []
    pixels = 0
    for url in (url for turn in turns for url in turn.urls):
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
