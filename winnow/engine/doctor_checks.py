"""What `winnow doctor` checks, and the methods that it checks with: each check is one function and one line."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.info import ModelInfo
from winnow.core.layout import PAD, Layout
from winnow.core.ledger import ItemLedger
from winnow.core.method import Method
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.signal import Signal
from winnow.core.step import Action, Observe, Reduce, State, Step
from winnow.core.view import View
from winnow.engine.attach import attach as compress
from winnow.engine.bound_model import WINDOWED, BoundModel
from winnow.engine.doctor_reference import without, without_columns
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
        batch: both, padded on the left; empty where the class takes no padded batches.
        logits: `[1, S, vocabulary]` of the first.
        ids: `[1, S + STEPS]` its greedy answer.
        points: at which it is checked.
    """

    model: Any
    samples: tuple[dict[str, Tensor], ...]
    batch: dict[str, Tensor]
    logits: Tensor
    ids: Tensor
    points: tuple[str, ...]

    @staticmethod
    def of(
        model: Any,
        samples: Sequence[dict[str, Tensor]],
        batch: dict[str, Tensor] | None = None,
        points: tuple[str, ...] = ("projected", "layers"),
    ) -> "Subject":
        first = samples[0]
        answer = model.generate(**first, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
        both = padded(samples) if batch is None else batch
        return Subject(model, tuple(samples), both, model(**first).logits, answer, points)

    @property
    def places(self) -> tuple[str, ...]:
        """The points, with a layer."""
        return tuple(f"layers[{self.middle}]" if point == "layers" else point for point in self.points)

    @property
    def everywhere(self) -> tuple[str, ...]:
        """The places, and those in the tower that the class offers."""
        offered = {"features": "features", "blocks": "blocks[1]", "blocks.mlp": "blocks[1].mlp"}
        return (*(at for point, at in offered.items() if point in self.info.points), *self.places)

    @property
    def inner(self) -> Any:
        """The transformers model inside a wrapper."""
        return unwrap(self.model)

    @property
    def info(self) -> ModelInfo:
        return self.bound.info

    @property
    def middle(self) -> int:
        """An LM layer half way up, before which a step can act."""
        return min(self.info.at_depth(1 / 2), self.bound.last_cut)

    @property
    def tolerance(self) -> float:
        return TOLERANCE.get(self.logits.dtype, 1e-1)

    @functools.cached_property
    def bound(self) -> BoundModel:
        return BoundModel.of(self.inner, family_of(self.inner))

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
    return error <= subject.tolerance, f"logits differ by {error:.1e} of the largest (allowed {subject.tolerance:.0e})"


def identity(subject: Subject) -> tuple[bool, str]:
    half = subject.logits.dtype in (torch.float16, torch.bfloat16)
    for at in subject.everywhere:
        with compress(subject.model, Evenly(1.0, at)):
            got = subject.model(**subject.samples[0]).logits
            ids = torch.equal(subject.answer(subject.samples[0])[0], subject.ids[:, -STEPS:])
        logits = torch.equal(got, subject.logits)
        if half and at == "features":  # the projector sees the rows in another shape, and half precision rounds by it
            logits = apart(got[0], subject.logits[0]) <= subject.tolerance
        if not (logits and ids):
            return False, f"at {at}: logits {'equal' if logits else 'differ'}, ids {'equal' if ids else 'differ'}"
    return True, f"logits and ids bit-identical at {', '.join(subject.everywhere)}"


def one_token(subject: Subject) -> tuple[bool, str]:
    with compress(subject.model, Evenly(0.0)) as handle:
        logits = subject.model(**subject.samples[0]).logits
        kept = [len(item.kept) for item in handle.last.items]  # type: ignore[union-attr]
    finite = bool(torch.isfinite(logits).all())
    return finite and set(kept) == {1}, f"kept {kept}, logits {'finite' if finite else 'not finite'}"


def subset(subject: Subject) -> tuple[bool, str]:
    """The prompt and each decoded token against the plain model that cannot read the others."""
    method, inputs = Evenly(), subject.samples[0]
    with compress(subject.model, method) as handle:
        ids, got = subject.answer(inputs)
        items = handle.last.items  # type: ignore[union-attr]
    bound = subject.bound
    if bound.family.cross:
        want = without_columns(bound, subject.model, inputs, _unread_columns(subject, items, method), ids[0].tolist())
    else:
        want = without(bound, subject.model, inputs, _unread(subject, items, method), ids[0].tolist())
    effect = apart(got[:, 0], subject.logits[:, -1])
    ok, detail = told(apart(got[0], want), subject)
    return ok, f"{detail}; the reduction changes them by {effect:.1e}"


def _unread(subject: Subject, items: Sequence[ItemLedger], method: Evenly) -> Tensor:
    """The positions in the sequence that a method leaves out."""
    bound, ids, gone = subject.bound, subject.samples[0]["input_ids"][0], []
    for modality in {item.modality for item in items}:
        where = (ids == bound.token_ids[modality]).nonzero()[:, 0].cpu()
        own = [item.layout for item in items if item.modality == modality]
        for layout, at in zip(own, where.split([layout.n for layout in own]), strict=True):
            gone.append(at[torch.from_numpy(layout.content)][_left_out(layout, method)])
    return torch.cat(gone)


def _unread_columns(subject: Subject, items: Sequence[ItemLedger], method: Evenly) -> Tensor:
    """Which of the states that cross-attention layers read it leaves out, empty places among them."""
    inputs, gone = subject.samples[0], []
    layouts = subject.bound.family.cross_layouts(subject.inner, inputs)[0]
    width = items[0].layout.n
    for place, layout in enumerate(layouts):
        if layout is None:
            gone.append(place * width + torch.arange(width))
            continue
        content, idle = torch.from_numpy(layout.content), torch.from_numpy((layout.kind == PAD).nonzero()[0])
        gone += [place * width + content[_left_out(layout, method)], place * width + idle]
    return torch.cat(gone)


def _left_out(layout: Layout, method: Evenly) -> Tensor:
    return ~torch.isin(torch.arange(layout.n_content), method.index(layout.n_content))


def by_hand(subject: Subject) -> tuple[bool, str]:
    inputs = subject.samples[0]
    plain = subject.answer(inputs)
    try:
        alike = apart(_stepped(subject, plain[0]), plain[1][0]) <= subject.tolerance
    except Exception:  # a class that cannot be stepped so fails in its own way
        alike = False
    if not alike:
        return True, "not checked: the plain model itself does not decode by hand as it generates"
    with compress(subject.model, Evenly()):
        ids, want = subject.answer(inputs)
        return told(apart(_stepped(subject, ids), want[0]), subject)


def _stepped(subject: Subject, ids: Tensor) -> Tensor:
    """`[STEPS, vocabulary]` logits of a prefill and of one forward for each token, with the cache handed on."""
    output = subject.forward(**subject.samples[0])
    got = [output.logits[:, -1]]
    for step in range(STEPS - 1):
        held = {cache_keyword(subject.inner): cache_of(output)}
        output = subject.forward(input_ids=ids[:, step : step + 1], **held)
        got.append(output.logits[:, -1])
    return torch.cat(got)


def cache_bytes(subject: Subject) -> tuple[bool, str]:
    """The bytes that the ledger says; fewer than the plain model holds, where a layer behind the cut keeps all keys."""
    inputs, kinds = subject.samples[0], subject.bound.kinds
    full = _held(subject.forward(**inputs))
    seen, ok = [], True
    for at in subject.places:
        with compress(subject.model, Evenly(at=at)) as handle:
            held, ledger = _held(subject.forward(**inputs)), handle.last
        behind = kinds[0 if at == "projected" else subject.middle :]
        less = held < full if "full_attention" in behind else held <= full
        ok = ok and less and (ledger.kv_bytes, ledger.kv_bytes_full) == (held, full)  # type: ignore[union-attr]
        seen.append(f"{held:,} at {at} (the ledger says {ledger.kv_bytes:,})")  # type: ignore[union-attr]
    return ok, f"bytes of the cache: {', '.join(seen)}, of {full:,}"


def _held(output: Any) -> int:
    layers = [layer for layer in cache_of(output).layers if getattr(layer, "keys", None) is not None]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def batch_at_connector(subject: Subject) -> tuple[bool, str]:
    return _batch(subject, "projected")


def batch_inside_lm(subject: Subject) -> tuple[bool, str]:
    if "layers" not in subject.points:
        return True, "not checked: nothing is cut inside the LM"
    return _batch(subject, f"layers[{subject.middle}]")


def _batch(subject: Subject, at: str) -> tuple[bool, str]:
    if not subject.batch:
        return True, "not checked: this class takes no padded batches"
    with compress(subject.model, Evenly(at=at)):
        ok, detail = told(_batch_error(subject), subject)
    if ok:
        return ok, detail
    plain = _batch_error(subject)
    if plain > subject.tolerance:
        return True, f"not checked: padded batches of the plain model differ from their samples by {plain:.1e}"
    return ok, f"{detail}; those of the plain model by {plain:.1e}"


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
    if not subject.batch:
        return True, "not checked: this class takes no padded batches"
    with compress(subject.model, Evenly()):
        try:
            error = _batch_error(subject, cache_implementation="static")
        except WinnowError:
            return True, "refused"
        except Exception:  # of transformers, in any of its ways
            error = torch.inf
    if error > subject.tolerance:
        try:
            plain = _batch_error(subject, cache_implementation="static")
        except Exception:
            return True, "not checked: the plain model itself does not run with one"
        if plain > subject.tolerance:
            return True, f"not checked: the plain model differs with one by {plain:.1e}"
    return told(error, subject)


def attention(subject: Subject) -> tuple[bool, str]:
    """A tap in the tower, one in the LM, and a probe of an LM layer that has not run."""
    bound, at = subject.bound, subject.middle
    attends = [i for i in range(at + 1) if not bound.is_linear(i)] if "layers" in subject.points else []
    looks: list[Signal] = [LMAttention(i) for i in attends[-2:]]
    if bound.tower is not None:
        looks.append(VisionAttention(query="all"))
    if not looks:
        return True, "nothing can be looked at here"
    if bound.family.generic:
        try:
            with compress(subject.model, Listen(at, tuple(looks))):
                subject.model(**subject.samples[0])
        except UnsupportedError as error:
            return True, f"not checked: {error}"
    with compress(subject.model, Listen(at, tuple(looks))) as handle:
        same = torch.equal(subject.model(**subject.samples[0]).logits, subject.logits)
        ranges = handle.last.notes["attention"]  # type: ignore[union-attr]
    # The last token's window, or its chunk, can lie behind the picture.
    may_miss = [bound.kinds[i] in WINDOWED for i in attends[-2:]] + [False] * (len(looks) - len(attends[-2:]))
    seen = zip(ranges, may_miss, strict=True)
    ok = same and all(least >= 0 and (total > 0 or miss) for (least, total), miss in seen)
    ok = ok and all(total <= 1 + 1e-3 for _, total in ranges[: len(attends[-2:])])
    sums = ", ".join(f"{total:.2f} by {look}" for look, (_, total) in zip(looks, ranges, strict=True))
    return ok, f"items receive {sums}; logits {'bit-identical' if same else 'differ'}"


def detached(subject: Subject) -> tuple[bool, str]:
    same = torch.equal(subject.model(**subject.samples[0]).logits, subject.logits)
    return same, "logits bit-identical to before" if same else "logits changed"


KEYWORD = "the keyword of the KV cache in the forward of the model, the LM and its layers (past_key_values, cache)"

# Name, check, and which seam of transformers is suspected when it fails.
ENGINE_CHECKS: tuple[tuple[str, Run, str], ...] = (
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
