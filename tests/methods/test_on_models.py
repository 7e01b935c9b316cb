"""Every built-in method on every build of a real model class that it runs on, against its own loop by hand."""

from __future__ import annotations

import copy
import functools
import importlib
from functools import partial
from typing import Any

import pytest
import zoo
from builds.qwen_audio import SOUNDS
from byhand import Entry, Reference, Vision
from clips import CLIPS

from winnow.core.registry import method_class, token_methods
from winnow.testing import Build, Worked, check_on_models

ELSEWHERE = CLIPS | SOUNDS  # builds that are not in the zoo

# Three sizes of pictures and of text; one picture, none, and two with text between them.
ROWS = ("3 A 6", "3 B 9", "3 C 5", "11", "2 B 4 C 5")
OWN = {"audio-guided"}  # no build of these hears beside seeing; `test_audio_guided.py` has its own two
SLUGS = [entry.slug for entry in token_methods() if entry.family != "user"]


def hand(slug):
    """A method by hand: a module of the method's own name."""
    return importlib.import_module(f"methods.byhand.{slug.replace('-', '_')}")


def proofs():
    """Method and build, marked as evidence that the one runs on the other."""
    for slug in SLUGS:
        for build in getattr(hand(slug), "BUILDS", zoo.BUILDS):
            yield pytest.param(slug, build, marks=pytest.mark.system(slug, "model"), id=f"{slug}-{build}")


class Remembering(Reference):
    """What enters the LM and what the tower sees of a sample is worked out once: every method is asked the same."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._entries: dict[Any, Entry] = {}
        self._visions: dict[Any, Vision] = {}

    def entry(self, sample):
        if (key := written(sample)) not in self._entries:
            self._entries[key] = super().entry(sample)
        return copy.deepcopy(self._entries[key])  # methods by hand write into what they get

    def vision(self, sample):
        if (key := written(sample)) not in self._visions:
            self._visions[key] = super().vision(sample)
        return copy.deepcopy(self._visions[key])


def written(sample) -> tuple[tuple[str, bytes], ...]:
    return tuple((name, value.numpy().tobytes()) for name, value in sample.items())


@functools.cache
def of_build(build: str) -> Remembering:
    return Remembering(ELSEWHERE[build].model() if build in ELSEWHERE else zoo.model(build))


@functools.lru_cache(maxsize=1)
def reference(model) -> Reference:
    return Reference(model)


def by_hand(slug, model, sample, forced, **settings) -> Worked:
    return worked(slug, reference(model), sample, forced, **settings)


def by_hand_on(slug, build, model, sample, forced, **settings) -> Worked:
    """On a plain model of the build, which nothing was ever attached to."""
    return worked(slug, of_build(build), sample, forced, **settings)


def worked(slug, plain, sample, forced, **settings) -> Worked:
    made = hand(slug).by_hand(plain, sample, plain.entry(sample), **settings)
    trace = plain.run(made.entry, forced, made.cuts, reads=made.reads)
    return Worked(trace.logits, [ids.tolist() for ids in trace.kept(made.entry)], trace.lengths)


def of_zoo(build, rows) -> Build:
    if build in ELSEWHERE:
        return Build(ELSEWHERE[build].model, ELSEWHERE[build].samples(rows), ELSEWHERE[build].collate)
    return Build(partial(zoo.model, build), zoo.samples(build, rows), zoo.collate)


@pytest.mark.parametrize(("slug", "build"), proofs())
def test_a_method_on_a_model(slug, build):
    first = getattr(hand(slug), "ROWS", {}).get(build, ROWS)
    more = getattr(hand(slug), "EXTRA", {}).get(build, ())
    builds = {f"{build} {rows}": of_zoo(build, rows) for rows in (first, *more)}
    by = partial(by_hand_on, slug, build)
    check_on_models(method_class(slug), by, settings=hand(slug).SETTINGS, builds=builds)


def test_every_method_is_worked_by_hand_on_two_builds():
    for slug in set(SLUGS) - OWN:
        assert len(getattr(hand(slug), "BUILDS", zoo.BUILDS)) >= 2, slug


def wrong_logits(worked):
    return Worked(worked.logits + 1e-3, worked.kept, worked.layer_tokens)


def wrong_tokens(worked):
    return Worked(worked.logits, [ids[1:] for ids in worked.kept], worked.layer_tokens)


def wrong_lengths(worked):
    return Worked(worked.logits, worked.kept, [n + 1 for n in worked.layer_tokens])


@pytest.mark.parametrize("spoil", [wrong_logits, wrong_tokens, wrong_lengths])
def test_the_check_bites(spoil):
    """A method by hand that gives anything else is told from the model."""
    spoilt = lambda *args, **settings: spoil(by_hand("divprune", *args, **settings))  # noqa: E731
    builds = {"llava_clip": of_zoo("llava_clip", ("3 A 6", "2 B 4"))}
    with pytest.raises(AssertionError, match=r"by hand|logits differ"):
        check_on_models(method_class("divprune"), spoilt, settings={"keep": 5}, builds=builds)


def test_a_setting_that_changes_nothing_shows_nothing():
    builds = {"llava_clip": of_zoo("llava_clip", ("3 A 6",))}
    with pytest.raises(AssertionError, match="changes the logits by no more"):
        check_on_models(
            method_class("divprune"), partial(by_hand, "divprune"), settings={"keep": "100%"}, builds=builds
        )
