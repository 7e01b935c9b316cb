"""DART (arXiv 2502.11494): keep the tokens that are least like a few pivots; importance is no guide, duplication is.

Looks at: the norms of the keys of LM layer K − 1, and what that layer gives, for the image and for the text behind it.
Needs no attention weights. Cost: O(p · N · D) for the similarities to p = 8 pivots.

Pivots are the image tokens and the text tokens whose keys have the largest L1 norm (heads together, rotated). One pivot
after the other, image before text and larger norms first, takes those of the remaining image tokens that have the
lowest cosine similarity to it. Image pivots are kept, text pivots only choose.
Departs from the paper: exactly `keep` tokens are left; what does not divide by the pivots goes to the first of them.
Departs from the released code: the code compares hidden states behind the LM's last norm (`norm=true`), and has the
image pivots on top of the budget, which is rounded down to a multiple of the pivots (`on_top=true`). Its pivots take
their turns in the order of a Python set of positions in the prompt (`start=35` is where LLaVA-1.5's image begins; it
costs one read of the pivots on the host). Any batch size.
"""

import torch
from jaxtyping import Float, Int

import winnow.contract as wn
from winnow.parts.cosine import product, unit


@wn.register("dart")
class DART(wn.Method):
    """Keep the image tokens that duplicate none of a few pivots.

    Args:
        keep: content tokens that enter layer K.
        layer: K, the layers that run in full; the step acts before LM layer K.
        image_pivots: image tokens that are pivots; at most `keep` are.
        text_pivots: text tokens that are pivots; where there are fewer behind the image, the first ones come again.
        norm: whether hidden states are compared behind the LM's last norm, whose gains weigh the channels.
        on_top: whether image pivots come on top of the budget.
        start: the position of the item's first token in the prompt, for the turns of the released code; None: image
            before text, larger norms first.
    """

    keep: wn.Budget = wn.Budget(128)
    layer: wn.Layer = 2
    image_pivots: wn.Count = 4
    text_pivots: wn.Count = 4
    norm: bool = False
    on_top: bool = False
    start: wn.Count | None = None

    rounding = "floor"
    released = {"norm": True, "on_top": True, "start": 35, "positions": "keep"}

    def check(self) -> None:
        if self.layer < 1 or self.image_pivots + self.text_pivots < 1:
            raise wn.WinnowError(
                f"dart: layer={self.layer}, image_pivots={self.image_pivots}, text_pivots={self.text_pivots}; allowed: "
                "a layer from 1, since the one before it shows the keys, and at least one pivot."
            )

    def signals(self):
        layer = self.layer - 1
        found = wn.KeyNorm(layer), wn.TextKeyNorm(layer), wn.RowStates(layer, self.norm)
        return (*found, wn.LayerStates(layer, True)) if self.norm else found

    def steps(self, info: wn.ModelInfo):
        return (wn.Step(wn.Point("layers", info.lm_layer(self.layer)), self._one_step, self.signals()),)

    def reduce(self, view: wn.View) -> wn.Reduction:
        norms, text, states, *normed = (view[signal] for signal in self.signals())
        x, broken = unit(normed[0] if normed else view.tokens)
        wn.count_broken(broken, view)
        image = wn.ranked(wn.comparable(norms, view).masked_fill(broken, -torch.inf))
        keep, several = self.keep.of(view), self.image_pivots + self.text_pivots
        image = image[:, : min(self.image_pivots, view.n if self.on_top else keep)]
        first, slots = image.shape[1], self._words(wn.comparable(text, view))
        words, _ = unit(states.gather(1, slots[..., None].expand(-1, -1, states.shape[-1])))
        pivots = [torch.cat([own[at], word]) for own, at, word in zip(x, image, words, strict=True)]
        likeness = product(pivots, x).masked_fill(broken[:, None], torch.finfo(x[0].dtype).max)
        likeness = likeness.gather(1, self._turns(view, image, slots)[..., None].expand_as(likeness))
        taken = torch.zeros_like(broken).scatter_(1, image, True)
        rest, turns = min(keep, view.n) - first, likeness.shape[1]
        for turn, row in enumerate(likeness.unbind(1)):
            count = keep // several if self.on_top else rest // turns + (turn < rest % turns)
            order = torch.sort(row.masked_fill(taken, torch.inf), dim=1, stable=True).indices
            taken = taken.scatter(1, order[:, :count], True)
        left = first + turns * (keep // several) if self.on_top else keep
        return wn.Reduction.select(taken, counts=(min(left, view.n),) * view.b)

    def _words(self, norms: Float[torch.Tensor, "b p"]) -> Int[torch.Tensor, "b w"]:
        """The slots of the text pivots, larger norms first."""
        order = wn.ranked(norms)
        slots = order[:, torch.arange(self.text_pivots, device=order.device).clamp_max(order.shape[1] - 1)]
        return torch.where(norms.gather(1, slots) > -torch.inf, slots, order[:, :1])

    def _turns(
        self, view: wn.View, image: Int[torch.Tensor, "b i"], words: Int[torch.Tensor, "b w"]
    ) -> Int[torch.Tensor, "b t"]:
        """The numbers of the pivots, in the order in which they choose."""
        count = image.shape[1] + words.shape[1]
        if self.start is None:
            return torch.arange(count, device=image.device).expand(view.b, -1)
        at = torch.as_tensor(view.layout.content, device=image.device)[view.ids.gather(1, image)] + self.start
        rows = []
        for places in torch.cat([at, words], 1).tolist():
            numbers = [places.index(place) for place in set(places)]
            rows.append(numbers + [i for i in range(count) if i not in numbers])
        return torch.tensor(rows, device=image.device)
