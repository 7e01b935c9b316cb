"""A word that tells a model's weights from those of another model of its shape: what learned parts were trained for."""

import hashlib
from typing import Any

import torch
from torch import Tensor

TAKEN = 4096  # values of the token embeddings


@torch.no_grad()
def fingerprint(model: Any) -> str:
    """16 hex digits of the vectors among a model's weights (norms, biases) and of a sample of its token embeddings.

    They are the same in float32, bfloat16 and float16, under quantisation of the matrices, and with adapters of PEFT
    beside the weights. What is offloaded is left out.
    """
    vectors = [p for p in model.parameters() if p.ndim == 1 and p.is_floating_point() and p.device.type != "meta"]
    embedding = model.get_input_embeddings().weight
    taken = [] if embedding.device.type == "meta" else [embedding.flatten()[:: max(1, embedding.numel() // TAKEN)]]
    digest = hashlib.sha256()
    for values in (*taken, *vectors):
        digest.update(_plain(values).numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain(values: Tensor) -> Tensor:
    """As every dtype can hold them: rounded to what both halves have."""
    return values.detach().to("cpu", torch.float16).to(torch.bfloat16).view(torch.int16)
