"""From a model and its settings to a service: what is found out once, and refused before the first request."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from winnow.core.errors import UnsupportedError
from winnow.core.plan import Plan
from winnow.models.families import family_of, unwrap
from winnow.models.inputs import model_inputs
from winnow.models.text import Text
from winnow.serve.app import Service
from winnow.serve.engine import Engine
from winnow.serve.job import Job
from winnow.serve.metrics import Metrics
from winnow.serve.prompting import Prompter
from winnow.serve.reading import Reader
from winnow.serve.runners import Runners, batch_inputs, model_of, placeholder_tokens
from winnow.serve.schema import Sampling
from winnow.serve.settings import Settings


def make_service(model: Any, processor: Any, plan: Plan, settings: Settings) -> Service:
    """A service that answers with this model, under a plan of its own where requests bring none.

    Raises:
        WinnowError: the model cannot be served, or the plan does not run on it.
    """
    inner: Any = unwrap(model)
    family = family_of(inner)
    if isinstance(family, Text) or not hasattr(processor, "image_processor"):
        raise UnsupportedError("winnow serve answers with vision-language models; this is a language model.")
    tokens = placeholder_tokens(inner, family)
    if not tokens:
        raise UnsupportedError(f"{type(inner).__name__} has no placeholder of pictures in its prompts.")
    runners = Runners(model, processor, plan, settings.bucket)
    engine = Engine(runners, processor.tokenizer, settings.batch)
    metrics = Metrics(lambda: engine.counts)
    engine.on_batch = metrics.rows.observe
    _try(model, processor, runners)
    videos = "video" in {own for _, own, _ in family.encoders} and getattr(processor, "video_processor", None)
    return Service(settings, Reader(settings, Prompter(processor), tokens, bool(videos)), engine, metrics)


def context_of(model: Any) -> int | None:
    """Tokens that a model was made for; None: it does not say."""
    inner: Any = unwrap(model)
    found = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _try(model: Any, processor: Any, runners: Runners) -> None:
    """Read one grey picture under the server's plan, so that what cannot work is refused now."""
    inputs = model_inputs(model, processor, Image.new("RGB", (224, 224), "grey"), "what is this?")
    job = Job(inputs, (), None, Sampling(1, 0.0), lambda event: None)
    with torch.no_grad():
        ready = runners.ready(job)
        model_of(ready, runners).generate(**batch_inputs([ready]), max_new_tokens=1, do_sample=False)
