"""Threads and contexts on one model: each request has its own plan, state and ledger."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading

import pytest
import zoo
from cases import CASES, TOWERS, same
from probes import Pick, Probed, Tapped, forward, generate

import winnow
from winnow.core.plan import Plan

ROUNDS = 4


def at_once(*works) -> list:
    """Run these together, released by one barrier; what they return, or the first error."""
    start = threading.Barrier(len(works))

    def begin(work):
        start.wait(60)
        return work()

    with concurrent.futures.ThreadPoolExecutor(len(works)) as pool:
        return [future.result(120) for future in [pool.submit(begin, work) for work in works]]


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_concurrent_requests_under_different_plans_equal_serial_ones(build):
    """Four threads: features or projected, depth, the attached plan, and none at all; different inputs; ledgers too."""
    model = zoo.model(build)
    plans = [Probed(), CASES["folded" if build in TOWERS else "forgotten"].plan, None, "full"]
    jobs = [
        (zoo.inputs(build, rows, seed=seed), plan)
        for seed, (rows, plan) in enumerate(zip((zoo.RAGGED, zoo.MIXED, zoo.SINGLE, ("2 C 3",)), plans, strict=True))
    ]
    with winnow.compress(model, Pick(keep=4)) as handle:

        def run(inputs, plan):
            if plan is None:
                return generate(model, inputs), handle.last
            with handle.using(plan):
                return generate(model, inputs), handle.last

        serial = [run(*job) for job in jobs]
        works = [lambda job=job: [run(*job) for _ in range(ROUNDS)] for job in jobs]
        for found, (expected, ledger) in zip(at_once(*works), serial, strict=True):
            assert len(found) == ROUNDS
            for output, own in found:
                assert same(output, expected)
                assert own.layer_tokens == ledger.layer_tokens
                assert [item.kept.tolist() for item in own.items] == [item.kept.tolist() for item in ledger.items]


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_using_holds_in_its_own_thread_only(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)
    with winnow.compress(model, Pick(keep=4)) as handle, handle.using(Pick(keep=2)):
        here, there = at_once(lambda: None, lambda: (forward(model, inputs), handle.last)[1])
        forward(model, inputs)
        assert here is None
        assert len(there.items[0].kept) == 4
        assert len(handle.last.items[0].kept) == 2


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_using_holds_in_its_own_task_only(build):
    """Tasks of one event loop take turns in one thread."""
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.SINGLE)

    async def request(handle, keep):
        with handle.using(Pick(keep=keep)):
            for _ in range(3):
                await asyncio.sleep(0)
                forward(model, inputs)
                await asyncio.sleep(0)
                assert len(handle.last.items[0].kept) == keep
        return keep

    async def together(handle):
        return await asyncio.gather(*(request(handle, keep) for keep in (1, 3, 5)))

    with winnow.compress(model, Pick(keep=4)) as handle:
        assert asyncio.run(together(handle)) == [1, 3, 5]


def test_using_nests_and_is_undone_by_an_exception():
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", zoo.SINGLE)

    def kept():
        forward(model, inputs)
        return len(handle.last.items[0].kept)

    def interrupted():
        with handle.using(Pick(keep=1)):
            assert kept() == 1
            raise KeyboardInterrupt

    with winnow.compress(model, Pick(keep=4)) as handle:
        with handle.using(Pick(keep=3)):
            assert kept() == 3
            with handle.using(Pick(keep=2)):
                assert kept() == 2
            assert kept() == 3
            with pytest.raises(KeyboardInterrupt):
                interrupted()
            assert kept() == 3
        assert kept() == 4


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_using_full_is_the_plain_model_bit_for_bit(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.MIXED)
    plain = generate(model, inputs)
    with winnow.compress(model, Plan((Tapped(), Pick(keep=5)))) as handle:
        reduced = generate(model, inputs)
        for full in (None, "full"):
            with handle.using(full):
                assert same(generate(model, inputs), plain)
        assert same(generate(model, inputs), reduced)


def test_a_refused_plan_in_using_changes_nothing():
    model, inputs = zoo.model("llava_siglip"), zoo.inputs("llava_siglip", zoo.SINGLE)
    with winnow.compress(model, Pick(keep=4)) as handle:
        for plan in ("visionzip", "fastv:layer=99", "nothing"):
            with pytest.raises(winnow.WinnowError), handle.using(plan):
                pass
        forward(model, inputs)
        assert len(handle.last.items[0].kept) == 4


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_an_error_in_one_thread_leaves_the_request_of_the_other_alone(build):
    model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED)
    victim = threading.local()

    def maybe(*args):
        if getattr(victim, "here", False):
            raise KeyboardInterrupt("only this thread")

    with winnow.compress(model, Probed()) as handle:
        expected = generate(model, inputs)
        hook = model.model.language_model.layers[2].register_forward_hook(maybe)

        def fail():
            victim.here = True
            for _ in range(ROUNDS):
                with pytest.raises(KeyboardInterrupt), handle.using(Pick(keep=3)):
                    generate(model, inputs)
            victim.here = False
            return generate(model, inputs)

        outputs = at_once(fail, lambda: [generate(model, inputs) for _ in range(ROUNDS)])
        hook.remove()
    assert same(outputs[0], expected)
    assert all(same(output, expected) for output in outputs[1])
