"""Handle: what `compress` returns."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from winnow.core.errors import WinnowError
from winnow.core.ledger import Ledger
from winnow.core.method import Method
from winnow.core.plan import FULL, Plan
from winnow.engine import saving
from winnow.engine.bound_model import BoundModel
from winnow.engine.bound_plan import BoundPlan
from winnow.engine.engine import Engine
from winnow.engine.frames import chosen_frames
from winnow.engine.kv import BoundedCache
from winnow.engine.merged import checked_placeholders
from winnow.engine.prompt import Prompt, chosen_prompt
from winnow.engine.prompt_items import checked_prompts
from winnow.engine.request import Override, overridden
from winnow.engine.spans import checked_spans
from winnow.models.families import unwrap
from winnow.models.picture_sizes import PictureSizes
from winnow.video import Video


class Handle:
    """A compressed model. Use it as a context manager, or until `detach()`.

    The plan that is attached is seen by all threads, a streamer's included; `using` overrides it in one context.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def model(self) -> Any:
        """The model itself; call it as usual."""
        return self._engine.bound.model

    @property
    def plan(self) -> Plan:
        """The plan that holds in this context."""
        return self._engine.active().plan

    @property
    def bound(self) -> BoundModel:
        """The model and its seams."""
        return self._engine.bound

    @property
    def info(self) -> Any:
        """What winnow knows of the model."""
        return self._engine.bound.info

    @property
    def attached(self) -> bool:
        return self._engine.attached

    @property
    def last(self) -> Ledger | None:
        """The ledger of the latest request.

        Of this thread or asyncio task, if it has made one; else of whichever made the latest. The main thread also sees
        what a thread did that has ended (a streamer's `Thread(target=model.generate)`). A request without pictures has
        a ledger too, whose `read_in_full` says why.
        """
        return self._engine.ledgers.last

    @property
    def timing(self) -> bool:
        """Whether ledgers carry times; each phase is then synchronised with the device, which costs time itself."""
        return self._engine.timing

    @timing.setter
    def timing(self, on: bool) -> None:
        self._engine.timing = bool(on)

    def bind(self, plan: str | Plan | Method) -> BoundPlan:
        """A plan, checked for this model: its steps, and what it listens to.

        Raises:
            UnsupportedError, WinnowError: as `compress` would.
        """
        return self._engine.bind(Plan.of(plan))

    def frames(self, video: Video, *, features: Tensor | None = None) -> Video:
        """The frames of a video that the steps of the plan at `frames` let in; the whole video where it has none.

        They are chosen before a processor makes inputs of them. Name the result in `using(videos=…)`, so that the
        ledger says what was chosen.

        Args:
            features: `[T, D]` what is known of each frame, for methods that ask for it.

        Raises:
            WinnowError: a step chose no frame, or frames that are not there.
            UnsupportedError: a step asked for anything but a selection.
        """
        return chosen_frames(self._engine.active(), video, features)

    def prompt(
        self, messages: Any, *, features: Tensor | None = None, question_features: Tensor | None = None
    ) -> Prompt:
        """Messages as the steps of the plan at `prompt`, `frames` and `pixels` let them in, ahead of a processor.

        Steps at `prompt` say which pictures enter, those at `frames` which frames of each video, those at `pixels` how
        each picture is cut and scaled (bicubic). Text stays as it is, and so do pictures that no step changed: they
        are the caller's own objects. What was given is not changed. Name the result in `using(prompt=…)`.

        Args:
            messages: of one conversation, as `processor.apply_chat_template` takes them. Pictures are parts such as
                `{"type": "image", "image": …}` with a PIL image, an array or a path of the local user; videos
                `{"type": "video", "video": winnow.open_video(…)}`. Messages of others may name files of yours: put
                opened pictures into them first.
            features: `[K, D]` what is known of each picture, for methods that ask for it.
            question_features: `[D]` what is known of the question, in the same space.

        Raises:
            WinnowError: the messages cannot be read or were prepared before, or a step asked for pictures, parts or
                sizes that cannot be had.
            UnsupportedError: a step asked for what is not done at its point, or the plan would leave a video as it is.
        """
        sizes = PictureSizes.of(self._engine.processor, self.info.token_side)
        return chosen_prompt(self._engine.active(), messages, features, question_features, sizes)

    def pictures(
        self,
        pictures: Sequence[Any],
        question: str = "",
        *,
        features: Tensor | None = None,
        question_features: Tensor | None = None,
    ) -> Prompt:
        """The same for pictures without messages; `.pictures` of the result are for `processor(images=…)`.

        Args:
            pictures: PIL images, arrays or paths, in the order of the prompt.
            question: that is asked about them, for methods that read it.
            features, question_features: as in `prompt`.
        """
        if isinstance(pictures, str) or not isinstance(pictures, Sequence):
            raise WinnowError(f"pictures= is a {type(pictures).__name__}; give a list of pictures.")
        parts = [{"type": "image", "image": picture} for picture in pictures]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
        return self.prompt(messages, features=features, question_features=question_features)

    @contextmanager
    def using(
        self,
        plan: str | Plan | Method | None = FULL,
        *,
        spans: Sequence[tuple[int, int]] | None = None,
        placeholders: Tensor | None = None,
        videos: Sequence[Video] | None = None,
        prompt: Prompt | Sequence[Prompt] | None = None,
    ) -> Iterator["Handle"]:
        """Another plan in this context only: this thread, this task. A thread that is started inside does not see it.

        Args:
            plan: `"full"` or None is the model without compression.
            spans: (start, end) of the question's tokens for each sample, padding included, where the default (text
                behind the last picture, less what the chat template adds) is not the question.
            placeholders: `[B, S]` booleans, for `inputs_embeds` that have pictures in them already: where their rows
                are. Each unbroken run is one picture; nothing is known of its grid, nor of the tower.
            videos: of the requests in this context, in the order of their prompts, as `frames` or `open_video` returned
                them: the ledger then says of each how its frames were chosen. Plans that choose frames need it.
            prompt: the request in this context, as `prompt` or `pictures` returned it; for a batch, one for each row.
                The ledger then says of each picture how it entered. Plans that choose, cut or scale pictures need it.
                It names the videos as well.
        """
        engine = self._engine
        if not engine.attached:
            raise WinnowError("this handle is detached; call winnow.compress again.")
        bound = engine.bind(Plan.of(FULL if plan is None else plan))
        prompts = checked_prompts(bound, engine.bound, prompt)
        entered = None if prompts is None else tuple(own.entered for own in prompts)
        if prompts is not None:
            if videos is not None or placeholders is not None:
                raise WinnowError("prompt= names pictures and videos already; leave out videos= and placeholders=.")
            videos = [video for own in prompts for video in own.videos]
        named = None if videos is None else tuple(video.sampled for video in videos)
        override = Override(bound, checked_spans(spans), checked_placeholders(placeholders), named, entered)
        with overridden(engine.attachment, override):
            yield self

    def bounded_cache(self, max_new_tokens: int) -> Any:
        """An empty cache for `past_key_values=`, whose keys and values are allocated once, behind the prompt.

        A head gets room for what the plan leaves of the prompt and `max_new_tokens` more, or for what the plan's
        `limit` lets it hold, if that is less; a decoded token is written in place. Later turns allocate again.

        Raises:
            WinnowError: the plan leaves the cache alone, or `max_new_tokens` is below 1.
            UnsupportedError: when the cache is filled: heads hold unequal numbers of slots, or a codec stores them.
        """
        if not self._engine.active().kv:
            raise WinnowError(f"{self.plan} leaves the cache alone; name a method of the cache.")
        if max_new_tokens < 1:
            raise WinnowError(f"max_new_tokens={max_new_tokens}; make room for at least 1.")
        return BoundedCache(self.bound.lm.config, max_new_tokens)

    def train(self, on: bool = True) -> "Handle":
        """Let gradients flow through the steps of learned methods, and set what they built to training mode."""
        self._engine.set_training(on)
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """What the methods of the plan built, for an optimiser. The model's own parameters are not among them."""
        for module in self._engine.parameters().values():
            yield from module.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of what the methods of the plan built."""
        parts = self._engine.parameters().items()
        return {f"{name}.{key}": value for name, part in parts for key, value in part.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put tensors of `state_dict` back. All of them must be there, in the right shape."""
        own = self.state_dict()
        wrong = sorted(set(own) ^ set(state)) or [k for k, v in own.items() if v.shape != state[k].shape]
        if wrong:
            raise WinnowError(f"these tensors do not fit the plan {self._engine.default.plan}: {', '.join(wrong[:5])}.")
        for name, part in self._engine.parameters().items():
            part.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})

    def save(self, folder: str | Path) -> Path:
        """Write the plan and what its methods built: `winnow.json`, and `winnow.safetensors` where there is any.

        `model.save_pretrained` of a compressed model writes the same files beside its weights.
        """
        return saving.write(folder, self._engine.default.plan.key, self.state_dict())

    def load(self, folder: str | Path) -> "Handle":
        """Load what `save` wrote for the same plan."""
        plan, own = saving.read_plan(folder), self._engine.default.plan
        if plan != own.key:
            raise WinnowError(f"{folder} holds {plan}; this model is compressed by {own.key}.")
        if self.state_dict():
            self.load_state_dict(saving.read_tensors(folder))
        return self

    def detach(self) -> None:
        """Leave the model as it was. Raises while another thread is inside the model; a second call does nothing."""
        self._engine.detach()

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return f"Handle({type(self.model).__name__}, {str(self._engine.default.plan)!r}, {state})"


def handle_of(model: Any) -> Handle | None:
    """The handle of a compressed model, wrapped by PEFT or torch.compile or not; None where it is not compressed."""
    method = getattr(unwrap(model), "__dict__", {}).get(saving.SaveMethod.name)
    return method.handle if isinstance(method, saving.SaveMethod) else None
