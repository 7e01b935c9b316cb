"""Methods on the bundled reference model: a fixed sample of test questions, and what is measured on it.

Shared by `test_directional_reference.py` and `tools/findings.py`, so that tests and documentation say the same numbers.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from winnow import reference
from winnow.bench.baselines import uniform_ids
from winnow.bench.meters import judge
from winnow.bench.native import padded
from winnow.bench.requests import Request, request, without_pixels
from winnow.bench.reuse import Encoded, Listen
from winnow.bench.tasks import Ask, Boxes, Task, open_world, world_task
from winnow.core.info import ModelInfo
from winnow.core.layout import Layout
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.core.point import Point
from winnow.core.reduction import Reduction
from winnow.core.signal import Signal
from winnow.core.step import Action, Observe, Reduce, State, Step
from winnow.core.view import View
from winnow.engine.compress import compress
from winnow.engine.handle import Handle
from winnow.methods.fastv import FastV
from winnow.models.load import load
from winnow.signals.language import LMAttention
from winnow.signals.vision import VisionAttention, VisionKeys

DETAILS = ("color", "shape", "place", "reading", "referring", "document", "two-hop")  # each has evidence
SCENES = 90
FIRST = 200_000  # seed of the first scene: the model's card and the benchmark use lower ones
BATCH = 15
SHARES = {"12.5 %": 32, "5 %": 13}  # of 256 tokens

Selector = Callable[[View, int], Reduction]  # a view behind the projector and a count, to a selection
PerScene = Float[np.ndarray, " s"]
Batches = list[tuple[list[Request], dict[str, Tensor], Encoded]]


@dataclass(frozen=True)
class Ear(Method):
    """Changes nothing, and keeps the views that it is shown.

    Args:
        tower: signals to hear at `features` and at `projected`.
        lm: layers whose last prompt token is heard before the next layer runs.
    """

    tower: tuple[Signal, ...] = field(default=(), metadata={"setting": False})
    lm: tuple[int, ...] = ()
    heard: dict[str, list[View]] = field(default_factory=dict, compare=False, metadata={"setting": False})

    slug: ClassVar[str] = "ear"

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        needs = {Point(name): self.tower for name in ("features", "projected")}
        needs |= {Point("layers", k + 1): (LMAttention(k),) for k in self.lm}
        return tuple(
            Step(point, functools.partial(self._hear, str(point)), signals) for point, signals in needs.items()
        )

    def _hear(self, point: str, view: View, state: State) -> tuple[Action, State]:
        self.heard.setdefault(point, []).append(view)
        return Observe(), state


@dataclass(frozen=True)
class Gap:
    """The mean of paired differences over scenes, with its 95 % interval (normal)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def gap(first: PerScene, second: PerScene) -> Gap:
    """`first` less `second`."""
    d = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    half = 1.96 * d.std(ddof=1) / len(d) ** 0.5
    return Gap(float(d.mean()), float(d.mean() - half), float(d.mean() + half))


@dataclass(repr=False, eq=False)  # a failing check shows what it compares
class Sample:
    """Questions on as many scenes, and the views that the model gave of them without compression.

    Attributes:
        evidence: `[scene, V]`, the tokens that the answer depends on.
        things: for each scene `[O, V]`, the tokens of each thing in it.
    """

    handle: Handle
    processor: Any
    requests: list[Request]
    views: dict[str, list[View]]

    def __post_init__(self) -> None:
        layout = self.layout
        self.evidence = torch.from_numpy(np.stack([layout.covering(r.evidence) for r in self.requests]))
        self.things = [torch.from_numpy(np.stack([layout.covering([o]) for o in r.objects])) for r in self.requests]
        self.objects = torch.stack([masks.any(0) for masks in self.things])
        self._encoded: list[tuple[frozenset[Signal], Batches]] = []
        self._answers: dict[str, tuple[PerScene, Tensor]] = {}
        self._seen: dict[str, PerScene] = {}

    def first(self, scenes: int) -> Sample:
        """The first scenes, in whole batches."""
        views = {point: own[: scenes // BATCH] for point, own in self.views.items()}
        return Sample(self.handle, self.processor, self.requests[:scenes], views)

    @property
    def layout(self) -> Layout:
        return self.views["projected"][0].layout

    def signal(self, signal: Signal, point: str = "projected") -> Float[Tensor, "s v"]:
        return torch.cat([view[signal] for view in self.views[point]])

    def kept(self, select: Selector, k: int) -> Bool[Tensor, "s v"]:
        """Which tokens a selection behind the projector keeps."""
        return torch.cat([select(view, k).kept for view in self.views["projected"]])

    def recall(self, kept: Bool[Tensor, "s v"], mask: Bool[Tensor, "s v"] | None = None) -> PerScene:
        """The share of the evidence (or of `mask`) that is kept."""
        mask = self.evidence if mask is None else mask
        return ((kept & mask).sum(1) / mask.sum(1)).double().numpy()

    def recall_of_things(self, kept: Bool[Tensor, "s v"]) -> PerScene:
        """The share that is kept of a thing, each counted alike however large it is; mean over the scene's things."""
        return np.array([((m & k).sum(1) / m.sum(1)).mean().item() for m, k in zip(self.things, kept, strict=True)])

    def overlap(self, score: Float[Tensor, "s v"], share: float = 0.1) -> PerScene:
        """Intersection over union of all things' tokens and the top tenth of a score."""
        kept = mask_of(score.topk(round(share * score.shape[1]), 1).indices, score.shape[1])
        return ((kept & self.objects).sum(1) / (kept | self.objects).sum(1)).double().numpy()

    def right(self, plan: str | Plan | Method) -> PerScene:
        """1 where `generate` under the plan answers the question, else 0."""
        return self.answers(plan)[0]

    def left(self, plan: str | Plan | Method) -> PerScene:
        """The share of the evidence that is left after the plan's last step."""
        return self.recall(self.answers(plan)[1])

    def seen(self, plan: str | Plan | Method) -> PerScene:
        """Visual tokens that the language model reads under the plan, in the mean over its layers."""
        self.answers(plan)
        return self._seen[Plan.of(plan).key]

    def encoded(self, plan: Plan) -> Batches:
        """Batches of questions with their pictures encoded, once for all plans that need no more than is recorded.

        A plan that acts in the tower encodes anew in any case. What the views have is recorded at once, because most
        plans need nothing else.
        """
        bound = self.handle.bind(plan)
        needed = frozenset(() if bound.acts_in_tower else bound.tower_signals)
        for recorded, made in self._encoded:
            if needed <= recorded:
                return made
        recorded = needed | frozenset(self.views["projected"][0].signals)
        reader = Plan((Listen(tuple(sorted(recorded, key=repr))),))
        made = [(own, b, Encoded(self.handle, reader, b)) for own, b in batches(self.requests)]
        self._encoded.append((recorded, made))
        return made

    @torch.no_grad()
    def answers(self, plan: str | Plan | Method) -> tuple[PerScene, Bool[Tensor, "s v"]]:
        """Which questions are answered, and which tokens are left. Pictures are encoded once for equal signals."""
        given = Plan.of(plan)
        if given.key in self._answers:
            return self._answers[given.key]
        right, kept, seen = [], [], []
        for own, batch, encoded in self.encoded(given):
            with self.handle.using(given):
                ids = self.handle.model.generate(
                    **without_pixels(batch),
                    mm_encoder_outputs={"image": encoded.under(given)},
                    max_new_tokens=reference.MAX_NEW_TOKENS,
                    do_sample=False,
                )
            said = self.processor.tokenizer.batch_decode(
                ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
            )
            right += [judge(text, r.ask.truth)[0] for text, r in zip(said, own, strict=True)]
            ledger = self.handle.last
            items = sorted(ledger.items, key=lambda item: item.row)
            kept += [mask_of(item.kept[None], item.n_visual) for item in items]
            text = np.array(ledger.logical) - [item.n_visual for item in items]
            seen += list(np.mean(ledger.layer_tokens, axis=0) - text)
        self._seen[given.key] = np.array(seen)
        self._answers[given.key] = np.array(right, dtype=float), torch.cat(kept)
        return self._answers[given.key]


def batches(requests: Sequence[Request]) -> Iterator[tuple[list[Request], dict[str, Tensor]]]:
    for at in range(0, len(requests), BATCH):
        own = list(requests[at : at + BATCH])
        yield own, padded([r.inputs for r in own], pad=0)


def questions() -> tuple[Ask, ...]:
    """One question of each scene, of the type that has been asked least so far."""
    scenes: dict[str, list[Ask]] = defaultdict(list)
    for ask in world_task(3 * SCENES, seed=FIRST, types=DETAILS).questions:
        scenes[ask.image].append(ask)
    used: Counter[str] = Counter()
    asked = []
    for own in list(scenes.values())[:SCENES]:
        asked.append(min(own, key=lambda ask: used[ask.type]))
        used[asked[-1].type] += 1
    return tuple(asked)


def _rolled(boxes: Boxes) -> Boxes:
    """Where boxes lie when the picture's halves have changed places; those on the seam are left out."""
    return tuple(
        (x0, (y0 + 0.5) % 1, x1, (y0 + 0.5) % 1 + y1 - y0) for x0, y0, x1, y1 in boxes if y0 >= 0.5 or y1 <= 0.5
    )


def _roll(ask: Ask) -> Image.Image:
    pixels = np.asarray(open_world(ask))
    return Image.fromarray(np.roll(pixels, len(pixels) // 2, axis=0))


@contextmanager
def opened(folder: str | None = None, *, words: bool = False) -> Iterator[tuple[Sample, Sample]]:
    """The sample, and the same pictures with the upper and the lower half exchanged (of which less is heard).

    `folder` holds another model of the recipe than the shipped one. With `words` the processor tells the words of a
    question from those of the template behind it.
    """
    torch.set_num_threads(1)
    model, processor = load(folder, device="cpu", dtype="float32")
    asked = questions()
    with compress(model, Plan(()), processor=processor if words else None) as handle:
        depth, blocks = handle.info.depth, range(handle.info.vision_depth)
        tower = [VisionAttention(block, query=query) for block in (*blocks, "feature", -1) for query in ("cls", "all")]
        tower.append(VisionAttention(query="auto"))  # as FasterVLM asks for it
        every = Ear((*tower, VisionKeys()), tuple(range(depth - 1)))
        few = Ear((VisionAttention(query="auto"),), (1, 2))  # for FasterVLM and for FastV at two depths
        yield (
            sampled(handle, processor, every, Task({}, asked, open_world)),
            sampled(handle, processor, few, Task({}, asked, _roll)),
        )


@torch.no_grad()
def sampled(handle: Handle, processor: Any, ear: Ear, task: Task) -> Sample:
    """Questions, and what an ear hears of them without compression."""
    requests = [request(handle.model, processor, task, ask) for ask in task.questions]
    for _, batch in batches(requests):
        with handle.using(Plan((ear,))):
            handle.model(**batch)
    return Sample(handle, processor, requests, ear.heard)


def evenly(view: View, k: int) -> Reduction:
    """k tokens evenly spread over the grid, or over what is left of it."""
    whole = view.n == view.layout.n_content
    index = torch.tensor(uniform_ids(view.layout, k)) if whole else torch.arange(k) * view.n // k
    return Reduction.select(index.expand(view.b, -1), view.n)


def at_random(view: View, k: int) -> Reduction:
    """k tokens at random, others for each item."""
    generator = torch.Generator().manual_seed(int(view.tokens[0, 0, 0].view(torch.int32)))
    return Reduction.select(torch.rand(view.b, view.n, generator=generator).topk(k).indices.sort(1).values, view.n)


@dataclass(frozen=True)
class CutByStub(Method):
    """The cuts of PyramidDrop or FastV, by a selection that looks at nothing."""

    select: Selector = field(default=at_random, metadata={"setting": False})
    layers: tuple[int, ...] = ()
    keep: tuple[int, ...] = ()
    name: str = ""  # plans of equal settings are the same plan

    slug: ClassVar[str] = "cut-by-stub"

    def steps(self, info: ModelInfo) -> tuple[Step, ...]:
        return tuple(
            Step(Point("layers", layer), functools.partial(self._cut, k))
            for layer, k in zip(self.layers, self.keep, strict=True)
        )

    def _cut(self, k: int, view: View, state: State) -> tuple[Action, State]:
        return Reduce(self.select(view, k)), state


def mask_of(index: Int[Tensor, "s k"], n: int) -> Bool[Tensor, "s n"]:
    return torch.zeros(len(index), n, dtype=torch.bool).scatter_(1, index, True)


def by_lm(sample: Sample, layer: int, k: int) -> Bool[Tensor, "s v"]:
    """What FastV keeps before LM layer `layer`."""
    method = FastV(keep=k, layer=layer)
    return torch.cat([method.reduce(view).kept for view in sample.views[f"layers[{layer}]"]])


def lower_less_upper(sample: Sample, rolled: Sample, kept: Tensor, kept_rolled: Tensor) -> Gap:
    """Recall of a thing when it lies in the lower half, less that of the same thing in the upper half."""
    found = moved(sample, rolled, kept, kept_rolled)
    return gap(found, np.zeros(len(found)))


def moved(sample: Sample, rolled: Sample, kept: Tensor, kept_rolled: Tensor) -> Float[np.ndarray, " moved"]:
    """The same by scenes that have such a thing.

    Each thing that the middle line does not cut is seen in both places; mean over the things of a scene.
    """
    found = []
    for r, k, q in zip(sample.requests, kept, kept_rolled, strict=True):
        whole = [box for box in r.objects if box[1] >= 0.5 or box[3] <= 0.5]
        here, there = (
            [_share(sample.layout, box, mask) for box in boxes] for boxes, mask in ((whole, k), (_rolled(whole), q))
        )
        if whole:
            sign = [1 if box[1] >= 0.5 else -1 for box in whole]
            found.append(np.mean([s * (a - b) for s, a, b in zip(sign, here, there, strict=True)]))
    return np.array(found)


def _share(layout: Layout, box: tuple[float, ...], kept: Bool[Tensor, " v"]) -> float:
    mask = layout.covering([box])  # type: ignore[list-item]
    return float(kept.numpy()[mask].mean())


def blind_cuts(select: Selector, layers: Sequence[int], keep: Sequence[int]) -> CutByStub:
    return CutByStub(select, tuple(layers), tuple(keep), select.__name__)


def spread(view: View, reduction: Reduction) -> PerScene:
    """The smallest cosine distance between two kept tokens."""
    x = normalize(reduction.apply(view.tokens).float(), dim=-1)
    distance = 1 - x @ x.mT + 3 * torch.eye(x.shape[1])
    return distance.amin((1, 2)).double().numpy()


def radius(view: View, reduction: Reduction) -> PerScene:
    """The largest cosine distance of a token to the nearest that is kept."""
    return (1 - _nearest(view.tokens, reduction.apply(view.tokens))).amax(1).double().numpy()


def _nearest(x: Float[Tensor, "b n d"], to: Float[Tensor, "b m d"]) -> Float[Tensor, "b n"]:
    return (normalize(x.float(), dim=-1) @ normalize(to.float(), dim=-1).mT).amax(2)


def lost(view: View, reduction: Reduction) -> PerScene:
    """The mean cosine distance of a dropped patch to the nearest output, at `features` ([CLS] first)."""
    patches = view.tokens[:, 1:]
    dropped = ~mask_of(reduction.representatives, view.n)[:, 1:]
    error = (1 - _nearest(patches, reduction.apply(view.tokens))) * dropped
    return (error.sum(1) / dropped.sum(1)).double().numpy()


def over(views: Sequence[View], measure: Callable[[View], PerScene]) -> PerScene:
    return np.concatenate([measure(view) for view in views])
