"""Visual Context Window Extension by its card: what is pooled, how many tokens are left, and the scale of a request."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from winnow.core.errors import WinnowError
from winnow.core.layout import Layout
from winnow.core.stretch import Stretch
from winnow.core.view import View
from winnow.methods.visual_context_window_extension import VisualContextWindowExtension as Method
from winnow.parts.resampled import resampled_naive
from winnow.testing import Picture

from .claims.windows import recalled
from .directional import gap
from .stubs import ids, tokens


def clip(t, h, w, b=1, d=8):
    return View.of(tokens(0, t * h * w, d, b), layout=Layout.grid(h, w, t))


@pytest.mark.system("visual-context-window-extension", "exact")
@pytest.mark.parametrize(("strides", "left"), [((1.0, 2.0, 2.0, 2.0), 343), ((1.0, 1.5, 2.0, 2.0), 375), ((2.0,), 196)])
def test_the_tokens_of_a_group_of_four(strides, left):
    """81 is what a stride of 3 leaves of 27 × 27, which the model's own stride of 2 makes 14 × 14."""
    assert Method(strides=strides).reduce(clip(4, 14, 14, d=2)).m == left


@pytest.mark.system("visual-context-window-extension", "exact")
@pytest.mark.parametrize(("t", "h", "w"), [(4, 6, 6), (9, 5, 7), (2, 1, 4), (3, 3, 3)])
def test_frames_are_what_interpolation_makes_of_them(t, h, w):
    view = clip(t, h, w, b=2)
    method = Method(strides=(1.0, 2.0, 1.5))
    made = method.reduce(view).apply(view.tokens)
    for lane in range(2):
        frames = view.tokens[lane].view(t, h, w, -1)
        want = torch.cat([resampled_naive(frames[i], method.strides[i % 3]) for i in range(t)])
        assert torch.allclose(made[lane], want, atol=1e-5)


@pytest.mark.system("visual-context-window-extension", "exact")
def test_a_group_of_one_pools_all_frames_alike():
    view = clip(3, 4, 4)
    assert ids(Method(strides=(1.0,)).reduce(view)) == list(range(48))
    counts = Method(strides=(2.0,)).reduce(view).representatives[0].div(16, rounding_mode="floor").bincount()
    assert counts.tolist() == [4, 4, 4]


def remembers(reduce):
    """Of the first frame of a group every token is there behind pooling, bit for bit; a flash in others is not lost."""
    view = clip(8, 6, 6)
    view.tokens[0, 5 * 36 + 8] = 100  # in a frame that is pooled
    made = reduce(view).apply(view.tokens)[0]
    for t in (0, 4):
        own = view.tokens[0, t * 36 : (t + 1) * 36]
        assert all(bool((made == row).all(1).any()) for row in own)
    assert float(made.max()) > 20


@pytest.mark.system("visual-context-window-extension", "exact")
def test_the_first_frames_of_groups_stay_and_the_others_are_blurred_only():
    remembers(lambda view: Method().reduce(view))


@pytest.mark.parametrize("strides", [(2.0, 1.0, 2.0, 2.0), (2.0, 2.0)])
def test_that_tells_another_group(strides):
    with pytest.raises(AssertionError):
        remembers(lambda view: Method(strides=strides).reduce(view))


@pytest.mark.system("visual-context-window-extension", "exact")
def test_the_scale_is_visual_tokens_over_the_window():
    method = Method(window=6272)
    assert method.stretch(6272) is None
    assert method.stretch(100) is None
    assert method.stretch(4 * 6272) == Stretch(4, 6272)
    assert Method(window=None).stretch(10**6) is None
    assert Method(scale=3.0).stretch(0) == Stretch(3, 6272)


TEXTS = 4


@pytest.mark.system("visual-context-window-extension", "directional")
@pytest.mark.xdist_group("recall")
def test_beyond_the_trained_length_stretched_positions_answer_more():
    """Texts four times as long as those that the recall model was trained on; a scale of the text's window is 1."""
    as_trained = recalled(1, TEXTS)
    assert gap(recalled(4, TEXTS), as_trained).low > 0
    assert not gap(as_trained, as_trained).low > 0


def test_a_picture_stays_whole_and_a_video_with_holes_is_refused():
    assert ids(Method().reduce(clip(1, 4, 5))) == list(range(20))
    tiled = View.of(tokens(0, 48), layout=Picture.tiled(4, 2, 1).lm)
    assert ids(Method().reduce(tiled)) == list(range(48))
    view = clip(4, 4, 4)
    part = replace(view, tokens=view.tokens[:, 3:], ids=view.ids[:, 3:])
    with pytest.raises(WinnowError, match="needs a token at each of 16 places"):
        Method().reduce(part)
    assert Method(strides=(1.0,)).reduce(part).m == 61


def test_bad_settings_say_what_is_allowed():
    for name, value in (("strides", (0.5,)), ("window", 0), ("scale", 0.5), ("strides", ())):
        with pytest.raises(WinnowError, match=name):
            Method(**{name: value})
