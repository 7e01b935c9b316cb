"""Streams: frames that are read as they come, in a cache that the plan bounds, and questions in between."""

from __future__ import annotations

import collections
import copy
import gc
import itertools
import threading
import warnings

import builds
import pytest
import torch
import zoo
from byhand import Reference, Seen
from cases import picking, same
from probes import Pick, forward, generate
from streamhand import StreamHand, short_keys, sinks_and_window
from torch import Tensor
from torch._C._functorch import is_batchedtensor

import winnow
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.core.plan import Plan
from winnow.engine.engine import is_compressed
from winnow.testing.largest import Largest

KEEP = 24
QUESTION = torch.tensor([[11, 42, 97, 13, 120]])
# Frames as pictures, and on Qwen2.5-VL also as clips of two.
ROWS = [("llava_clip", "3 A 2"), ("llava_next", "3 A 2"), ("qwen2_5_vl", "3 A 2"), ("qwen2_5_vl", "1 V 2")]
CACHES = {"streaming-llm": sinks_and_window(KEEP), "knorm": short_keys(KEEP)}


def frames(build: str, row: str, count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    return [zoo.sample(build, row, seed=seed + i) for i in range(count)]


def plan(cache: str, keep: int = 5) -> Plan:
    return Plan((Pick(keep=keep), *Plan.of(f"{cache}:keep={KEEP}").methods))


def asked(session: winnow.Session, model, count: int = 4) -> tuple[list[int], Tensor]:
    """The answer, and the logits `[T, vocabulary]` of each of its tokens."""
    logits: list[Tensor] = []
    hook = model.register_forward_hook(lambda m, a, out: logits.append(out.logits[:, -1]))
    answer = session.ask(QUESTION, max_new_tokens=count)
    hook.remove()
    return answer[0].tolist(), torch.cat(logits)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("build", "row"), ROWS)
def test_answers_equal_by_hand_after_any_number_of_frames(build, row, cache):
    """Before the first eviction and long after it; a question leaves nothing behind."""
    model = zoo.model(build)
    reference = Reference(model)
    hand = StreamHand(reference, CACHES[cache])
    with winnow.stream(model, plan(cache)) as session:
        for count, part in enumerate(frames(build, row, 9), 1):
            session.feed(part)
            entry = reference.entry(part)
            hand.feed(entry, picking(entry, 5)([Seen(entry.embeds, entry.held)]))
            if count in (1, 2, 5, 9):
                said, logits = asked(session, model)
                found = copied(hand).answer(QUESTION, said[:-1])
                assert (logits - found).abs().max() <= 1e-5


def copied(hand: StreamHand) -> StreamHand:
    made = copy.copy(hand)
    made.cache, made.alive, made.moved = (copy.deepcopy(x) for x in (hand.cache, hand.alive, hand.moved))
    return made


def test_sinks_that_follow_the_window_keep_all_distances_small():
    """Positions that grow without end are those of a stream that has just begun: only distances count."""
    model = zoo.model("llava_clip")
    reference = Reference(model)
    hand = StreamHand(reference, sinks_and_window(KEEP), shifted=4)
    shifted = Plan((Pick(keep=5), *Plan.of(f"streaming-llm:keep={KEEP},shift=true").methods), positions="compact")
    with winnow.stream(model, shifted) as session:
        for part in frames("llava_clip", "3 A 2", 12):
            session.feed(part)
            entry = reference.entry(part)
            hand.feed(entry, picking(entry, 5)([Seen(entry.embeds, entry.held)]))
        said, logits = asked(session, model)
        assert (logits - copied(hand).answer(QUESTION, said[:-1])).abs().max() <= 1e-4  # turned a dozen times
        assert hand.next - hand.moved[0] == KEEP


def test_without_a_plan_a_stream_is_one_prompt():
    """On a model with 3-D positions as well: those of all frames in one prompt."""
    for build, row in ROWS[:3]:
        model, parts = zoo.model(build), frames(build, row, 4)
        whole = zoo.joined(parts) | {"input_ids": torch.cat([*(part["input_ids"] for part in parts), QUESTION], 1)}
        if build == "qwen2_5_vl":
            whole["mm_token_type_ids"] = zoo.token_types(whole["input_ids"])
        want = forward(model, whole).logits[0, -1]
        with winnow.stream(model, "full", bounded=False) as session:
            for part in parts:
                session.feed(part)
            assert (asked(session, model)[1][0] - want).abs().max() <= 1e-5


SINKS = ("streaming-llm:keep=40", "streaming-llm:keep=40,shift=true")
LONG = [
    *((cache, 120) for cache in SINKS),
    *((f"{cache}:keep=40", 60) for cache in ("snapkv", "h2o", "adakv")),
]
MORE = [
    pytest.param(cache, 250, marks=pytest.mark.full)
    for cache in (*SINKS, *(f"{slug}:keep=40" for slug in ("snapkv", "h2o", "tova", "adakv", "keydiff", "ems")))
]


@pytest.mark.parametrize(("cache", "count"), [*LONG, *MORE])
def test_what_is_held_stays_the_same(cache, count):
    """However long the stream: slots, bytes, and whatever else is alive; and no forward makes larger tensors."""
    model = zoo.model("llava_clip", layers=2, max_position_embeddings=10**5)
    parts, found = frames("llava_clip", "2 A 1", 7), []
    with winnow.stream(model, f"stc:keep=4 + {cache}") as session:
        for number in range(count):
            session.feed(parts[number % len(parts)])
            if number in (20, count - 2):
                session.ask(QUESTION, max_new_tokens=3)
                with Largest() as seen:
                    session.feed(parts[0])
                found.append((session.ledger.held, session.ledger.kv_bytes, alive(), seen.elements))
        assert session.ledger.frames == count + 2
    assert found[0] == found[1]


def alive() -> int:
    """Bytes of all tensors. What other tests leave can be of kinds that have no memory: fake ones, those of a vmap."""
    gc.collect()
    held = {}
    for x in gc.get_objects():
        if type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided and not is_batchedtensor(x):
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(held.values())


def test_without_a_bound_a_plan_is_refused_or_grows():
    model, parts = zoo.model("llava_clip"), frames("llava_clip", "2 A 1", 3)
    for spec in ("divprune:keep=4", "divprune:keep=4 + snapkv:keep=20%", "streaming-llm:keep=mass=0.9"):
        with pytest.raises(WinnowError, match="bounds what the cache"):
            winnow.stream(model, spec)
    assert not is_compressed(model)
    with winnow.stream(model, "divprune:keep=4", bounded=False) as session:
        held = []
        for part in parts:
            session.feed(part)
            held.append(sum(session.ledger.held))
    assert held == [held[0], 2 * held[0], 3 * held[0]]


def test_a_limit_holds_after_each_frame():
    model, parts = zoo.model("llava_clip"), frames("llava_clip", "2 A 1", 8)
    with winnow.stream(model, "streaming-llm:keep=100%,limit=30") as session:
        for part in parts:
            session.feed(part)
        assert session.ledger.held == (60,) * zoo.DEPTH
    with pytest.raises(WinnowError, match="one choice too many"):
        winnow.stream(model, "streaming-llm:keep=50%,limit=30")


def test_a_method_that_does_not_keep_to_its_number_is_found_out():
    """`skip` leaves the first layers whole."""
    model, parts = zoo.model("llava_clip"), frames("llava_clip", "2 A 1", 12)
    with winnow.stream(model, "knorm:keep=16,skip=2") as session:
        fed = iter(parts)
        with pytest.raises(WinnowError, match="does not keep to its number"):
            collections.deque(map(session.feed, fed), maxlen=0)
        held = session.ledger.held
        session.ask(QUESTION, max_new_tokens=1)
        assert session.ledger.held == held


def test_a_question_changes_nothing_that_later_frames_see():
    model, parts = zoo.model("qwen2_5_vl"), frames("qwen2_5_vl", "1 V 2", 6)
    for cache in ("snapkv", "h2o", "streaming-llm"):
        found = []
        for curious in (False, True):
            with winnow.stream(model, plan(cache)) as session:
                for part in parts:
                    session.feed(part)
                    if curious:
                        session.ask(QUESTION, max_new_tokens=3)
                found.append(asked(session, model))
        assert found[0][0] == found[1][0]
        assert torch.equal(found[0][1], found[1][1])


def test_two_sessions_do_not_mix():
    model = zoo.model("llava_clip")
    streams = [frames("llava_clip", "3 A 2", 5, seed) for seed in (0, 50)]
    plans = [plan("h2o"), "stc:keep=6 + streaming-llm:keep=30"]
    alone = []
    for own, parts in zip(plans, streams, strict=True):
        with winnow.stream(model, own) as session:
            for part in parts:
                session.feed(part)
            alone.append(asked(session, model))
    first, second = (winnow.stream(model, own) for own in plans)
    for one, two in zip(*streams, strict=True):
        first.feed(one)
        second.feed(two)
    for session, (said, logits) in zip((first, second), alone, strict=True):
        again = asked(session, model)
        assert again[0] == said
        assert torch.equal(again[1], logits)
    first.close()
    assert is_compressed(model)
    second.feed(streams[1][0])
    second.close()
    assert not is_compressed(model)


class Stopped(BaseException):
    """As an interrupt: no Exception."""


@pytest.mark.parametrize("where", ["layers", "tower"])
def test_an_interrupt_leaves_the_session_as_it_was(where):
    model, parts = zoo.model("llava_clip"), frames("llava_clip", "3 A 2", 6)
    with winnow.stream(model, "stc:keep=6 + h2o:keep=40") as session:
        for part in parts:
            session.feed(part)
        want = asked(session, model)

    def stop(module, args):
        raise Stopped

    module = model.model.language_model.layers[2] if where == "layers" else model.model.vision_tower
    with winnow.stream(model, "stc:keep=6 + h2o:keep=40") as session:
        for i, part in enumerate(parts):
            if i in (1, 4):
                before = copy.copy(session.ledger)
                hook = module.register_forward_pre_hook(stop)
                with pytest.raises(Stopped):
                    session.feed(part)
                if where == "layers":
                    with pytest.raises(Stopped):
                        session.ask(QUESTION)
                hook.remove()
                assert session.ledger == before
            session.feed(part)
        found = asked(session, model)
    assert found[0] == want[0]
    assert torch.equal(found[1], want[1])


def test_the_model_answers_as_before_outside_of_sessions():
    model, part = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    plain = generate(model, part)
    with winnow.stream(model, plan("snapkv")) as session:
        session.feed(part)
        assert same(generate(model, part), plain)
        session.ask(QUESTION, max_new_tokens=2)
        assert same(generate(model, part), plain)
    assert not is_compressed(model)
    assert same(generate(model, part), plain)


def test_a_compressed_model_lends_its_handle_and_keeps_it():
    model, part = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    with winnow.compress(model, Pick(keep=3)) as handle:
        with winnow.stream(model, plan("snapkv")) as session:
            session.feed(part)
            assert session.ledger.kept == 5
            forward(model, part)
            assert [len(item.kept) for item in handle.last.items] == [3]
        assert handle.attached
        session = winnow.stream(model, plan("snapkv"))
    with pytest.raises(WinnowError, match="detached"):
        session.feed(part)
    session.close()


def test_the_ledger_counts():
    model, parts = zoo.model("qwen2_5_vl"), frames("qwen2_5_vl", "3 V 2", 3)
    with winnow.stream(model, plan("streaming-llm")) as session:
        for number, part in enumerate(parts):
            session.feed(part, time=number / 2)
        session.ask(QUESTION, max_new_tokens=2)
        ledger = session.ledger
    assert (ledger.frames, ledger.given, ledger.kept, ledger.questions, ledger.time) == (6, 72, 15, 1, 1.0)
    assert ledger.text == 3 * 7  # five words, and a token at either end of a clip
    assert ledger.held == (2 * KEEP,) * zoo.DEPTH
    assert ledger.answer_ms >= ledger.first_token_ms > 0
    assert ledger.feed_ms > 0
    assert "6 frames; content tokens 15/72" in str(ledger)


def test_times_are_summed_by_phase_where_they_are_asked_for():
    model, parts = zoo.model("llava_clip"), frames("llava_clip", "3 A 2", 4)
    with winnow.stream(model, plan("snapkv")) as session:
        session.feed(parts[0])
        assert session.ledger.times == {}
        session.timing = True
        seen = []
        for part in parts[1:]:
            session.feed(part)
            session.ask(QUESTION, max_new_tokens=2)
            seen.append((session.ledger.times, session.ledger.feed_ms))
    for (times, _), (later, own) in itertools.pairwise(seen):
        assert set(times) == set(later) >= {"encoder", "select", "prefill"}
        assert all(later[name] > spent for name, spent in times.items())
        assert sum(later.values()) - sum(times.values()) <= own


def test_several_threads_take_turns():
    model, parts = zoo.model("llava_clip"), frames("llava_clip", "3 A 2", 8)
    with winnow.stream(model, plan("snapkv")) as session:
        session.feed(parts[0])
        threads = [threading.Thread(target=session.feed, args=(part,)) for part in parts[1:]]
        threads += [threading.Thread(target=session.ask, args=(QUESTION,), kwargs={"max_new_tokens": 2})]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (session.ledger.frames, session.ledger.questions) == (8, 1)


def test_a_copied_cache_goes_on_by_itself():
    """As users of transformers copy the cache of a shared prompt: the model is not copied with it."""
    model, part = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    with winnow.compress(model, plan("h2o")) as handle, torch.no_grad():
        cache = model(**part, use_cache=True).past_key_values
        other = copy.deepcopy(cache)
        assert other.layers[0].context.attachment is handle._engine.attachment
        assert other.layers[0].context.layers is other.layers
        want = model(input_ids=QUESTION, past_key_values=cache).logits
        assert torch.equal(model(input_ids=QUESTION, past_key_values=other).logits, want)


BAD = [
    (lambda s, part: s.feed(part["pixel_values"]), "got Tensor"),
    (lambda s, part: s.feed({"input_ids": part["input_ids"]}), "no pixels"),
    (lambda s, part: s.feed({**part, "input_ids": part["input_ids"][0]}), "got input_ids"),
    (lambda s, part: s.feed({**part, "attention_mask": part["attention_mask"] * 0}), "hides tokens"),
    (lambda s, part: s.feed({**part, "input_ids": part["input_ids"][:, :5]}), "placeholder for each token"),
    (lambda s, part: s.feed(part, time="now"), "time='now'"),
    (lambda s, part: s.feed(part, time=float("nan")), "time=nan"),
    (lambda s, part: s.feed(part, time=-1.0), "frames come in order"),
    (lambda s, part: s.feed(part, time=[1.0, 2.0]), "seconds for each of 1"),
    (lambda s, part: s.ask("what?"), "token ids"),
    (lambda s, part: s.ask(QUESTION.float()), "token ids"),
    (lambda s, part: s.ask(QUESTION[:, :0]), "empty"),
    (lambda s, part: s.ask(QUESTION, max_new_tokens=0), "max_new_tokens=0"),
]


@pytest.mark.parametrize(("act", "says"), BAD, ids=[says for _, says in BAD])
def test_what_is_not_understood_is_refused(act, says):
    model, part = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    with winnow.stream(model, plan("snapkv")) as session:
        session.feed(part, time=0.0)
        before = copy.copy(session.ledger)
        with pytest.raises(WinnowError, match=says):
            act(session, part)
        assert session.ledger == before
        session.feed(part)


def test_a_session_has_a_begin_and_an_end():
    model, part = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 6")
    session = winnow.stream(model, plan("snapkv"))
    with pytest.raises(WinnowError, match="no frame was fed"):
        session.ask(QUESTION)
    session.close()
    session.close()
    for act in (lambda: session.feed(part), lambda: session.ask(QUESTION)):
        with pytest.raises(WinnowError, match="closed"):
            act()


REFUSED = {
    "fastv:layer=2,keep=4 + snapkv:keep=40": "looks at the text",
    "snapkv:keep=40 + kv-quantized:bits=4": "no number of slots",
    "snapkv:keep=[visual=10%,text=100%]": "what each token was",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_plans_that_no_stream_can_have_are_refused(spec):
    model = zoo.model("llava_clip")
    with pytest.raises(WinnowError, match=REFUSED[spec]):
        winnow.stream(model, spec)
    with pytest.raises(UnsupportedError, match=r"at layers\[2\]"):
        winnow.stream(model, Plan((Pick(keep=4, at="layers[2]"), *Plan.of("snapkv:keep=40").methods)))
    assert not is_compressed(model)


def test_models_on_which_streams_are_not_tested_are_refused():
    model = builds.every()["internvl"].model()
    with pytest.raises(UnsupportedError, match="streams run on llava, llava_next, qwen2_5_vl,"):
        winnow.stream(model, "snapkv:keep=40")


def test_distances_that_the_model_never_learned_are_warned_of_once():
    model, parts = zoo.model("llava_clip", max_position_embeddings=100), frames("llava_clip", "3 A 2", 5)
    with winnow.stream(model, plan("streaming-llm")) as session:
        for part in parts[:3]:
            session.feed(part)
        with pytest.warns(winnow.WinnowWarning, match="passed the 100 positions"):
            session.feed(parts[3])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            session.feed(parts[4])
