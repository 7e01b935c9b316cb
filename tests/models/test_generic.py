"""Classes without an adapter of their own: refused until the doctor's checks have passed on the very model."""

from __future__ import annotations

import functools
import json

import builds
import pytest
import torch
from probes import Pick, forward

import winnow
from winnow.engine import doctor, whole_call
from winnow.engine.doctor import GENERIC, run_checks
from winnow.models import acceptance
from winnow.models.families import family_of, is_unchecked

NAME = "aria"  # a class without an adapter of its own
ROWS = ("3 A 6", "3 B 9")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What other processes have accepted is not known here, nor the other way round."""
    monkeypatch.setenv("WINNOW_CACHE", str(tmp_path))
    monkeypatch.setattr(acceptance, "_known", {})
    return tmp_path / "accepted.json"


def checked(model, own=None):
    own = own or builds.every()[NAME]
    samples = own.samples(ROWS)
    return run_checks(model, samples, own.collate(samples, extra=1))


def test_a_class_is_refused_until_it_is_checked(own_cache):
    own = builds.every()[NAME]
    model = own.model()
    with pytest.raises(winnow.UnsupportedError, match=r"pass processor= to winnow\.compress"):
        winnow.compress(model, Pick(keep=4))
    assert is_unchecked(model)
    found = checked(model)
    assert all(check.ok for check in found)
    assert found[-1].name == GENERIC
    with winnow.compress(model, Pick(keep=4)) as handle:
        forward(model, own.sample("3 A 6"))
        assert len(handle.last.items[0].kept) == 4
        assert "generic" in str(handle.last)
    assert list(json.loads(own_cache.read_text()).values()) == [["projected", "layers"]]


def test_what_was_accepted_is_known_to_the_next_process(monkeypatch):
    model = builds.every()[NAME].model()
    checked(model)
    monkeypatch.setattr(acceptance, "_known", {})
    winnow.compress(model, Pick(keep=4)).detach()


def test_another_configuration_or_attention_is_checked_anew():
    own = builds.every()[NAME]
    checked(own.model())
    with pytest.raises(winnow.UnsupportedError, match="checks of winnow doctor"):
        winnow.compress(own.model(num_hidden_layers=5), Pick(keep=4))
    eager = own.model()
    eager.set_attn_implementation("eager")
    with pytest.raises(winnow.UnsupportedError, match="checks of winnow doctor"):
        winnow.compress(eager, Pick(keep=4))


def test_a_processor_lets_compress_check_by_itself(monkeypatch):
    own, asked = builds.every()[NAME], []
    model = own.model()

    def inputs(model, processor, picture, question):
        asked.append(question)
        return own.samples(ROWS)[len(asked) - 1]

    monkeypatch.setattr(doctor, "model_inputs", inputs)
    winnow.compress(model, Pick(keep=4), processor=object()).detach()
    assert len(asked) == 2
    winnow.compress(model, Pick(keep=4), processor=object()).detach()
    assert len(asked) == 2  # remembered


@pytest.mark.parametrize("broken", ["_mask", "hidden"])
def test_a_class_on_which_a_check_fails_is_not_accepted(broken, monkeypatch):
    """A seam that does other than we think: rows that do not leave, or a mask of other tokens."""
    wrong = {"hidden": lambda self, hidden: hidden.flip(1), "_mask": lambda self, given, *rest: given}
    own = builds.every()["gemma3n" if broken == "_mask" else NAME]
    model = own.model()
    monkeypatch.setattr(whole_call.WholeCall, broken, wrong[broken])
    found = checked(model, own)
    assert not found[-1].ok
    assert found[-1].name == GENERIC
    assert any("Suspect" in check.detail for check in found)
    with pytest.raises(winnow.UnsupportedError, match="checks of winnow doctor"):
        winnow.compress(model, Pick(keep=4))


def test_a_class_is_accepted_only_where_its_checks_hold():
    own = builds.every()["gemma3n"]  # its layers carry several rows for each token
    model = own.model()
    found = checked(model, own)
    assert all(check.ok for check in found)
    assert "not inside the LM" in found[-1].detail
    assert family_of(model).points == ("projected",)
    with pytest.raises(winnow.UnsupportedError, match=r"acts at layers\[0\]"):
        winnow.compress(model, Pick(keep=4, at="layers[0]"))
    with winnow.compress(model, Pick(keep=4)):
        forward(model, own.sample("3 A 6"))


@pytest.mark.parametrize("name", ["blip_2", "florence2", "kosmos_2", "minimax_m3_vl", "chameleon"])
def test_what_cannot_work_is_refused_with_the_reason(name):
    with pytest.raises(winnow.UnsupportedError, match=r"is not supported: .{20}"):
        winnow.compress(builds.every()[name].model(), Pick(keep=4))


def test_methods_that_look_at_the_tower_are_refused(own_cache):
    model = builds.every()[NAME].model()
    checked(model)
    with pytest.raises(winnow.UnsupportedError, match="knows no vision tower"):
        winnow.compress(model, "hiprune:keep=4")


def test_pictures_that_were_not_seen_are_not_read_in_silence(monkeypatch):
    """A model that encodes by another way than the one that is listened to would run as the plain one."""
    own = builds.every()[NAME]
    model = own.model()
    checked(model)
    other = type(model.base_model).get_image_features
    forward_of = type(model.base_model).forward

    @functools.wraps(forward_of)
    def bypassing(self, *args, **kwargs):
        hidden = self.__dict__.pop("get_image_features", None)
        try:
            return forward_of(self, *args, **kwargs)
        finally:
            if hidden is not None:
                self.__dict__["get_image_features"] = hidden

    monkeypatch.setattr(type(model.base_model), "forward", bypassing)
    assert type(model.base_model).get_image_features is other
    with winnow.compress(model, Pick(keep=4)), pytest.raises(winnow.UnsupportedError, match="did not encode it"):
        forward(model, own.sample("3 A 6"))


def test_a_row_of_tokens_has_no_boxes():
    """Where the grid is not known, no token claims a place in the picture."""
    layout = winnow.core.layout.Layout.sequence(5)
    assert layout.n_content == 5
    assert not layout.covering([(0.0, 0.0, 1.0, 1.0)]).any()
    assert torch.tensor(layout.boxes).isnan().all()
