"""VisionDrop (arXiv 2506.22283): visual tokens are ranked by visual tokens, in the encoder and at several LM layers.

Looks at: the [CLS] row and the keys of the feature block; in each LM layer behind a cut, the attention that visual
tokens pay each other, and the keys. Cost: O(V · C · D_head) in the tower; O(H · k · S · D) for each cut in the LM.

What text sees misleads three ways: the last token prefers late tokens, deep layers mix modalities, and text knows no
places. So before the projector tokens are chosen as VisionZip chooses them, and at each cut in the LM by the mean over
all visual tokens of the attention that they receive in the layer about to run, softmax over all that they see. At each
stage the best tokens stay, in their order, and behind them stand contextual ones: evenly spaced tokens of the rest,
to each of which the mean of those is added whose keys are most like its own. Newlines are dropped.
The default is the published schedule of 32 tokens in the mean over layers: 42 + 6 before the LM, and 30 + 5, 22 + 4,
16 + 3 after each quarter of its depth.
Departs from the paper: nothing known. The attention is causal, so that early tokens are seen by more queries, as in the
code; `visible=true` divides by their number. With several pictures, queries are those of all of them.
Departs from the released code: any batch size, number of pictures and size of prompt; for tiles the numbers are of the
item, split equally (in the code those before the LM are of a tile). Positions are kept by default, as for all methods
of winnow; the code numbers anew what is left after each cut (`positions=compact`).
"""

import torch

import winnow.contract as wn
from winnow.parts.contextual import of_tokens, of_tower
from winnow.parts.cuts import check_cuts, cuts_of, equal_parts
from winnow.parts.tower import tower_of


@wn.register("visiondrop")
class VisionDrop(wn.Method):
    """Keep what visual tokens attend to, and merge the rest, in the encoder and at several LM layers.

    Args:
        tokens: of the item, dominant ([CLS] of each tile included) and contextual ones together: before the LM, then
            after each cut in it.
        contextual: share of them that is contextual, or their number at each stage.
        layers: LM layers before which the cuts are made, ascending; default: equal parts of the depth.
        visible: whether attention that a token receives in the LM is divided by the number of tokens that can see it.
        row: the attention that ranks patches in the tower.
        keys: what they are merged by there.
    """

    tokens: tuple[wn.Budget, ...] = (wn.Budget(48), wn.Budget(35), wn.Budget(26), wn.Budget(19))
    contextual: wn.Share | tuple[wn.Count, ...] = 0.135
    layers: tuple[wn.Layer, ...] | None = None
    visible: bool = False
    row: wn.VisionAttention = wn.VisionAttention()
    keys: wn.VisionKeys = wn.VisionKeys()

    identity = None
    released = {"positions": "compact"}

    def check(self) -> None:
        stages, merged = len(self.tokens), self.contextual
        check_cuts("visiondrop", self.layers, self.tokens[1:], first=0)
        if len(merged) != stages if isinstance(merged, tuple) else merged >= 1:
            raise wn.WinnowError(f"visiondrop: contextual={merged!r}; allowed: a share below 1, or {stages} numbers.")

    def at_budget(self, budget, content: int):
        """The same schedule on the way to another number."""
        last, own = wn.Budget.parse(budget), [float(tokens.share(content)) for tokens in self.tokens]
        scaled = [float(last.share(content)) * part / own[-1] for part in own[:-1]]
        least = last.of(content)
        steps = [
            min(content, max(least, round(part * content))) if last.is_count else f"{100 * min(1, part):.6g}%"
            for part in scaled
        ]
        merged = self.contextual
        if isinstance(merged, tuple):
            merged = sum(merged) / sum(tokens.of(content) for tokens in self.tokens)
        return self.replace(tokens=(*steps, last), contextual=min(merged, 0.999))

    def steps(self, info: wn.ModelInfo):
        first = wn.Step(wn.Point("features"), lambda view, state: self.encode(view), (self.row, self.keys))
        cuts = len(self.tokens) - 1
        stages = cuts_of(info, self.layers, equal_parts(cuts), range(1, cuts + 1), first=0)
        return first, *(self._cut_at(layer, stage) for layer, stage in stages.items())

    def _cut_at(self, layer: int, stage: int) -> wn.Step:
        needs = wn.LMAttention(layer, "items"), wn.LMKeys(layer)
        return wn.Step(wn.Point("layers", layer), lambda view, state: self.cut(view, stage, *needs), needs)

    def _counts(self, stage: int, total: int) -> tuple[int, int]:
        """Dominant and contextual tokens of a stage."""
        own = self.contextual[stage] if isinstance(self.contextual, tuple) else int(total * self.contextual + 0.5)
        return total - min(own, total - 1), min(own, total - 1)

    def encode(self, view: wn.View) -> wn.Reduce:
        """The first stage, at `features`."""
        room = [len(patches) + 1 for patches in tower_of(view, "visiondrop").patches]
        total = self.tokens[0].of(view.n_visual)
        split = wn.split_evenly(total, room)
        others = [max(0, n - 1) for n in split]  # each tile has a dominant token
        merged = wn.split_evenly(min(self._counts(0, total)[1], sum(others)), others)
        counts = [(n - c, c) for n, c in zip(split, merged, strict=True)]
        return wn.Reduce(of_tower(view, "visiondrop", view[self.row], view[self.keys], counts), "drop")

    def cut(self, view: wn.View, stage: int, row: wn.LMAttention, keys: wn.LMKeys) -> wn.Reduce:
        """A later stage, in the LM."""
        score = view[row]
        if self.visible:
            score = score.to(torch.promote_types(score.dtype, torch.float32)) / _seen_by(view)
        d, c = self._counts(stage, min(view.n, self.tokens[stage].of(view)))
        return wn.Reduce(of_tokens(view, score, view[keys], d, c), "drop")


def _seen_by(view: wn.View) -> torch.Tensor:
    """How many of the item's tokens can see each of them."""
    return torch.arange(view.n, 0, -1, device=view.ids.device)
