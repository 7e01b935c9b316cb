"""Open untrusted videos: frames as uint8 with their true times, or a `MediaError`.

    import winnow
    video = winnow.open_video("clip.mp4", sampling=winnow.Sampling.rate(2))
    video.frames, video.times        # [T, H, W, 3] uint8, seconds from the first frame

- Containers: MP4/MOV, WebM/Matroska and GIF, told by their first bytes, never by a name. No other parser runs.
- PyAV decodes in a process of its own, with limits that the system holds on memory and time; it is handed one open file
  and no name, and libav may open nothing else. A process that dies, hangs or lies is a `MediaError`.
- What is sampled is chosen from the times in the file before anything is decoded, and `video.sampled` says it.
- The file is damaged somewhere: the frames before the damage are taken, `video.sampled.broken` says so, and a video
  without a frame before it is refused.
- Frames are turned upright as the file says; what is transparent is put on white; pixels count as square.

PyAV is loaded by that process alone: this module imports without it.
"""

from winnow.core.sampled import Sampled
from winnow.video.clip import Video
from winnow.video.process import Frame
from winnow.video.reading import Reading, read_video
from winnow.video.sampling import Sampling, VideoLimits
from winnow.video.source import container_of, open_video

__all__ = [
    "Frame",
    "Reading",
    "Sampled",
    "Sampling",
    "Video",
    "VideoLimits",
    "container_of",
    "open_video",
    "read_video",
]
