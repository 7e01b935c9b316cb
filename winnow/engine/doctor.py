"""The engine's own checks on a user's checkpoint: no large checkpoint is tested anywhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from winnow.core.errors import WinnowError
from winnow.engine.compress import compress
from winnow.models.families import family_of, unwrap
from winnow.models.inputs import model_inputs

QUESTION = "What is in the picture?"
# Largest difference of logits, relative to the largest logit, between two orders of the same sums.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Check:
    """One check: its name, whether it held, and what was seen."""

    name: str
    ok: bool
    detail: str


def diagnose(model: Any, processor: Any) -> list[Check]:
    """Run the engine's checks on this model: identity, one token kept, a subset by hand, detaching.

    Raises:
        UnsupportedError: the model's family is not supported.
        WinnowError: the processor does not fit the model.
    """
    family_of(unwrap(model))
    inputs = model_inputs(model, processor, _picture(), QUESTION)
    checks = []
    with torch.no_grad():
        plain = model(**inputs).logits
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        for name, run in (
            ("keep all is the identity", _identity),
            ("one token kept", _one),
            ("a subset equals the same subset by hand", _subset),
        ):
            checks.append(_guarded(name, lambda run=run: run(model, inputs, plain, ids)))
        checks.append(_guarded("detaching leaves nothing", lambda: _detached(model, inputs, plain)))
    return checks


def _guarded(name: str, run: Any) -> Check:
    try:
        ok, detail = run()
    except WinnowError as error:
        return Check(name, False, str(error))
    except Exception as error:
        return Check(name, False, f"{type(error).__name__} in the model; transformers may have changed a seam")
    return Check(name, ok, detail)


def _picture() -> Image.Image:
    """A picture with structure everywhere."""
    ramp = torch.arange(336)
    pixels = torch.stack([ramp[None].expand(336, -1), ramp[:, None].expand(-1, 336), (ramp[None] ^ ramp[:, None])], -1)
    return Image.fromarray((pixels % 256).to(torch.uint8).numpy())


def _identity(model: Any, inputs: dict[str, Tensor], plain: Tensor, ids: Tensor) -> tuple[bool, str]:
    for plan in ("fastervlm:keep=100%", "fastv:layer=1,keep=100%"):
        with compress(model, plan):
            same = torch.equal(model(**inputs).logits, plain)
            told = torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), ids)
        if not (same and told):
            return False, f"{plan}: logits {'equal' if same else 'differ'}, ids {'equal' if told else 'differ'}"
    return True, "logits and ids bit-identical at the connector and inside the LM"


def _one(model: Any, inputs: dict[str, Tensor], plain: Tensor, ids: Tensor) -> tuple[bool, str]:
    with compress(model, "fastervlm:keep=1") as handle:
        logits = model(**inputs).logits
        kept = [len(item.kept) for item in handle.last.items]  # type: ignore[union-attr]
    finite = bool(torch.isfinite(logits).all())
    return finite and kept == [1] * len(kept), f"kept {kept}, logits {'finite' if finite else 'not finite'}"


def _subset(model: Any, inputs: dict[str, Tensor], plain: Tensor, ids: Tensor) -> tuple[bool, str]:
    with compress(model, "divprune:keep=25%") as handle:
        got = model(**inputs).logits[:, -1]
        item = handle.last.items[0]  # type: ignore[union-attr]
    seen: dict[str, Any] = {}
    inner: Any = unwrap(model)
    lm = inner.get_decoder()
    spy = lm.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    try:
        model(**inputs)
    finally:
        spy.remove()
    embeds = seen["inputs_embeds"]
    token = next(t for _, modality, t in family_of(inner).encoders if modality == item.modality)
    where = (inputs["input_ids"][0] == getattr(inner.config, token)).nonzero()[:, 0]
    content = where[torch.from_numpy(item.layout.content).to(where.device)]
    keep = torch.ones(embeds.shape[1], dtype=torch.bool, device=embeds.device)
    keep[content] = False
    keep[content[item.kept.to(content.device)]] = True
    positions = seen.get("position_ids")
    if positions is None:
        positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
    out = lm(
        inputs_embeds=embeds[:, keep],
        position_ids=positions[..., keep],
        attention_mask=None,
        past_key_values=DynamicCache(config=lm.config),
        use_cache=True,
    )
    want = inner.lm_head(out.last_hidden_state[:, -1])
    error = ((got - want).abs().max() / want.abs().max()).item()
    effect = ((got - plain[:, -1]).abs().max() / want.abs().max()).item()
    bound = TOLERANCE.get(embeds.dtype, 1e-1)
    seen_by = f"differs by {error:.1e} of the largest logit (allowed {bound:.0e}); the reduction by {effect:.1e}"
    return error <= bound, seen_by


def _detached(model: Any, inputs: dict[str, Tensor], plain: Tensor) -> tuple[bool, str]:
    same = torch.equal(model(**inputs).logits, plain)
    return same, "logits bit-identical to before" if same else "logits changed"
