"""What is said of a video that the decoding process refuses, or answers nonsense about."""

from __future__ import annotations

from typing import Any

from winnow.media import MediaError
from winnow.video.sampling import VideoLimits

_CODECS = "H.264, HEVC, MPEG-4, VP8, VP9, AV1, Motion JPEG or GIF"


def broken() -> MediaError:
    return MediaError("the decoder answered with nonsense: the video is damaged", "invalid_video")


def refusal(facts: dict[str, Any], limits: VideoLimits) -> MediaError:
    """The error for a word of the decoding process."""

    def number(name: str) -> str:
        value = facts.get(name)
        return f"{value:g}" if isinstance(value, int | float) else "?"

    said = {
        "invalid": ("the video cannot be read: it is damaged or cut off, or its content is not what it begins as",
                    "invalid_video"),
        "no_video": ("the file holds no pictures, only sound or data", "no_video"),
        "codec": (f"its video codec is not supported: give {_CODECS}", "unsupported_format"),
        "streams": (f"the file has more than the {limits.max_streams} streams that are allowed", "too_large"),
        "pixels": (
            f"its frames have {number('width')} × {number('height')} pixels; at most {limits.max_pixels} in all and "
            f"{limits.max_side} on a side are allowed",
            "too_large",
        ),
        "unsized": ("the size of its frames cannot be read, or is too large", "too_large"),
        "frames": (f"the file lists more than the {limits.max_listed} frames that are allowed", "too_large"),
        "duration": (
            f"the video lasts {number('seconds')} seconds; at most {limits.max_seconds:g} are allowed", "too_large"
        ),
        "times": ("its frames carry no times, so they cannot be sampled; write it anew as MP4 or WebM",
                  "unsupported_format"),
        "empty": ("the video has no frame that can be read", "no_frames"),
        "keyframes": ("the video marks no keyframes; sample it by count or by rate", "no_frames"),
        "sizes": ("its frames change their size within the video, which is not supported", "unsupported_format"),
        "memory": (f"decoding needs more than the {limits.max_memory} bytes that are allowed", "too_large"),
        "import": ("PyAV cannot be loaded within the memory that is allowed", "too_large"),
    }  # fmt: skip
    code = facts.get("code")
    return MediaError(*said[code]) if isinstance(code, str) and code in said else broken()
