"""CoViPAL (arXiv 2508.17243): small scorers that see all visual tokens and the question prune at and early in the LM.

Looks at: the visual tokens at each cut, and the last rows of the question there. Cost: a transformer layer of width
d on V + T tokens for each cut, O(V · D · d + V² · d); d is a quarter of D, at most 256, and at least 96 or half of D.

At its cut a scorer S(H_v, H_t) gives each visual token a logit: both are normalised and projected to d channels, an
embedding tells them apart, a pre-norm layer lets all attend to all, and a linear head reads the visual ones. It is
trained with the model frozen: first on what the last token of the prompt attends to in a deeper layer, then through
the model, where the log of its gate is added to the attention logits of visual keys.
Departs from the paper: the width of the scorer, the cuts (half of the tokens at the LM's input, a quarter from a
quarter of its depth on) and that it reads no more than the last 32 tokens of the question are choices of ours.
Departs from the released code: the code was not at hand.
"""

import torch
from jaxtyping import Float
from torch import nn
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention

import winnow.contract as wn
from winnow.parts.cuts import check_cuts, cuts_of, geometric
from winnow.parts.learned import in_fp32, learned


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norms = heads, nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Float[torch.Tensor, "b n d"], seen: torch.Tensor, n: int) -> Float[torch.Tensor, "b v d"]:
        """The first n rows behind the layer; the others are only read."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q[:, :, :n], k, v, attn_mask=seen[:, None, None])
        x = x[:, :n] + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norms[1](x))))


class Scorer(nn.Module):
    """A logit for each visual token, from all of them and the text."""

    def __init__(self, width: int, dim: int, heads: int) -> None:
        super().__init__()
        self.visual, self.text = nn.Linear(width, dim), nn.Linear(width, dim)
        self.layer, self.norm, self.score = Layer(dim, heads), nn.LayerNorm(dim), nn.Linear(dim, 1)

    def forward(self, v: Float[torch.Tensor, "b n w"], t: Float[torch.Tensor, "b t w"]) -> Float[torch.Tensor, "b n"]:
        """Rows of zeros, and rows with a NaN or an infinity, are not there; the logits of the latter are NaN."""
        size = torch.cat([extent(v), extent(t)], 1)
        seen = size.isfinite() & (size > 0)
        x = torch.cat([self.visual(layer_norm(v, v.shape[-1:])), self.text(layer_norm(t, t.shape[-1:]))], 1)
        x = self.layer(x.masked_fill(~seen[..., None], 0), seen, v.shape[1])
        return self.score(self.norm(x))[..., 0].masked_fill(~size[:, : v.shape[1]].isfinite(), torch.nan)


def sizes_for(width: int) -> dict[str, int]:
    """Of a scorer, for an LM of this width: a quarter of it, at most 256.

    For narrow LMs half of it, up to 96: on the reference model, 192 wide, a scorer of 48 learns less of the question.
    """
    return {"dim": min(256, max(width // 16 * 4, min(96, width // 8 * 4))), "heads": 4}


def extent(x: Float[torch.Tensor, "b n w"]) -> Float[torch.Tensor, "b n"]:
    """0 for a row of zeros, finite for a row of finite numbers: one pass over what is wide."""
    return torch.linalg.vector_norm(x.detach(), ord=1, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


@wn.register("covipal")
class CoViPAL(wn.Method):
    """Keep the tokens that a trained scorer finds useful, from all tokens and the question, at one or more cuts.

    Args:
        ratios: budgets of the cuts, all of the tokens that entered the LM.
        layers: LM layers before which the cuts are made, ascending; default: equal parts of the first half from 0 on.
        weights: a file that `winnow train covipal` wrote, or `untrained`; default: those for the reference model.
    """

    ratios: tuple[wn.Budget, ...] = (wn.Budget(0.5), wn.Budget(0.25))
    layers: tuple[wn.Layer, ...] | None = None
    weights: str | None = None

    rounding = "floor"
    identity = {"ratios": ("100%", "100%")}

    def check(self) -> None:
        check_cuts("covipal", self.layers, self.ratios, first=0)

    def at_budget(self, budget, content: int):
        """Equal steps down to the budget."""
        return self.replace(ratios=geometric(budget, content, len(self.ratios), self.rounding))

    def resolve(self, info: wn.ModelInfo):
        cuts = len(self.ratios)
        budgets = cuts_of(info, self.layers, [i / cuts / 2 for i in range(cuts)], self.ratios, first=0)
        return self.replace(ratios=tuple(budgets.values()), layers=tuple(budgets))

    def build(self, info: wn.ModelInfo):
        def make(**sizes: int) -> nn.ModuleDict:
            own = sizes or sizes_for(info.width)
            return nn.ModuleDict({str(layer): Scorer(info.width, **own) for layer in self.layers or ()})

        return learned(self.slug, self.weights, info, make)

    def steps(self, info: wn.ModelInfo):
        return tuple(map(self._step, map(wn.QuestionRows, self.layers or ()), self.ratios))

    def _step(self, text: wn.QuestionRows, budget: wn.Budget) -> wn.Step:
        return wn.Step(wn.Point("layers", text.layer), lambda view, state: self.cut(view, text, budget), (text,))

    def cut(self, view: wn.View, text: wn.QuestionRows, budget: wn.Budget) -> wn.Reduction:
        """The map of the cut before the layer whose rows of the question are given."""
        scorer, items = view.module[str(text.layer)], zip(view.tokens.split(1), view[text].split(1), strict=True)
        logits = torch.cat([in_fp32(scorer, *item) for item in items])
        return wn.top_k(logits, budget.of(view.n_lm), view)
