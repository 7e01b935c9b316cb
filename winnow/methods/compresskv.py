"""CompressKV (arXiv:2508.02401): the heads that retrieve choose the slots, and layers that evictions hurt get more.

Looks at: attention of the last `window` queries in a few heads of each layer. Cost: these rows, once.

Heads and layers are calibrated once for a model, on prompts that hide a needle. A head retrieves if it looks at the
whole needle while a token of it is written; the best heads of a layer score for all its KV heads, which keep the same
slots. A layer's budget grows with the error of its attention's output under a tiny budget; their mean is `keep`.
`calibrate(run)` writes both to a file that `calibration` names. Without one, all heads score, and budgets are uniform.

Departs from the paper: the calibration takes each prompt for a task of its own, and compares tokens, not words.
Departs from the released code: a needle's token that stands in it twice counts once; a budget that is a share of what
a later turn reads spreads over layers as that of the first.
"""

from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.contract import (
    Between,
    CacheMethod,
    Count,
    KVBudget,
    KVReduce,
    KVView,
    ModelInfo,
    WinnowError,
    register,
)
from winnow.parts.retrieval_heads import Calibration, Trace, head_scores, layer_budgets, layer_shares


@register("compresskv")
class CompressKV(CacheMethod):
    """Keeps the slots that retrieving heads attend to, more of them in layers that evictions hurt.

    Args:
        keep: slots of a head, the window among them; mean over layers.
        window: tokens at the end of the prompt that vote, and stay.
        kernel: width of the mean along the sequence that keeps neighbours of a peak together; 1 for none.
        heads: retrieving heads of each layer that score.
        floor: slots that every layer keeps at least.
        calibration: the file that `calibrate` wrote.
    """

    released = {"keep": 512, "window": 8, "kernel": 5, "heads": 4, "floor": 32}

    keep: KVBudget = KVBudget("20%")
    window: Annotated[int, Between(1)] = 8
    kernel: Annotated[int, Between(1)] = 5
    heads: Annotated[int, Between(1)] = 4
    floor: Count = 32
    calibration: str | None = None

    def check(self) -> None:
        if self.kernel % 2 == 0:
            raise WinnowError(f"compresskv: kernel={self.kernel}; allowed: odd numbers, so that a peak stays in place.")
        if self.calibration is not None:
            Calibration.load(self.calibration)

    def resolve(self, info: ModelInfo):
        known = self.known()
        if known and (len(known.heads) != info.depth or max(map(max, known.heads)) >= info.heads):
            raise WinnowError(
                f"compresskv: {self.calibration} is of a model with {len(known.heads)} layers and at least "
                f"{max(map(max, known.heads)) + 1} heads; {info.model} has {info.depth} and {info.heads}. Calibrate it."
            )
        return self

    def known(self) -> Calibration | None:
        return None if self.calibration is None else Calibration.load(self.calibration)

    def ends(self, view: KVView) -> tuple[int, int]:
        return 0, view.rows(self.window)

    def score(self, view: KVView) -> Tensor:
        known, w = self.known(), view.rows(self.window)
        heads = None if known is None else known.heads[view.layer][: self.heads]
        votes = self.votes(view.attention(w, heads))
        return F.pad(votes, (0, w), value=1.0)[:, None].expand(-1, view.heads, -1)

    def votes(self, attention: Tensor) -> Tensor:
        """`[b, N − w]` of the window's attention `[b, h, w, N]`."""
        summed = attention.sum(2)[..., : attention.shape[3] - attention.shape[2]]
        if summed.shape[2]:
            summed = F.avg_pool1d(summed, self.kernel, 1, self.kernel // 2)
        return summed.mean(1)

    def shorten(self, view: KVView, keep: KVBudget) -> KVReduce | None:
        known = self.known()
        if known and not (keep.is_all or keep.is_mass or keep.is_kinds or keep.is_layers):
            before = 0 if isinstance(keep.value, int) or keep.is_bytes else view.n - view.fresh
            average = keep.value if isinstance(keep.value, int) else view.budget(keep) - before
            keep = KVBudget(before + layer_budgets(known.shares, average, self.floor)[view.layer])
        return super().shorten(view, keep)

    def calibrate(self, run: Callable[..., Any], *, path: str = "compresskv.json", budget: int = 32) -> "CompressKV":
        """The method with heads and layers measured on needle prompts, and written to a file.

        Args:
            run: gives the traces of prompts, with the attention of a window of that many tokens
                (`winnow.learn.needles.traces`).
            path: of the file.
            budget: slots of the tiny budget under which layers are compared.
        """
        traces: list[Trace] = list(run(self.window))
        order = head_scores(traces).sort(dim=1, descending=True, stable=True).indices.tolist()

        def kept(layer: int, window: Tensor) -> Tensor:
            w, n = window.shape[1:]
            votes = self.votes(window[None, order[layer][: self.heads]])[0]
            best = votes.sort(descending=True, stable=True).indices[: max(0, budget - w)]
            return torch.cat([best, torch.arange(n - w, n, device=best.device)])

        shares = layer_shares(traces, kept).tolist()
        Calibration(tuple(map(tuple, order)), tuple(shares)).save(path)
        return self.replace(calibration=path)
