"""The true times of frames, through the processors of transformers themselves."""

from __future__ import annotations

import re
from importlib.util import find_spec

import numpy as np
import pytest
import zoo
from video_processor import TEMPLATE, tokenizer

import winnow
from winnow.models.inputs import model_inputs
from winnow.video import Video

pytestmark = pytest.mark.skipif(find_spec("torchvision") is None, reason="transformers' video processors need it")

QUESTION = "what is this ?"
SIZE = {"shortest_edge": 56 * 56, "longest_edge": 2 * 140 * 140}
UNEVEN = [0.0, 0.1, 2.0, 2.1, 7.5]


def processor(kind: type, videos: type):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    words = tokenizer(QUESTION)
    for name, token, number in (("image", "<image>", zoo.IMAGE), ("video", "<video>", zoo.VIDEO)):
        setattr(words, f"{name}_token", token)
        setattr(words, f"{name}_token_id", number)
    for name, token, number in (("start", "<start>", zoo.PICTURE_START), ("end", "<end>", zoo.PICTURE_END)):
        setattr(words, f"vision_{name}_token", token)
        setattr(words, f"vision_{name}_token_id", number)
    template = TEMPLATE.replace("<video> ", "<start><video><end>").replace("<image> ", "<start><image><end>")
    return kind(Qwen2VLImageProcessorPil(size=SIZE), words, videos(size=SIZE), chat_template=template)


def video(times: list[float]) -> Video:
    pixels = np.random.default_rng(0).integers(0, 256, (len(times), 90, 120, 3), dtype=np.uint8)
    return Video.of(pixels, times=times)


@pytest.mark.parametrize(("times", "seconds"), [([0.0, 0.5, 1.0, 1.5, 2.0], 1.0), (UNEVEN, 2 * 7.5 / 4), ([0.0], 2.0)])
def test_qwen2_5_vl_is_told_the_seconds_of_a_row_in_time(times, seconds):
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

    model, asking = zoo.model("qwen2_5_vl"), processor(Qwen2_5_VLProcessor, Qwen2VLVideoProcessor)
    made = model_inputs(model, asking, video(times), QUESTION)
    assert made["second_per_grid_ts"].tolist() == pytest.approx([seconds], rel=0.001)
    with winnow.compress(model, "divprune:keep=7", processor=asking) as handle:
        with handle.using(handle.plan, videos=[video(times)]):
            model.generate(**made, max_new_tokens=2)
        assert len(handle.last.items[0].kept) == 7


def test_qwen3_vl_writes_the_true_seconds():
    from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor

    asking, shown = processor(Qwen3VLProcessor, Qwen3VLVideoProcessor), video(UNEVEN)
    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    text = asking.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    said: list[str] = []
    plain = asking.replace_video_token
    asking.replace_video_token = lambda *a, **k: said.append(plain(*a, **k)) or said[-1]
    asking(
        text=text,
        videos=[shown.frames],
        video_metadata=[shown.metadata],
        do_sample_frames=False,
        input_data_format="channels_last",
        return_tensors="pt",
    )
    # Of two frames that share tokens the mean; the last one is doubled.
    assert re.findall(r"<([\d.]+) seconds>", said[0]) == ["0.1", "2.0", "7.5"]
