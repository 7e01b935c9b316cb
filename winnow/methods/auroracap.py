"""AuroraCap (arXiv 2410.03051): merge similar tokens in every block of the vision tower, frame by frame.

Looks at: the keys of every vision block, mean over heads. Cost: O(N² / 4 · D_head) and a sort in each block.

ToMe's merging (see `winnow/methods/tome.py`), the same number of pairs in each block: int(N · (1 − ratio) / L) for N
patches and L blocks. Each frame is merged by itself. The blocks behind the one that feeds the projector do not count,
so that more is left than the ratio says: of 729 patches and 48 blocks 588, 400, 165 and 118 at 0.8, 0.5, 0.2 and 0.1.
The ledger has what was really left; `left` sets it.
Departs from the paper: the first frame is not encoded apart (slow-fast): a tile of the tower does not know its time.
Departs from the released code: tokens reach the LM at the places of those that they stand for; the code leaves those of
even places first. Positions are kept by default, as for all methods of winnow; the code numbers them anew. A tower
without [CLS] protects no token; the code then protects the first patch as if it were one. It also stretches position
embeddings to other resolutions, which is a matter of the model.
"""

from functools import partial

import winnow.contract as wn
from winnow.parts.pair_merge import merge_pairs, most_pairs, pairs_to


@wn.register("auroracap")
class AuroraCap(wn.Method):
    """Merge as many pairs of tokens in every block of the vision tower as a kept ratio says.

    Args:
        ratio: the kept ratio, if all blocks of the tower counted; in training it is 0.1.
        left: instead, patches of each tile that are left behind the last block that counts.
    """

    ratio: wn.Share = 0.8
    left: wn.Budget | None = None

    identity = {"ratio": 1.0, "left": None}
    released = {"ratio": 0.8, "positions": "compact"}

    def at_budget(self, budget, content: int):
        """As many pairs in every block as leave the budget; as a share, because tiles do not know of each other."""
        return self.replace(left=f"{float(100 * wn.Budget.parse(budget).share(content)):.8f}%")

    def steps(self, info: wn.ModelInfo):
        keys = [wn.VisionKeys(block) for block in range(wn.VisionKeys().block(info) + 1)]
        act = partial(self._step, keys, info.vision_depth)
        return tuple(wn.Step(wn.Point("blocks", i, "mlp"), partial(act, i), (k,)) for i, k in enumerate(keys))

    def pairs(self, view: wn.View, block: int, blocks: int, depth: int) -> int:
        """Pairs that merge in a block, of those that are there.

        Args:
            blocks: those up to the one that feeds the projector.
            depth: all blocks of the tower.
        """
        if self.left is not None:
            return pairs_to(view, self.left.of(view), block, blocks, "auroracap")
        return min(most_pairs(view), int(view.n_visual * (1 - self.ratio) / depth))

    def reduce(self, view: wn.View) -> wn.Reduction:
        """The merge of the only block of a tower, whose keys are the only signal."""
        return self._step([wn.VisionKeys()], 1, 0, view, wn.State())[0].reduction

    def _step(self, keys: list[wn.VisionKeys], depth: int, block: int, view: wn.View, state: wn.State):
        return merge_pairs(view, state, view[keys[block]], self.pairs(view, block, len(keys), depth))
