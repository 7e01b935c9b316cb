"""What a sweep writes: equal for any batch size, honest about failures, equal to what `generate` says."""

from __future__ import annotations

import pytest
import torch

from winnow.bench import environment, runner
from winnow.bench.meters import normal
from winnow.bench.plans import jobs
from winnow.bench.processes import Sweep, run, run_all
from winnow.bench.reuse import Encoded
from winnow.bench.store import Store
from winnow.bench.tasks import Ask, world_task
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.engine.compress import compress
from winnow.methods.fastervlm import FasterVLM
from winnow.models.inputs import model_inputs

from .conftest import BASELINES, BUDGETS, QUESTIONS

# One that chooses at the projector, one by the tower's attention, one that merges, and one within the language model.
FOUR = ("divprune", "hiprune", "visionzip", "pyramiddrop")
EIGHT = ("divprune", "fastervlm", "fastv", "hiprune", "pyramiddrop", "todre", "visionzip", "vtc-cls")


def test_e5_batch_1_equals_batch_16(sweep, exported):
    one, _ = sweep("one.sqlite", batch=1, methods=FOUR, baselines=BASELINES)
    many, key = sweep("many.sqlite", batch=16, methods=FOUR, baselines=BASELINES)
    assert exported(one) == exported(many)
    said = {a.answer for cell in many.cells(key) for a in many.answers(cell.id)}
    assert len(said) > 20, "a model that always says the same would pass whatever the batch does"


def test_e5_two_processes_equal_one(little, tmp_path, exported):
    environment.code_hash.cache_clear()  # the second process reads the code anew
    folder = tmp_path / "checkpoint"
    for part in little:
        part.save_pretrained(folder)
    common = {
        "methods": ("fastervlm", "fastv"),
        "budgets": BUDGETS,
        "model": str(folder),
        "questions": QUESTIONS,
        "batch": 4,
    }
    stores = []
    for processes in (1, 2):
        path = tmp_path / f"{processes}.sqlite"
        run_all(Sweep(str(path), **common, max_new_tokens=3, checked=4, device="cpu", threads=1), processes)
        stores.append(Store(path))
    first, second = map(exported, stores)
    for store in stores:
        store.close()
    assert first == second


def test_the_two_shards_of_a_sweep_are_disjoint_and_make_the_whole(sweep, finished, exported):
    whole, _ = finished("whole.sqlite")
    first, key = sweep("shards.sqlite", shard=(0, 2))
    half = {cell.plan: {a.question for a in first.answers(cell.id)} for cell in first.cells(key)}
    assert all(0 < len(asked) < QUESTIONS for asked in half.values())
    both, _ = sweep("shards.sqlite", shard=(1, 2))
    assert exported(both) == exported(whole)


def test_answers_are_those_of_the_plain_model_and_of_the_compressed_one(sweep, little, task):
    model, processor = little
    store, key = sweep(methods=("fastervlm",), budgets=("4",))
    cells = {cell.label: {a.question: a for a in store.answers(cell.id)} for cell in store.cells(key)}
    for ask in task.questions[:5]:
        inputs = model_inputs(model, processor, task.open(ask), ask.text)

        def say(inputs=inputs):
            ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

        assert cells["full"][ask.id].answer == say()
        with compress(model, "fastervlm:keep=4", processor=processor) as handle:
            own = cells["fastervlm"][ask.id]
            assert own.answer == say()
            assert own.agrees == (own.answer == cells["full"][ask.id].answer)
            assert own.kept == len(handle.last.items[0].kept) == 4
            assert own.layer_tokens == handle.last.average_tokens
            assert (own.flops, own.flops_full) == (handle.last.flops, handle.last.flops_full)
            assert (own.kv_bytes, own.kv_bytes_full) == (handle.last.kv_bytes, handle.last.kv_bytes_full)


def test_e9_out_of_memory_in_one_cell_is_said_and_the_others_go_on(sweep, monkeypatch):
    def full(self, view):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(FasterVLM, "reduce", full)
        store, key = sweep()
    for cell in store.cells(key):
        assert cell.status == ("error:oom" if cell.label == "fastervlm" else "ok")
        answers = store.answers(cell.id)
        assert len(answers) == QUESTIONS
        assert all((a.status == "error:oom") == (cell.label == "fastervlm") for a in answers)


def test_e9_a_batch_that_does_not_fit_is_split(sweep, finished, monkeypatch, exported):
    wanted, _ = finished("whole.sqlite")
    plain, seen = FasterVLM.reduce, []

    def small(self, view):
        seen.append(view.b)
        if view.b > 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return plain(self, view)

    monkeypatch.setattr(FasterVLM, "reduce", small)
    found, _ = sweep("split.sqlite", batch=8)
    assert max(seen) > 1
    assert exported(found) == exported(wanted)


def test_e4_an_answer_from_an_error_is_never_reused(sweep, finished, monkeypatch, exported):
    wanted, _ = finished("whole.sqlite")

    def refuse(self, view):
        raise WinnowError("not today")

    with monkeypatch.context() as patch:
        patch.setattr(FasterVLM, "reduce", refuse)
        store, key = sweep("part.sqlite")
        failed = next(cell for cell in store.cells(key) if cell.label == "fastervlm")
        assert (failed.status, failed.note) == ("error:invalid", "not today")
        assert {a.status for a in store.answers(failed.id)} == {"error:invalid"}
        assert not any(a.correct or a.agrees for a in store.answers(failed.id))
    again, _ = sweep("part.sqlite")
    assert exported(again) == exported(wanted)


def test_a_method_that_this_model_cannot_run_is_marked_and_the_others_go_on(sweep, monkeypatch):
    def unsupported(self, info):
        raise UnsupportedError("fastervlm cannot run on this model")

    monkeypatch.setattr(FasterVLM, "steps", unsupported)
    store, key = sweep()
    for cell in store.cells(key):
        assert cell.status == ("error:unsupported" if cell.label == "fastervlm" else "ok")
        assert len(store.answers(cell.id)) == (0 if cell.label == "fastervlm" else QUESTIONS)


def test_other_errors_are_not_swallowed(sweep, monkeypatch):
    def broken(self, view):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(FasterVLM, "reduce", broken)
    with pytest.raises(ZeroDivisionError):
        sweep()


def test_answers_that_generate_does_not_give_mark_the_cell_and_fail_the_run(sweep, monkeypatch, tmp_path):
    plain = Encoded.under

    def wrong(self, plan):
        output = plain(self, plan)
        if plan.methods and plan.methods[0].slug == "fastervlm":
            output.pooler_output = [x.flip(-1) for x in output.pooler_output]
        return output

    with monkeypatch.context() as patch:
        patch.setattr(Encoded, "under", wrong)
        with pytest.raises(WinnowError, match=r"model.generate disagree.*fastervlm 16"):
            sweep(checked=50)
    # The mark stays: what was asked in the wrong way is in the store.
    with pytest.raises(WinnowError, match="disagree"):
        sweep(checked=50)
    with Store(tmp_path / "a.sqlite") as store:
        marked = {cell.label for run in store.runs() for cell in store.cells(run.key) if cell.status == "mismatch"}
    assert marked == {"fastervlm"}
    store, key = sweep(checked=50, resume=False)
    assert all(cell.status == "ok" for cell in store.cells(key))


@pytest.mark.parametrize("size", [1, 7, 16])
def test_at_least_fifty_questions_of_each_method_are_checked(size):
    planned = jobs(EIGHT, ("128", "64", "32"), 256)
    asks = [Ask(str(i), "", "", "", "") for i in range(400)]
    cut = [tuple(asks[at : at + size]) for at in range(0, 400, size)]
    checks = runner._checks([(tuple(cut), planned)], runner.CHECKED)
    for label in {job.cell.label for job in planned}:
        own = [checks[job.key] for job in planned if job.cell.label == label]
        assert sum(len(batch) for chosen in own for batch in chosen) >= 50
        assert {len(batch) for chosen in own for batch in chosen} == {size}, "large ones come first"


def test_checks_ask_each_checked_question_once_more(sweep, generated):
    sweep("plain.sqlite", batch=1, methods=("fastervlm",), budgets=("16", "4"), baselines=())
    plain = len(generated)
    sweep("checked.sqlite", batch=1, methods=("fastervlm",), budgets=("16", "4"), baselines=(), checked=6)
    # of full 6 questions; of random-M, downsample-M and fastervlm 3 at each of two budgets
    assert len(generated) - plain == plain + 6 + 3 * 2 * 3


def test_e10_random_and_downsample_are_always_measured(sweep):
    store, key = sweep(baselines=())
    found = [(cell.label, cell.budget) for cell in store.cells(key) if cell.kind == "baseline"]
    assert sorted(found) == sorted(
        [("full", ""), *((label, b) for label in ("random-M", "downsample-M") for b in BUDGETS)]
    )


def test_without_evidence_there_is_no_ceiling(sweep, task):
    import dataclasses

    blind = dataclasses.replace(task, questions=tuple(dataclasses.replace(a, evidence=()) for a in task.questions))
    store, key = sweep(task=blind, baselines=BASELINES)
    assert {cell.label for cell in store.cells(key)} & {"ceiling", "oracle"} == set()
    assert all(a.evidence_recall is None for cell in store.cells(key) for a in store.answers(cell.id))


def test_questions_that_the_model_cannot_be_asked_are_named_and_left_out(sweep, task):
    import dataclasses

    asks = list(task.questions)
    asks[3] = dataclasses.replace(asks[3], text="what does <image> mean?")
    said = []
    store, key = sweep(task=dataclasses.replace(task, questions=tuple(asks)), say=said.append)
    assert len(said) == 1
    assert asks[3].id in said[0]
    assert "<image>" in said[0]
    assert len(store.questions(key)) == QUESTIONS - 1
    assert all(len(store.answers(cell.id)) == QUESTIONS - 1 for cell in store.cells(key))


def test_overlays_are_kept_for_six_questions_of_each_cell(sweep):
    store, key = sweep(methods=("visionzip", "fastervlm"), budgets=("16",))
    for cell in store.cells(key):
        found = store.overlays(cell.id)
        assert len(found) == 6
        assert all(overlay.grid == (8, 8) for overlay in found)
        own = {a.question: a for a in store.answers(cell.id)}
        for overlay in found:
            left = own[overlay.question].kept
            # [CLS] of VisionZip stands for no place of the picture
            assert len(overlay.kept) == left - (cell.label == "visionzip")
            assert (overlay.merged is not None) == (cell.label in ("visionzip", "downsample-M"))


def test_the_model_is_left_alone(sweep, little, task):
    model, processor = little
    inputs = model_inputs(model, processor, task.open(task.questions[0]), task.questions[0].text)
    before, hooks = model(**inputs).logits, _hooks(model)
    sweep()
    assert torch.equal(model(**inputs).logits, before)
    assert _hooks(model) == hooks


def _hooks(model):
    return [(len(m._forward_pre_hooks), len(m._forward_hooks), "forward" in m.__dict__) for m in model.modules()]


def test_types_are_balanced_and_world_questions_have_evidence():
    found = world_task(40)
    counts = found.settings["types"]
    assert sum(counts.values()) == 40
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len({a.id for a in found.questions}) == 40
    assert sum(bool(a.evidence) for a in found.questions) > 20
    assert normal("  Yes. ") == "yes"


def test_processes_that_run_different_code_are_refused(tmp_path):
    with pytest.raises(WinnowError, match="the code of winnow was changed"):
        run(Sweep(str(tmp_path / "a.sqlite"), ("fastervlm",), ("4",), code="another"))
