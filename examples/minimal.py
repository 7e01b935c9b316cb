"""Visual token pruning in one file of plain PyTorch: the idea behind winnow, without winnow.

A LLaVA-shaped model turns a picture into 576 tokens and puts them before a question of a dozen. The language model
then spends nearly all its work on the picture. FasterVLM (arXiv 2412.01818) keeps only the patches that the vision
tower's [CLS] token attends to most. Three things matter; look for (1), (2) and (3) below.

  (1) One attention row is enough to choose: that of [CLS] over the patches.
  (2) Kept tokens keep their true positions, so RoPE still knows where in the picture they were.
  (3) Every layer reads fewer tokens in prefill, and the KV cache holds fewer while decoding.

The weights are random, so the answers mean nothing. What is printed holds for any weights.

    python examples/minimal.py
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE, PATCH = 336, 14  # pixels, as in LLaVA-1.5
V = (SIDE // PATCH) ** 2  # 576 visual tokens
C, D, H = 128, 256, 8  # width of the tower, width of the language model, attention heads
DEPTH, VOCAB = 12, 1000

# Shapes: B batch, N tokens of a sequence, V patches, M kept patches, T text tokens, d head size.


class Block(nn.Module):
    """A transformer block without its attention, which the tower and the language model do differently."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def heads(self, x: Tensor) -> list[Tensor]:
        """[B, N, width] -> queries, keys and values, each [B, H, N, d]."""
        return [part.unflatten(-1, (H, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)]

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Tower(nn.Module):
    """A small CLIP: patches and [CLS] in, patches out."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, C, PATCH, PATCH)
        self.cls = nn.Parameter(torch.randn(1, 1, C))
        self.place = nn.Parameter(torch.randn(1, 1 + V, C))
        self.blocks = nn.ModuleList(Block(C) for _ in range(3))

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, SIDE, SIDE] -> patches [B, V, C], and how much [CLS] attends to each of them [B, V]."""
        x = self.patches(picture).flatten(2).transpose(1, 2)  # [B, V, C]
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.place  # [B, 1 + V, C]
        for block in self.blocks:
            q, k, v = block.heads(x)
            x = block.finish(x, F.scaled_dot_product_attention(q, k, v))  # fused: no attention matrix
        # (1) The row of [CLS] in the last block: one query against all keys, averaged over heads.
        row = (q[:, :, :1] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)  # [B, H, 1, 1 + V]
        return x[:, 1:], row[:, :, 0, 1:].mean(1)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """RoPE: turn pairs of channels of x [B, H, N, d] by angles that grow with positions [N]."""
    half = x.shape[-1] // 2
    angle = positions[:, None] / 10000 ** (torch.arange(half) / half)  # [N, d / 2]
    a, b = x.split(half, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class LanguageModel(nn.Module):
    """A small causal decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.blocks = nn.ModuleList(Block(D) for _ in range(DEPTH))
        self.head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, VOCAB))

    def forward(self, x: Tensor, positions: Tensor, cache: dict) -> Tensor:
        """Read x [B, N, D] at positions [N] behind what the cache holds; logits [B, VOCAB] of the next token."""
        prefill = not cache
        for i, block in enumerate(self.blocks):
            q, k, v = block.heads(x)
            q, k = rotate(q, positions), rotate(k, positions)
            if i in cache:
                k, v = torch.cat([cache[i][0], k], 2), torch.cat([cache[i][1], v], 2)
            cache[i] = k, v  # [B, H, N so far, d]
            x = block.finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=prefill))
        return self.head(x[:, -1])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower, self.lm = Tower(), LanguageModel()
        self.projector = nn.Sequential(nn.Linear(C, D), nn.GELU(), nn.Linear(D, D))

    def prompt(self, picture: Tensor, question: Tensor, keep: int | None = None) -> tuple[Tensor, Tensor]:
        """The prompt [1, M + T, D] and its positions [M + T]; keep=None is the plain model."""
        patches, row = self.tower(picture)
        tokens, kept = self.projector(patches), torch.arange(V)  # [1, V, D], [V]
        if keep is not None:
            kept = row[0].topk(keep).indices.sort().values  # [M], in reading order
            tokens = tokens[:, kept]  # [1, M, D]
        x = torch.cat([tokens, self.lm.embed(question)], 1)
        return x, torch.cat([kept, V + torch.arange(question.shape[1])])  # (2) not 0, 1, 2, ...

    @torch.no_grad()
    def generate(self, picture: Tensor, question: Tensor, keep: int | None = None, new: int = 1) -> tuple:
        """Greedy decoding: the new token ids, the logits of the first one, and the cache."""
        cache: dict[int, tuple[Tensor, Tensor]] = {}
        x, positions = self.prompt(picture, question, keep)
        logits = first = self.lm(x, positions, cache)  # (3) prefill reads M + T tokens instead of V + T
        ids = [logits.argmax(-1)]
        for step in range(1, new):
            logits = self.lm(self.lm.embed(ids[-1][:, None]), positions[-1:] + step, cache)
            ids.append(logits.argmax(-1))
        return torch.cat(ids).tolist(), first, cache


def measure(model: Model, picture: Tensor, question: Tensor, keep: int | None) -> dict:
    """One request up to its first token: tokens and bytes in the cache, seconds, logits."""
    model.generate(picture, question, keep)  # warm up
    start = time.perf_counter()
    _, logits, cache = model.generate(picture, question, keep)
    seconds, held = time.perf_counter() - start, sum(k.nbytes + v.nbytes for k, v in cache.values())
    return {"tokens": cache[0][0].shape[2], "bytes": held, "seconds": seconds, "logits": logits}


def main(keep: int = 64) -> tuple[dict, dict, dict]:
    torch.manual_seed(0)
    model, picture, question = Model().eval(), torch.rand(1, 3, SIDE, SIDE), torch.randint(VOCAB, (1, 12))
    plain, full, pruned = (measure(model, picture, question, m) for m in (None, V, keep))
    print(f"tokens in prefill           {plain['tokens']} -> {pruned['tokens']}")
    print(f"KV cache                    {plain['bytes'] / 1e6:.1f} MB -> {pruned['bytes'] / 1e6:.1f} MB")
    print(f"keep-all equals plain       {torch.equal(full['logits'], plain['logits'])}, bit for bit")
    print(f"time to the first token     {plain['seconds'] / pruned['seconds']:.1f} times shorter")
    return plain, full, pruned


if __name__ == "__main__":
    main()
