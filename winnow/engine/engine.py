"""Engine: a plan attached to a model, by hooks on the model's own seams and nothing global."""

import contextlib
import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.plan import Plan
from winnow.core.signal import Site
from winnow.engine import deepstack, encoder
from winnow.engine.bound_model import BoundModel
from winnow.engine.bound_plan import BoundPlan
from winnow.engine.cache import state_of
from winnow.engine.checkpointing import BeforeCheckpoint, before_checkpoint, without_cache
from winnow.engine.clock import Clock
from winnow.engine.cross_pass import CrossPass
from winnow.engine.cross_reads import all_reads, check_reads, listen
from winnow.engine.encoding import record_of
from winnow.engine.forward import encodings_of, positions_of_later_turn, start_lm
from winnow.engine.hooks import ForwardMethod, Hook, stand_in
from winnow.engine.kv import check_model, enter_text, held_layers, hold, show_call, tell_cache
from winnow.engine.ledgers import text_ledger, write_ledger
from winnow.engine.question import QuestionReader, warn_of_the_template
from winnow.engine.request import Attachment, Ledgers, Override, Request, override_of, request_now
from winnow.engine.stretching import Stretched, check_rotation, stretches_of, stretching
from winnow.engine.text_encoder import TextEncoder
from winnow.engine.tower_hooks import TowerHooks
from winnow.engine.turns import Rereading, Turns, finish_turn, is_turn, shortened
from winnow.engine.versions import cache_of
from winnow.engine.watch import LayerWatch
from winnow.models.family import Family
from winnow.signals.clip import NEEDED
from winnow.signals.tap import Tap

_attached: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_attached_lock = threading.Lock()


def is_compressed(model: nn.Module) -> bool:
    """Whether a plan is attached to this very model."""
    with _attached_lock:
        return model in _attached


class Engine:
    """A model with a plan attached. What belongs to a request lives in its `Request` and on its cache, never here."""

    def __init__(
        self,
        model: Any,
        family: Family,
        plan: Plan,
        suffix: tuple[int, ...] | None = None,
        turns: Turns | None = None,
        processor: Any = None,
        text_encoder: Any = None,
    ) -> None:
        self.bound = BoundModel.of(model, family)
        self.processor = processor
        self.text_encoder = None if text_encoder is None else TextEncoder(text_encoder, self.bound.device)
        self.attachment = Attachment(self.bound)
        self.suffix, self.turns = suffix, turns or Turns()
        self.timing = False
        self.train = False
        self.ledgers = Ledgers()
        self._running: dict[int, str] = {}
        self._lock = threading.RLock()
        self._plans: dict[tuple[Any, ...], BoundPlan] = {}
        self._removers: list[Callable[[], None]] = []
        self._tapped: set[Site] = set()
        self._stretches = False
        self._tower = TowerHooks(self.bound, self._mine)
        self._layer_hooks: dict[int, Any] = {}
        self._checkpoints: dict[int, BeforeCheckpoint] = {}
        self._layer_users = 0
        self._forward: ForwardMethod | None = None
        self.default = self.bind(plan)

    @property
    def attached(self) -> bool:
        return self.attachment.attached

    def bind(self, plan: Plan) -> BoundPlan:
        """The plan, checked for this model, with its taps in place."""
        with self._lock:
            # Two classes may share a slug and settings (a variant that is tried): the key alone does not tell.
            key = (plan.key, *map(type, plan.methods))
            if key not in self._plans:
                dtype = next(self.bound.lm.parameters()).dtype
                if plan.positions == "compact" and not self.bound.compactable:
                    raise UnsupportedError(
                        f"positions=compact is defined for 1-D positions of layers that attend to everything before; "
                        f"{self.bound.info.model} has other ones. Use positions=keep."
                    )
                made = BoundPlan.of(plan, self.bound.info, self.bound.device, dtype)
                if made.kv:
                    check_model(self.bound, str(plan))
                if stretching(made) is not None:
                    check_rotation(self.bound, made)
                check_reads(self.bound, made)
                self._plans[key] = self._with_text_encoder(made) if made.needs_text_encoder else made
            made = self._plans[key]
            if self.bound.family.cross and (made.listeners or made.probed):
                looks = (str(signal) for own in (made.listeners, made.probed) for s in own.values() for signal in s)
                raise UnsupportedError(
                    f"{plan} looks at {', '.join(looks)}, which {self.bound.info.model} does not show: its pictures "
                    "are read by cross-attention. Use a method that looks at the tokens alone (`winnow methods` says "
                    "what each looks at)."
                )
            late = [layer for layer in made.layers if layer > self.bound.last_cut]
            if late:
                raise UnsupportedError(
                    f"{plan} acts at layers[{late[0]}], but later layers of {self.bound.info.model} read the keys of "
                    f"layer {self.bound.last_cut}, which tokens cannot leave any more; act at "
                    f"layers[{self.bound.last_cut}] or before."
                )
            if made.reads_question and self.suffix is None:
                self.suffix = ()  # said once
                warn_of_the_template(made)
            if self.attached:
                self._listen(made)
            return made

    def _with_text_encoder(self, plan: BoundPlan) -> BoundPlan:
        if self.text_encoder is None or self.processor is None:
            raise UnsupportedError(f"{plan.plan} {NEEDED}.")
        self.text_encoder.check(self.bound.info)
        return dataclasses.replace(plan, text_encoder=self.text_encoder)

    @property
    def override(self) -> Override | None:
        return override_of(self.attachment)

    def active(self) -> BoundPlan:
        """The plan of this context: its override, else the model-wide one."""
        override = self.override
        return self.default if override is None else override.plan

    def attach(self) -> None:
        model = self.bound.model
        with _attached_lock:
            if model in _attached:
                raise WinnowError(
                    "this model is compressed already: call detach() on its handle first, or use handle.using(plan)."
                )
            _attached.add(model)
        self.attachment.attached = True
        try:
            self._install()
            self._listen(self.default)
        except BaseException:
            self._remove()
            raise

    def detach(self) -> None:
        """Put everything back. A second call does nothing."""
        if not self.attached:
            return
        if self._running:
            busy = ", ".join(self._running.values())
            raise WinnowError(f"cannot detach: a request is running in {busy}; wait for it, then detach.")
        self._remove()

    def _remove(self) -> None:
        self.attachment.attached = False
        while self._removers:
            self._removers.pop()()
        self._tapped.clear()
        self._stretches = False
        self._tower.forget()
        with _attached_lock:
            _attached.discard(self.bound.model)

    def stand_in(self, owner: nn.Module, method: Any) -> None:
        """Put a method in the place of one of the model's, until detach."""
        self._removers.append(stand_in(owner, method))

    def _install(self) -> None:
        bound = self.bound
        for method in encoder.methods_of(bound, self._encoding):
            self.stand_in(method.base, method)
        self._forward = ForwardMethod(self._run_forward, bound.base)
        bound.base.forward = self._forward
        self._removers.append(self._forward.remove)
        self._hook(bound.base.register_forward_pre_hook(Hook(self._check_forward)))
        self._hook(bound.lm.register_forward_pre_hook(Hook(self._enter_lm), with_kwargs=True))
        # First in line, so that hooks that record outputs see what the caller will see.
        self._hook(bound.lm.register_forward_hook(Hook(self._leave_lm), with_kwargs=True, prepend=True))
        if hasattr(bound.lm, deepstack.NAME):
            self.stand_in(bound.lm, deepstack.DeepstackMethod(self._lm_pass, bound.lm))
        for handle in self._tower.install():
            self._hook(handle)

    def _hook(self, handle: Any) -> None:
        self._removers.append(handle.remove)

    def _listen(self, plan: BoundPlan) -> None:
        """Taps and hooks that a plan needs; they stay until detach."""
        for site in plan.listeners:
            self._tap(site)
        if stretching(plan) is not None and not self._stretches:
            self._stretches = True
            stretched = Hook(Stretched(self._lm_pass))
            self._hook(self.bound.lm.rotary_emb.register_forward_hook(stretched, with_kwargs=True))
        if plan.first_block is not None:
            for handle in self._tower.hook_blocks(plan):
                self._hook(handle)
            # Taps wherever tokens may be weighted or hidden from then on.
            for index in range(plan.first_block, len(self.bound.blocks)):
                self._tap(Site("vision", index))
        for layer in held_layers(self.bound) if plan.kv else ():
            self._tap(Site("lm", layer))  # a compressed cache attends where it is tapped
            if any(step.calls for _, step in plan.kv.get(layer, ())):  # type: ignore[attr-defined]
                attention = self.bound.attention_of(layer)
                self._hook(attention.register_forward_pre_hook(Hook(show_call), with_kwargs=True))
        for layer, wanted in plan.probed.items():
            if any(signal.site(self.bound.info).shows == "attention" for signal in wanted):
                self._tap(Site("lm", layer))
        for layer in {read.layer for read in all_reads(plan) if read.place == "heads"}:
            self._tap(Site("lm", layer))
        self._removers += listen(plan, self.attachment, self._lm_pass)

    def _tap(self, site: Site) -> None:
        if site not in self._tapped:
            self._tapped.add(site)
            self._removers.append(self._listener(site))

    def _listener(self, site: Site) -> Callable[[], None]:
        """What shows a site to its signals, and how to remove it."""
        bound = self.bound
        match site.stack, site.shows:
            case "vision", "attention":
                modules = [getattr(block, bound.family.attention) for block in bound.blocks_at(site.index)]
                seen = functools.partial(self._tower.see_attention, site)
                return _all([Tap(module, seen).remove for module in modules])
            case "vision", "hidden":
                watch = functools.partial(self._tower.see_block, site)
                blocks = bound.blocks_at(site.index)
                return _all([block.register_forward_hook(Hook(watch), with_kwargs=True).remove for block in blocks])
            case "sound", "attention":
                return Tap(bound.hearing_of(site.index), functools.partial(self._tower.see_sound, site)).remove
            case "lm", "attention":
                return Tap(bound.attention_of(site.index), functools.partial(self._see_lm, site.index)).remove
            case "lm", "hidden":
                norm = getattr(bound.lm, "norm", None)
                return LayerWatch(bound.layers[site.index], self._lm_pass, site.index, norm).remove
            case _:
                return _nothing  # pixels and the projector are seen anyway

    def _use_layers(self, request: Request, first: int) -> None:
        """Hook the layers from `first` on while a pass needs them; most decoded tokens need none."""
        with self._lock:
            for index in range(first, len(self.bound.layers)):
                if index not in self._layer_hooks:
                    hook = Hook(functools.partial(self._enter_layer, index))
                    # First in line: other hooks see what the layer is given.
                    self._layer_hooks[index] = self.bound.layers[index].register_forward_pre_hook(
                        hook, with_kwargs=True, prepend=True
                    )
                if index not in self._checkpoints:
                    change = functools.partial(self._enter_checkpoint, index)
                    if (stand_in := before_checkpoint(change, self.bound.layers[index])) is not None:
                        self._checkpoints[index] = stand_in
            if not request.uses_layers:
                self._layer_users += 1
                request.uses_layers = True

    def _leave_layers(self, request: Request) -> None:
        if not request.uses_layers:
            return
        with self._lock:
            request.uses_layers = False
            self._layer_users -= 1
            if not self._layer_users:
                for attached in (self._layer_hooks, self._checkpoints):
                    while attached:
                        attached.popitem()[1].remove()

    @contextlib.contextmanager
    def _encoding(self) -> Iterator[Request | None]:
        """The request that an encoder call belongs to: `generate` encodes before its first forward."""
        if not self.attached:
            yield None
        elif (request := self._mine()) is not None:
            yield request
        else:
            with self._opened(self._request(Clock(self.timing, self.bound.device))) as request:
                yield request

    def _request(self, clock: Clock) -> Request:
        made = Request(self.bound, self.attachment, self.active(), None, self.suffix, clock, train=self.train)
        if (override := self.override) is not None:
            made.spans, made.placeholders, made.videos = override.spans, override.placeholders, override.videos
            made.prompts, made.memory = override.prompts, override.memory
        if made.plan.text_signals:
            made.reader = self.reader
        return made

    @functools.cached_property
    def reader(self) -> QuestionReader:
        """Tells which tokens of a question count."""
        return QuestionReader.of(self.bound, self.processor)

    @contextlib.contextmanager
    def _opened(self, request: Request) -> Iterator[Request]:
        me, name = threading.get_ident(), threading.current_thread().name
        outer = self._running.get(me)
        self._running[me] = name
        token = request_now.set(request)
        try:
            yield request
        finally:
            request_now.reset(token)
            if outer is None:
                self._running.pop(me, None)

    def _check_forward(self, module: nn.Module, args: Any) -> None:
        if self._forward is not None and not self._forward.reached_by(module.__dict__.get("forward")):
            raise UnsupportedError(
                f"the forward of {type(module).__name__} was replaced while the model was compressed, so the plan "
                "would not hold; call detach() on its handle, replace it, and compress again."
            )

    def _run_forward(self, plain: Callable[..., Any], called: dict[str, Any]) -> Any:
        """One forward of the base model."""
        if not self.attached:
            return plain(**called)  # detached, but still under somebody's wrapper
        cache = cache_of(called)
        state, held = state_of(cache), cache is not None and cache.get_seq_length() > 0
        if state is not None and state.attachment.bound.model is self.bound.model:
            state.attachment = self.attachment  # detached and compressed again in between
        turn = is_turn(state, called)
        again = turn and self.turns.again and self.active().reads_text
        held = held and not again
        request = self._request(Clock(self.timing, self.bound.device, self._times(called, held)))
        request.encodings = encodings_of(called, request.plan)
        if state is not None and self.bound.info.mrope:
            called = {**called, "position_ids": positions_of_later_turn(state, called, self.bound.family.axes)}
        read = Rereading(request, state, cache) if again else None
        request.called = called if read is None else read.whole(called)
        if self.bound.lm is self.bound.base:
            request.called = enter_text(request, without_cache(self.bound, request.called))
        with self._opened(request):
            try:
                with request.clock.phase("decode" if held and request.memory is None else "prefill"):
                    output = plain(**request.called)
                if not request.reached_lm and request.plan.plan.methods:
                    self._explain_the_silence()
                if self.bound.lm is self.bound.base:
                    request.ledger = text_ledger(request, cache_of(request.called))
                filled = state_of(cache_of(output) if cache is None else cache)
                if filled is not None:
                    finish_turn(self.turns, request, filled, turn, held, read)
                if request.ledger is not None:
                    self.ledgers.add(request.ledger)
                return output if read is None else shortened(output, read.new)
            finally:
                self._leave_layers(request)
                if request.lm is not None:
                    request.lm.close()

    def _explain_the_silence(self) -> None:
        """A forward that did not pass our hook on the language model has run as the plain model."""
        self.bound.check_seams()
        raise UnsupportedError(
            f"{type(self.bound.base).__name__} did not call its language model, or the hooks on it were removed, so "
            "nothing was compressed; call detach() on the handle and compress again."
        )

    def _times(self, called: dict[str, Any], held: bool) -> dict[str, float] | None:
        """Where the times of this forward are summed: with its encoder's, or with its prefill's."""
        if not self.timing:
            return None
        ledger, override = self.ledgers.here, self.override
        part = override is not None and override.memory is not None  # of a stream, which adds up its own times
        if held and ledger is not None and not part:
            return ledger.times
        times: dict[str, float] = {}
        for output in (called.get("mm_encoder_outputs") or {}).values():
            record = record_of(output)
            for name, spent in (record.times if record is not None else {}).items():
                times[name] = times.get(name, 0.0) + spent
        return times

    def _mine(self) -> Request | None:
        """The request that is running in this context on this model; parts called alone have none."""
        request = request_now.get()
        return request if request is not None and request.bound is self.bound and request.runs else None

    def _lm_pass(self) -> Any:
        request = self._mine()
        return None if request is None else request.lm

    def _enter_lm(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        request = self._mine()
        if request is None:
            return None
        request.reached_lm = True
        request.positions = kwargs.get("position_ids")
        if self.bound.family.cross:
            request.cross = CrossPass(request, kwargs)
            changed = request.cross.enter()
            return None if changed is None else (args, changed)
        if kwargs.get("inputs_embeds") is None:
            return None
        given = without_cache(self.bound, kwargs) if request.plan.plan.methods else kwargs
        given = hold(request, given)
        request.lm = start_lm(request, given)
        tell_cache(request, given)
        if request.lm is None:
            return None if given is kwargs else (args, given)
        changed = request.lm.enter(given)
        request.lm.stretches = stretches_of(request.lm)
        if request.lm.items and request.lm.stretches is not None:
            request.lm.note({"stretched": max(1.0 if own is None else own.scale for own in request.lm.stretches)})
        changed = given if changed is None else changed
        first = request.lm.first_layer(changed)
        if first is not None:
            self._use_layers(request, first)
        return None if changed is kwargs else (args, changed)

    def _leave_lm(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Give outputs their logical length back, and write the ledger."""
        request = self._mine()
        if request is None:
            return None
        lm, request.lm = request.lm, None
        self._leave_layers(request)
        if isinstance(output, tuple):
            cache = next((x for x in output if hasattr(x, "get_seq_length")), None)
        else:
            cache = cache_of(output)
        if request.cross is not None:
            request.ledger = request.cross.leave(cache)
            return None
        if lm is None:
            if kwargs.get("inputs_embeds") is not None:
                request.ledger = write_ledger(request, None, kwargs, cache)
            return None
        if isinstance(output, tuple):
            output = (lm.leave(output[0], cache), *output[1:])
        else:
            output["last_hidden_state"] = lm.leave(output.last_hidden_state, cache)
            states = getattr(output, "hidden_states", None)
            if states is not None and lm.tokens.touched:
                output["hidden_states"] = lm.logical_states(states)
        request.ledger = write_ledger(request, lm, kwargs, cache)
        return output

    def _enter_layer(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a layer. Hidden states stay positional: hooks that record them read the first argument."""
        request = self._mine()
        if request is None or request.lm is None or request.checkpointed == index:
            return None
        if args:
            return request.lm.layer(index, args, kwargs)
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        return request.lm.layer(index, (kwargs["hidden_states"],), rest)

    def _enter_checkpoint(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a layer is checkpointed. Its own hook, inside the checkpoint, has nothing left to do."""
        changed = self._enter_layer(index, module, args, kwargs)
        if (request := self._mine()) is not None:
            request.checkpointed = index
        return changed

    def _see_lm(self, layer: int, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> None:
        lm = self._lm_pass()
        if lm is not None:
            lm.attention(layer, module, q, k, mask)

    def parameters(self) -> dict[str, nn.Module]:
        """What the methods of the default plan built, under names that a file can hold."""
        methods = self.default.plan.methods
        return {f"{number}:{methods[number].slug}": module for number, module in self.default.modules.items()}

    def set_training(self, on: bool) -> None:
        self.train = on
        for module in self.default.modules.values():
            module.train(on)


def _all(calls: list[Callable[[], None]]) -> Callable[[], None]:
    """One call for several."""

    def run() -> None:
        for call in calls:
            call()

    return run


def _nothing() -> None:
    pass
