"""Any order of attaching, using, failing, interrupting and detaching, in two threads, leaves the model as it was."""

from __future__ import annotations

import concurrent.futures

import pytest
import zoo
from cases import same
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from probes import Pick, Probed, Received, Tapped, generate
from snapshot import differences, same_weights, snapshot, weights

import winnow
from winnow.core.plan import Plan

STEPS = 2
PLANS = (Pick(keep=4), Tapped(), Probed(), Plan((Received(keep=3), Tapped(keep=2, layer=1))), Plan(()))
ERRORS = (RuntimeError, KeyboardInterrupt, SystemExit)
WHO = st.sampled_from((0, 1))
PLACES = st.integers(0, zoo.DEPTH)


class Sequences(RuleBasedStateMachine):
    """Two threads that live as long as the machine; every rule runs in one of them, some in both at once."""

    build: str

    @initialize()
    def start(self):
        self.model, self.inputs = zoo.model(self.build), zoo.inputs(self.build, zoo.MIXED)
        self.pools = [concurrent.futures.ThreadPoolExecutor(1) for _ in range(2)]
        self.plain = generate(self.model, self.inputs, steps=STEPS)
        self.before, self.weights = snapshot(self.model), weights(self.model)
        self.handle = None
        self.plan = None
        self.outputs = {Plan(()): self.plain}

    def teardown(self):
        for pool in getattr(self, "pools", ()):
            pool.shutdown()
        if not hasattr(self, "outputs"):  # the start has failed: what it says is not to be hidden by another error
            return
        if self.handle is not None:
            self.handle.detach()
        assert differences(self.before, snapshot(self.model)) == []
        assert same(generate(self.model, self.inputs, steps=STEPS), self.plain)

    def within(self, who, work):
        return self.pools[who].submit(work).result(60)

    def say(self, plan=None):
        """A request under the attached plan, or under another."""
        if plan is None:
            return generate(self.model, self.inputs, steps=STEPS)
        with self.handle.using(plan):
            return generate(self.model, self.inputs, steps=STEPS)

    def expect(self, output, plan):
        """The first output of a plan is remembered; every later one equals it bit for bit, whatever lay between."""
        assert same(output, self.outputs.setdefault(plan, output))

    @precondition(lambda self: self.handle is None)
    @rule(who=WHO, plan=st.sampled_from(PLANS[:-1]))
    def attach(self, who, plan):
        self.handle = self.within(who, lambda: winnow.compress(self.model, plan))
        self.plan = plan

    @precondition(lambda self: self.handle is not None)
    @rule(who=WHO, plan=st.sampled_from(PLANS[:-1]))
    def attach_again(self, who, plan):
        with pytest.raises(winnow.WinnowError):
            self.within(who, lambda: winnow.compress(self.model, plan))

    @precondition(lambda self: self.handle is None)
    @rule(who=WHO)
    def use_plain(self, who):
        self.expect(self.within(who, self.say), Plan(()))

    @precondition(lambda self: self.handle is not None)
    @rule(who=WHO)
    def use(self, who):
        self.expect(self.within(who, self.say), self.plan)

    @precondition(lambda self: self.handle is not None)
    @rule(who=WHO, plan=st.sampled_from(PLANS))
    def using(self, who, plan):
        self.expect(self.within(who, lambda: self.say(plan)), plan)

    @precondition(lambda self: self.handle is not None)
    @rule(plans=st.tuples(st.sampled_from(PLANS), st.sampled_from(PLANS)))
    def both_at_once(self, plans):
        futures = [pool.submit(self.say, plan) for pool, plan in zip(self.pools, plans, strict=True)]
        for future, plan in zip(futures, plans, strict=True):
            self.expect(future.result(60), plan)

    @rule(who=WHO, error=st.sampled_from(ERRORS), place=PLACES, other=st.sampled_from((None, *PLANS)))
    def fail(self, who, error, place, other):
        """In the tower, or in a layer; under the attached plan, another, or none."""
        tower = self.model.model.visual if self.build == "qwen2_5_vl" else self.model.model.vision_tower
        module = tower if place == zoo.DEPTH else self.model.model.language_model.layers[place]

        def raising(*args):
            raise error("on purpose")

        def work():
            hook = module.register_forward_hook(raising)
            try:
                with pytest.raises(error):
                    self.say(other if self.handle is not None else None)
            finally:
                hook.remove()

        self.within(who, work)

    @precondition(lambda self: self.handle is not None)
    @rule(who=WHO)
    def leave_by_exception(self, who):
        def work():
            with self.handle:
                self.expect(self.say(), self.plan)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            self.within(who, work)
        self.handle = self.plan = None

    @precondition(lambda self: self.handle is not None)
    @rule(who=WHO, twice=st.booleans())
    def detach(self, who, twice):
        self.within(who, self.handle.detach)
        if twice:
            self.within(1 - who, self.handle.detach)
        self.handle = self.plan = None

    @invariant()
    def a_detached_model_is_the_plain_one(self):
        if hasattr(self, "pools") and self.handle is None:
            assert differences(self.before, snapshot(self.model)) == []
            assert same_weights(self.weights, weights(self.model))
            assert same(generate(self.model, self.inputs, steps=STEPS), self.plain)


def machine(build: str, examples: int, derandomize: bool) -> type:
    case = type(f"Sequences_{build}", (Sequences,), {"build": build}).TestCase
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=15,
        deadline=None,
        derandomize=derandomize,
        suppress_health_check=list(HealthCheck),
    )
    return case


TestLlavaClip = machine("llava_clip", 8, derandomize=True)
TestQwen = machine("qwen2_5_vl", 8, derandomize=True)


@pytest.mark.full  # what is attached to is as in llava_clip
class TestLlavaNext(machine("llava_next", 8, derandomize=True)):
    pass


@pytest.mark.full
class TestLlavaSiglip(machine("llava_siglip", 8, derandomize=True)):
    pass


@pytest.mark.full
class TestLlavaClipLong(machine("llava_clip", 100, derandomize=False)):
    pass


@pytest.mark.full
class TestQwenLong(machine("qwen2_5_vl", 100, derandomize=False)):
    pass
