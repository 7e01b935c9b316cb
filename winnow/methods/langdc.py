"""LangDC (arXiv 2509.00969): a small language model describes each chunk of a video; its states are the tokens.

Looks at: the projected tokens, and their frames, rows and columns. Cost: a pass of the small model for each word of the
longest description, O((V + words) · d² · depth) with d = 96, one word after the other.

A chunk of a few frames is described until the model stops: rich chunks get many words, still ones few. The states of
the words, projected, stand for the chunk, beside one mean of each frame that keeps raw cues. How many tokens that are
is known when the video has been seen. They stand in order of time, at the places of tokens of their chunk.
Departs from the paper: one frozen tower, whose tokens the small model reads unpooled; descriptions are lists of things
with colours and directions, up to 12 words (paper: sentences of up to 256); the language model is frozen, so that a
state is added to the mean of the tokens that its word was chosen by, which the model can read. A word's state is the
one at the word itself. A picture is one chunk.
Departs from the released code: `states=word` takes the embeddings of the words, as the code does; by default states are
those of the last layer, as the paper says. All chunks of a video are described together (code: batches of one).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

import winnow.contract as wn
from winnow.parts.captioner import Captioner, Said
from winnow.parts.chunks import Chunks, chunks_of
from winnow.parts.evenly import evenly
from winnow.parts.learned import in_fp32, learned

WORDS = 66  # of the vocabulary: the stop, the start, and what the world of clips has


@wn.register("langdc")
class LangDC(wn.Method):
    """Replace each chunk of a few frames by the states of a description of it, as long as there is something to say.

    Args:
        most: words of a description.
        every: frames of a chunk, of those that the tower gives.
        pooled: whether the mean of each frame stands beside the description.
        states: what stands for a word: its `contextual` state, or the `word` by itself.
        weights: a file that `winnow train langdc` wrote, or `untrained`; default: those for the video reference model.
    """

    most: Annotated[int, wn.Between(0, 256)] = 12
    every: Annotated[int, wn.Between(1)] = 2
    pooled: bool = True
    states: Literal["contextual", "word"] = "contextual"
    weights: str | None = None

    identity = None
    pairwise = True  # a picture is read as one chunk
    across_frames = True

    def build(self, info: wn.ModelInfo):
        def make(words: int = WORDS, width: int = 96, depth: int = 3, heads: int = 4) -> Captioner:
            return Captioner(info.width, words, width, depth, heads)

        return learned(self.slug, self.weights, info, make)

    def steps(self, info: wn.ModelInfo):
        return (wn.Step(wn.Point("projected"), self.emit),)

    def emit(self, view: wn.View, state: wn.State) -> tuple[wn.Emit, wn.State]:
        chunks = chunks_of(view, self.every, self.slug)
        each = zip(chunks.tokens, chunks.place, chunks.there, strict=True)
        layer = -1 if self.states == "contextual" else 0
        said = [in_fp32(view.module, *one, self.most, layer) for one in each]
        return self.laid(view, chunks, said), state

    def laid(self, view: wn.View, chunks: Chunks, said: Sequence[Said]) -> wn.Emit:
        """What is said of each item, in the order of the places that it takes."""
        counts = torch.stack([one.counts for one in said]).tolist()  # the one host read: it depends on the video
        items = [self._item(view, chunks, lane, said[lane], counts[lane]) for lane in range(view.b)]
        tokens, matrix, place = (pad_sequence([*own], batch_first=True) for own in zip(*items, strict=True))
        sizes = tuple(len(own) for _, _, own in items)
        came = wn.Reduction.mix(matrix, representative=place)
        came = came if len(set(sizes)) == 1 else replace(came, counts=sizes)
        return wn.Emit(tokens.to(view.tokens.dtype), came)

    def _item(self, view: wn.View, chunks: Chunks, lane: int, said: Said, counts: Sequence[int]):
        """Tokens `[M, D]` of an item, their sources `[M, N]`, and the places `[M]` that they take."""
        tokens, rows, places = [], [], []
        for c, size in enumerate(chunks.sizes):
            at, middle = chunks.at[lane, c, :size], chunks.frame // 2
            frames = at.unflatten(0, (-1, chunks.frame))
            free = at
            if self.pooled:
                fine = chunks.there[lane, c, :size].to(said.weights.dtype).unflatten(0, frames.shape)
                fine = fine + (fine.sum(1, keepdim=True) == 0)
                means = torch.block_diag(*(fine / fine.sum(1, keepdim=True)))
                tokens.append(means @ chunks.tokens[lane, c, :size].to(means.dtype))
                rows.append(means.new_zeros(len(means), view.n).index_copy(1, at, means))
                places.append(frames[:, middle])
                free = torch.cat([frames[:, :middle], frames[:, middle + 1 :]], 1).flatten()
            k = min(counts[c], len(free))
            tokens.append(said.tokens[c, :k])
            rows.append(said.weights.new_zeros(k, view.n).index_copy(1, at, said.weights[c, :k, :size]))
            places.append(free[evenly(len(free), k, free.device)] if k else free[:0])
        place, turn = torch.cat(places).sort()
        return torch.cat(tokens)[turn], torch.cat(rows)[turn], place
