"""VideoStreaming (arXiv 2405.16009): read a video clip by clip into a few memory tokens, and answer from few clips.

Looks at: the projected tokens, and the tokens of the question. Cost: O(V · d² + (tokens of a clip)² · d for each clip),
d being the width of the small encoder.

A small causal model reads the memory of the clip before, the time, the tokens of the clip, then as many summary tokens
as `per_frame` says of each frame, which begin as means over parts of the picture, and an indicator. What comes out at
the summary tokens is the memory of the clip, the only way out; its last one has seen the whole video. The question,
read behind the last memory by the same model, has an indicator too, and the `chosen` clips with the most similar ones
are what the language model is given: so many tokens for any video. In training the choice is a top-k with Gumbel's
noise and a straight-through gradient, and the clips where the evidence lies teach the indicators.
Departs from the paper: the model that answers stays frozen, and the small encoder is trained from scratch. What it
reads are tokens behind the projector, which have been joined by fours where a family does so, and are not joined again.
Times are written for the encoder as sines, and for the language model as the tokens' own positions. Clips of a video
that `clip` does not divide are about equally long, and have as many memory tokens as the shortest.
Departs from the released code: no code was found.
"""

from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import pad

import winnow.contract as wn
from winnow.parts.evenly import evenly
from winnow.parts.frame_parts import rows_and_columns, share_of_parts
from winnow.parts.frames import frame_slots
from winnow.parts.learned import in_fp32, learned
from winnow.parts.recurrent_memory import RecurrentMemory, best_clips, clips_of


@wn.register("videostreaming")
class VideoStreaming(wn.Method):
    """Read a video clip by clip into a few memory tokens, and answer from the clips that fit the question.

    Args:
        clip: frames of a clip at most.
        per_frame: memory tokens for each frame of a clip.
        chosen: clips whose memory the language model is given; of fewer, all.
        last: whether the last clip, whose memory has seen the whole video, is always one of them.
        question: what the question is read from.
        weights: a file that `winnow train videostreaming` wrote, or `untrained`; default: those for the video model.
    """

    clip: Annotated[int, wn.Between(1)] = 16
    per_frame: Annotated[int, wn.Between(1)] = 4
    chosen: Annotated[int, wn.Between(1)] = 4
    last: bool = False
    question: wn.QuestionTokens = wn.QuestionTokens()
    weights: str | None = None

    across_frames = True
    identity = None

    def build(self, info: wn.ModelInfo):
        def make(dim: int = 128, heads: int = 4, depth: int = 2) -> RecurrentMemory:
            return RecurrentMemory(info.width, dim, heads, depth, self.clip)

        return learned(self.slug, self.weights, info, make)

    def steps(self, info: wn.ModelInfo):
        return (wn.Step(wn.Point("projected"), lambda view, state: self.recall(view), (self.question,)),)

    def recall(self, view: wn.View) -> wn.Emit:
        """The memory of the chosen clips."""
        t, slot = frame_slots(view, self.slug)
        order, wide = slot.argsort(1), torch.promote_types(view.tokens.dtype, torch.float32)
        broken = ~view.tokens.to(wide).sum(-1).isfinite()
        wn.count_broken(broken, view)
        sound = view.tokens.to(wide).masked_fill(broken[..., None], 0)
        x = torch.stack([own[at] for own, at in zip(sound, order, strict=True)]).unflatten(1, (t, -1))
        place = rows_and_columns(view, order, x.shape[2])
        text, share = (
            view[self.question].to(wide).nan_to_num(0, 0, 0),
            share_of_parts(view.layout, x.shape[2], self.per_frame, x.device),
        )
        lanes = [self.item(*lane, share, view.module) for lane in zip(x, text, place, order, strict=True)]
        made, weight, at = (torch.stack(part) for part in zip(*lanes, strict=True))
        return wn.Emit(made.to(view.tokens.dtype), provenance=wn.Reduction.mix(weight, representative=at))

    def item(self, x: Tensor, text: Tensor, place: Tensor, order: Tensor, share: Tensor, module: RecurrentMemory):
        """Of one video the memory tokens, what each place of the video counts in them, and where they stand."""
        (t, p, _), clips = x.shape, clips_of(len(x), self.clip)
        tokens, scores, seen = in_fp32(module, x[None], text[None], share, place[None])
        best = best_clips(scores, self.chosen, self.last)[0]
        groups = tokens.shape[2] // len(share)
        cells = evenly(p, len(share), x.device)
        where, weight = [], []
        for attention, (start, end) in zip(seen, clips, strict=True):
            weight.append(pad(attention[0], (start * p, (t - end) * p)))
            first = torch.arange(groups, device=x.device) * (end - start)
            where.append(((start + (first + groups - 1) // groups)[:, None] * p + cells).flatten())
        back = torch.stack(weight)[best].flatten(0, 1)[:, order.argsort()]
        at = order[torch.stack(where)[best].flatten()]
        return tokens[0][best].flatten(0, 1), back, at
