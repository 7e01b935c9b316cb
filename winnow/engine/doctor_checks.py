"""What `winnow doctor` checks, and the methods that it checks with: each check is one function and one line."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from winnow.core.errors import WinnowError
from winnow.core.info import ModelInfo
from winnow.core.method import Method
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.signal import Signal
from winnow.core.step import Action, Observe, Reduce, State, Step
from winnow.core.view import View
from winnow.engine.compress import compress
from winnow.engine.versions import cache_keyword, cache_of
from winnow.models.families import family_of, unwrap
from winnow.signals.language import LMAttention
from winnow.signals.vision import VisionAttention

STEPS = 4
# Largest difference of logits, relative to the largest logit, between two orders of the same sums.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Evenly(Method):
    """Keeps a share of the tokens, at equal distances and at least one: which ones is known without looking."""

    share: float = 0.25
    at: str = "projected"  # type: ignore[misc]
    slug: ClassVar[str] = "evenly"

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        return (Step(Point.of(self.at), self._reduce),)

    def _reduce(self, view: View, state: State) -> tuple[Action, State]:
        index = self.index(view.n).to(view.tokens.device)
        return Reduce(Reduction.select(index.expand(view.b, -1), view.n)), state

    def index(self, n: int) -> Tensor:
        """Which of n tokens stay, ascending."""
        count = max(1, int(n * self.share))
        return torch.arange(count) * n // count


@dataclass(frozen=True)
class Listen(Method):
    """Changes nothing; notes how much attention an item receives by each signal."""

    layer: int = 0
    looks: tuple[Signal, ...] = ()
    slug: ClassVar[str] = "listen"

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        return (Step(Point("layers", self.layer), self._note, self.looks),)

    def _note(self, view: View, state: State) -> tuple[Action, State]:
        view.notes["attention"] = [(view[s].amin().item(), view[s].sum(-1).amax().item()) for s in self.looks]
        return Observe(), state


@dataclass(frozen=True)
class Subject:
    """A model, two requests to it, and what the plain model answers to the first.

    Attributes:
        samples: the inputs of each request alone, ids `[1, S]`.
        batch: both, padded on the left.
        logits: `[1, S, vocabulary]` of the first.
        ids: `[1, S + STEPS]` its greedy answer.
    """

    model: Any
    samples: tuple[dict[str, Tensor], ...]
    batch: dict[str, Tensor]
    logits: Tensor
    ids: Tensor

    @staticmethod
    def of(model: Any, samples: Sequence[dict[str, Tensor]]) -> "Subject":
        first = samples[0]
        answer = model.generate(**first, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
        return Subject(model, tuple(samples), padded(samples), model(**first).logits, answer)

    @property
    def inner(self) -> Any:
        """The transformers model inside a wrapper."""
        return unwrap(self.model)

    @property
    def info(self) -> ModelInfo:
        return family_of(self.inner).info(self.inner)

    @property
    def middle(self) -> int:
        """An LM layer half way up, before which a step can act."""
        return self.info.at_depth(1 / 2)

    @property
    def bound(self) -> float:
        return TOLERANCE.get(self.logits.dtype, 1e-1)

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs, use_cache=True)

    def answer(self, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
        """`[B, STEPS]` a greedy answer, and `[B, STEPS, vocabulary]` the logits of each step."""
        greedy = {"do_sample": False, "max_new_tokens": STEPS, "min_new_tokens": STEPS}
        output = self.model.generate(
            **inputs, **greedy, return_dict_in_generate=True, output_logits=True, disable_compile=True, **options
        )
        return output.sequences[:, -STEPS:], torch.stack(output.logits, 1)


Run = Callable[[Subject], tuple[bool, str]]


def padded(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of requests, padded on the left to one token more than the longest has, so that there is padding."""
    width = max(sample["input_ids"].shape[1] for sample in samples) + 1
    batch = {}
    for name in samples[0]:
        parts = [sample[name] for sample in samples]
        if all(sample[name].shape == sample["input_ids"].shape for sample in samples):
            parts = [nn.functional.pad(part, (width - part.shape[1], 0)) for part in parts]
        elif parts[0].ndim == 5:  # tiles of unequal number
            most = max(part.shape[1] for part in parts)
            parts = [nn.functional.pad(part, (0, 0) * 3 + (0, most - part.shape[1])) for part in parts]
        batch[name] = torch.cat(parts)
    return batch


def apart(got: Tensor, want: Tensor) -> float:
    """Largest difference of logits `[T, vocabulary]`, relative to the largest logit of each step."""
    return ((got - want).abs().amax(-1) / want.abs().amax(-1)).max().item()


def told(error: float, subject: Subject) -> tuple[bool, str]:
    return error <= subject.bound, f"logits differ by {error:.1e} of the largest (allowed {subject.bound:.0e})"


def identity(subject: Subject) -> tuple[bool, str]:
    for at in ("projected", f"layers[{subject.middle}]"):
        with compress(subject.model, Evenly(1.0, at)):
            logits = torch.equal(subject.model(**subject.samples[0]).logits, subject.logits)
            ids = torch.equal(subject.answer(subject.samples[0])[0], subject.ids[:, -STEPS:])
        if not (logits and ids):
            return False, f"at {at}: logits {'equal' if logits else 'differ'}, ids {'equal' if ids else 'differ'}"
    return True, "logits and ids bit-identical at the connector and inside the LM"


def one_token(subject: Subject) -> tuple[bool, str]:
    with compress(subject.model, Evenly(0.0)) as handle:
        logits = subject.model(**subject.samples[0]).logits
        kept = [len(item.kept) for item in handle.last.items]  # type: ignore[union-attr]
    finite = bool(torch.isfinite(logits).all())
    return finite and kept == [1], f"kept {kept}, logits {'finite' if finite else 'not finite'}"


def subset(subject: Subject) -> tuple[bool, str]:
    """The prompt and each decoded token against the plain LM on the rows that stay, at their true positions."""
    method, inputs, inner = Evenly(), subject.samples[0], subject.inner
    with compress(subject.model, method) as handle:
        ids, got = subject.answer(inputs)
        item = handle.last.items[0]  # type: ignore[union-attr]
    entered: dict[str, Any] = {}
    lm: Any = inner.get_decoder()
    spy = lm.register_forward_pre_hook(lambda module, args, kwargs: entered.update(kwargs), with_kwargs=True)
    try:
        subject.model(**inputs)
    finally:
        spy.remove()
    embeds, positions = entered["inputs_embeds"], entered.get("position_ids")
    if positions is None:
        positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
    token = next(name for _, modality, name in family_of(inner).encoders if modality == item.modality)
    where = (inputs["input_ids"][0] == getattr(inner.config, token)).nonzero()[:, 0].cpu()
    content = where[torch.from_numpy(item.layout.content)]
    stays = torch.ones(embeds.shape[1], dtype=torch.bool)
    stays[content] = False
    stays[content[method.index(len(content))]] = True
    rows = stays.nonzero()[:, 0].to(embeds.device)
    cache = {cache_keyword(lm): DynamicCache(config=lm.config)}
    embeds, places = embeds[:, rows], positions[..., rows]
    want = []
    for step in range(STEPS):
        output = lm(inputs_embeds=embeds, position_ids=places, attention_mask=None, use_cache=True, **cache)
        want.append(inner.lm_head(output.last_hidden_state[:, -1]))
        embeds = inner.get_input_embeddings()(ids[:, step : step + 1])
        places = torch.full_like(positions[..., :1], int(positions.max()) + 1 + step)
    effect = apart(got[:, 0], subject.logits[:, -1])
    ok, detail = told(apart(got[0], torch.cat(want)), subject)
    return ok, f"{detail}; the reduction changes them by {effect:.1e}"


def by_hand(subject: Subject) -> tuple[bool, str]:
    inputs, keyword = subject.samples[0], cache_keyword(subject.inner)
    with compress(subject.model, Evenly()):
        ids, want = subject.answer(inputs)
        output = subject.forward(**inputs)
        got = [output.logits[:, -1]]
        for step in range(STEPS - 1):
            output = subject.forward(input_ids=ids[:, step : step + 1], **{keyword: cache_of(output)})
            got.append(output.logits[:, -1])
    return told(apart(torch.cat(got), want[0]), subject)


def cache_bytes(subject: Subject) -> tuple[bool, str]:
    inputs = subject.samples[0]
    full = _held(subject.forward(**inputs))
    seen, ok = [], True
    for at in ("projected", f"layers[{subject.middle}]"):
        with compress(subject.model, Evenly(at=at)) as handle:
            held, ledger = _held(subject.forward(**inputs)), handle.last
        ok = ok and 0 < held < full and (ledger.kv_bytes, ledger.kv_bytes_full) == (held, full)  # type: ignore[union-attr]
        seen.append(f"{held:,} at {at} (the ledger says {ledger.kv_bytes:,})")  # type: ignore[union-attr]
    return ok, f"bytes of the cache: {', '.join(seen)}, of {full:,}"


def _held(output: Any) -> int:
    layers = cache_of(output).layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def batch_at_connector(subject: Subject) -> tuple[bool, str]:
    return _batch(subject, "projected")


def batch_inside_lm(subject: Subject) -> tuple[bool, str]:
    return _batch(subject, f"layers[{subject.middle}]")


def _batch(subject: Subject, at: str) -> tuple[bool, str]:
    with compress(subject.model, Evenly(at=at)):
        ok, detail = told(_batch_error(subject), subject)
    return ok, detail if ok else f"{detail}; those of the plain model by {_batch_error(subject):.1e}"


def _batch_error(subject: Subject, **options: Any) -> float:
    """How far the answers of a padded batch, with these options of `generate`, are from those of its samples."""
    ids, logits = subject.answer(subject.batch, **options)
    alone = [subject.answer(sample) for sample in subject.samples]
    errors = []
    for row, (own_ids, own_logits) in enumerate(alone):
        # Behind a step at which the two said different words, they answer different prompts.
        same = int((ids[row] == own_ids[0]).long().cumprod(0).sum()) + 1
        errors.append(apart(logits[row, :same], own_logits[0, :same]))
    return max(errors)


def static_cache(subject: Subject) -> tuple[bool, str]:
    with compress(subject.model, Evenly()):
        try:
            error = _batch_error(subject, cache_implementation="static")
        except WinnowError:
            return True, "refused"
    return told(error, subject)


def attention(subject: Subject) -> tuple[bool, str]:
    """A tap in the tower, one in the LM, and a probe of an LM layer that has not run."""
    at = subject.middle
    looks: tuple[Signal, ...] = (VisionAttention(query="all"), LMAttention(at), LMAttention(max(0, at - 1)))
    with compress(subject.model, Listen(at, looks)) as handle:
        same = torch.equal(subject.model(**subject.samples[0]).logits, subject.logits)
        ranges = handle.last.notes["attention"]  # type: ignore[union-attr]
    ok = same and all(least >= 0 and total > 0 for least, total in ranges)
    ok = ok and all(total <= 1 + 1e-3 for _, total in ranges[1:])
    sums = ", ".join(f"{total:.2f}" for _, total in ranges)
    return ok, f"items receive {sums} of it (tower, LM); logits {'bit-identical' if same else 'differ'}"


def detached(subject: Subject) -> tuple[bool, str]:
    same = torch.equal(subject.model(**subject.samples[0]).logits, subject.logits)
    return same, "logits bit-identical to before" if same else "logits changed"


KEYWORD = "the keyword of the KV cache in the forward of the model, the LM and its layers (past_key_values, cache)"

# Name, check, and which seam of transformers is suspected when it fails.
CHECKS: tuple[tuple[str, Run, str], ...] = (
    ("keep all is the identity", identity, "the hooks around the encoder, the LM and its layers"),
    ("one token kept", one_token, "the placeholders in input_ids, and the layout of a picture's tokens"),
    (
        "a subset equals the same subset by hand",
        subset,
        "what enters the LM (inputs_embeds, position_ids, attention_mask), and its rotary embedding",
    ),
    ("decoding by hand equals generate", by_hand, KEYWORD),
    ("the KV cache holds less", cache_bytes, f"{KEYWORD}, and the layers of the cache (DynamicLayer)"),
    (
        "a padded batch equals its samples",
        batch_at_connector,
        f"masks (create_causal_mask), positions of padded rows, and {KEYWORD}",
    ),
    (
        "a padded batch equals its samples, cut inside the LM",
        batch_inside_lm,
        f"what a layer is given (attention_mask, position_embeddings), and {KEYWORD}",
    ),
    ("a static cache is refused or right", static_cache, f"the classes of cache layers (StaticLayer), and {KEYWORD}"),
    (
        "attention is seen, and left as it was",
        attention,
        "the attention interface (ALL_ATTENTION_FUNCTIONS, _attn_implementation)",
    ),
    ("detaching leaves nothing", detached, "what a forward keeps on the model"),
)
