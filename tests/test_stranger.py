"""A stranger's method with a signal of its own, and a stranger's model family: one file each, outside the package.

Both are found by entry points alone, and work through `winnow.compress`, `winnow bench` and `winnow.testing`.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from byhand import Reference, cut, top
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

import winnow
from winnow.core import registry
from winnow.models import families
from winnow.testing import WITH_CLS, check_method, run_step

ROOT = Path(__file__).resolve().parent.parent

METHOD = '''"""Keep the patches whose values are longest in one block of the vision tower.

Source: an example. Looks at: the values of one vision block. Cost: O(V · D).
"""

from dataclasses import dataclass

import torch

from winnow.contract import Budget, Method, Signal, Site, block_index, register


@dataclass(frozen=True)
class ValueNorms(Signal):
    """The norm of each patch's value, mean over heads, in one block of the vision tower: `[b, N]`."""

    layer: int = -2

    def site(self, info):
        return Site("vision", block_index(self.layer, info.vision_depth, "the tower"))

    def read(self, seen):
        return seen.v.float().norm(dim=-1).mean(1)[:, seen.prefix :]

    def carry(self, values, reduction):
        """A merged token is as loud as the loudest of its sources."""
        feeds = reduction.to_matrix() != 0
        return values.expand_as(feeds).masked_fill(~feeds, -torch.inf).amax(-1)

    def sample(self, generator, b, n):
        return torch.rand(b, n, generator=generator) + 0.5


@register("loudest")
class Loudest(Method):
    """Keep the patches with the longest values.

    Args:
        keep: content tokens of the item.
        norms: the norms that are compared.
    """

    keep: Budget = Budget(8)
    norms: ValueNorms = ValueNorms()

    def score(self, view):
        return view[self.norms]
'''

POINTS = "[winnow.methods]\nloudest = {0}_loudest\n[winnow.families]\nvipllava = {0}_vipllava\n"


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A folder on the path, with both files and the entry points that name them; gone afterwards."""
    page = (ROOT / "docs" / "add-a-family.md").read_text(encoding="utf-8")
    between = page.partition("<!-- family-example:begin -->")[2].partition("<!-- family-example:end -->")[0]
    (family,) = re.findall(r"```py\n(.*?)```", between, re.DOTALL)
    name = "stranger"
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / f"{name}_loudest.py").write_text(METHOD, encoding="utf-8")
    (folder / f"{name}_vipllava.py").write_text(family, encoding="utf-8")
    facts = folder / f"{name}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (facts / "entry_points.txt").write_text(POINTS.format(name), encoding="utf-8")
    for table in ("_extra", "_classes"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    monkeypatch.setattr(families, "_registered", dict(families._registered))
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    yield folder
    for part in ("loudest", "vipllava"):
        sys.modules.pop(f"{name}_{part}", None)


def vipllava(side=70, patch=14, vocabulary=zoo.VOCABULARY, placeholder=zoo.IMAGE, **text):
    """A small ViP-LLaVA of 5 × 5 patches with random weights; its projector reads three layers."""
    vision = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_attention_heads=4, num_hidden_layers=5, projection_dim=48,
        image_size=side, patch_size=patch,
    )  # fmt: skip
    language = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, **text,
    )  # fmt: skip
    torch.manual_seed(0)
    config = VipLlavaConfig(
        vision_config=vision, text_config=language, image_token_index=placeholder, vision_feature_layers=(-2, 1, 3),
        image_seq_length=(side // patch) ** 2,
    )  # fmt: skip
    model = VipLlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)  # larger than at the start of training, so that a selection shows in the logits
    return model


def loudest(model, sample, block):
    """By hand: the norms of the values that a block of the tower makes, from its own projection."""
    plain, seen = copy.deepcopy(model), []
    attention = plain.model.vision_tower.encoder.layers[block].self_attn
    attention.v_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        plain.model.get_image_features(sample["pixel_values"])
    heads = seen[0][:, 1:].unflatten(-1, (attention.num_heads, -1))
    return (heads**2).sum(-1).sqrt().mean(-1)


def check_by_hand(model, plan, block, keep):
    """The last logits of a sample with two pictures, and what is kept of each."""
    part = zoo.sample("llava_clip", "3 A 4 B 6")
    scores = loudest(model, part, block)
    reference = Reference(model)
    entry = reference.entry(part)
    chosen = [top(score, keep) for score in scores]
    want = reference.run(entry, cuts={0: cut(entry, lambda number, rows, seen: rows[chosen[number]])})
    with torch.no_grad():
        plain = model(**part).logits[0, -1]
        with winnow.compress(model, plan) as handle:
            logits = model(**part).logits[0, -1]
    assert [item.kept.tolist() for item in handle.last.items] == [ids.tolist() for ids in chosen]
    assert chosen[0].tolist() != chosen[1].tolist()
    assert (logits - want.logits[0]).abs().max() <= 1e-5
    assert (logits - plain).abs().max() > 1e-2


def test_a_method_of_a_stranger_with_a_signal_of_its_own(stranger):
    """The signal's settings are part of the plan; the method is found by its slug alone."""
    check_by_hand(zoo.model("llava_clip"), "loudest:keep=5", 3, 5)
    plan = winnow.plan("loudest:keep=5,norms=ValueNorms(layer=1)")
    check_by_hand(zoo.model("llava_clip"), plan, 1, 5)
    assert winnow.plan(plan.key) == plan
    assert "loudest" in [entry.slug for entry in winnow.list_methods()]


def test_the_signal_of_a_stranger_follows_the_reductions_of_others(stranger):
    """What another method leaves is chosen from by the same norms."""
    model, part = zoo.model("llava_clip"), zoo.sample("llava_clip", "3 A 4")
    with torch.no_grad(), winnow.compress(model, "fastervlm:keep=12 + loudest:keep=5") as handle:
        model(**part)
        kept = handle.last.items[0].kept.tolist()
        with handle.using("fastervlm:keep=12"):
            model(**part)
            left = handle.last.items[0].kept
    assert kept == left[top(loudest(model, part, 3)[0][left], 5)].tolist()


def test_a_merged_token_has_what_the_stranger_says(stranger):
    from winnow.core.reduction import Reduction

    winnow.plan("loudest")  # imports it
    carry = sys.modules["stranger_loudest"].ValueNorms().carry
    merged = Reduction.assign(torch.tensor([0, 0, 1, 1]), torch.full((4,), 0.5), m=2)
    assert carry(torch.tensor([1.0, 3.0, 4.0, 2.0]), merged).tolist() == [3.0, 4.0]


def test_a_signal_that_is_defined_again_is_known_once(stranger):
    """As in a notebook, where a cell is run twice: the plan string names the class of now."""
    text = "loudest:norms=ValueNorms(layer=1)"
    first = winnow.plan(text).methods[0].norms
    importlib.reload(sys.modules["stranger_loudest"])
    again = winnow.plan(text).methods[0].norms
    assert type(again) is sys.modules["stranger_loudest"].ValueNorms
    assert type(again) is not type(first)


def test_the_method_of_a_stranger_passes_the_generic_checks(stranger):
    check_method(registry.method_class("loudest"))


def test_a_step_of_a_stranger_runs_on_plain_arrays(stranger):
    norms = torch.tensor([[0.1, 0.9, 0.5, 0.7], [0.9, 0.1, 0.7, 0.5]])
    found = run_step("loudest:keep=2", WITH_CLS, torch.randn(2, 4, 8), norms)
    assert [ids.tolist() for ids in found.kept] == [[1, 3], [0, 2]]
    assert [rows.shape for rows in found.rows] == [(2, 8), (2, 8)]


@pytest.mark.parametrize("plan", ["loudest:keep=5", "loudest:keep=5,norms=ValueNorms(layer=0)"])
def test_a_family_of_a_stranger_equals_by_hand(stranger, plan):
    check_by_hand(vipllava(), plan, 0 if "layer=0" in plan else 3, 5)


@pytest.mark.parametrize("plan", ["loudest:keep=100%", "fastv:layer=1,keep=100%", "hiprune:keep=100%"])
def test_keeping_all_on_a_family_of_a_stranger_is_bit_identical(stranger, plan):
    model, inputs = vipllava(), zoo.inputs("llava_clip", ("3 A 6", "2 B 4 C 5", "7"))
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": zoo.PAD}
    with torch.no_grad():
        logits, ids = model(**inputs).logits, model.generate(**inputs, **options)
        with winnow.compress(model, plan):
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(model.generate(**inputs, **options), ids)
        assert torch.equal(model(**inputs).logits, logits)


def test_a_family_of_a_stranger_says_what_it_does_not_offer(stranger):
    with pytest.raises(winnow.UnsupportedError, match=r"features.*projected, layers"):
        winnow.compress(vipllava(), "visionzip")
    assert "vipllava" in families.supported()


def test_without_its_file_the_family_is_refused():
    with pytest.raises(winnow.UnsupportedError, match="VipLlavaForConditionalGeneration has no adapter of its own"):
        families.family_of(vipllava())


def test_a_stranger_on_the_command_line(stranger, tmp_path):
    """Both together in `winnow bench`: a checkpoint of the stranger's family, read with the reference's processor."""
    from winnow.reference.build import make_processor
    from winnow.reference.presets import PRESETS
    from winnow.reference.vocabulary import EOS, IMAGE, PAD, TOKEN_ID

    preset = PRESETS["micro"]
    model = vipllava(
        preset.image, preset.patch, 16 * (len(TOKEN_ID) // 16 + 1), TOKEN_ID[IMAGE],
        pad_token_id=TOKEN_ID[PAD], eos_token_id=TOKEN_ID[EOS],
    )  # fmt: skip
    folder, store = tmp_path / "model", tmp_path / "runs.sqlite"
    model.save_pretrained(folder)
    make_processor(preset).save_pretrained(folder)
    path = os.pathsep.join([str(stranger), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "winnow.cli",
        "bench",
        "--model",
        str(folder),
        "--method",
        "loudest",
        "--keep",
        "8",
    ]
    command += ["--questions", "4", "--store", str(store), "--baselines", "random,downsample", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = [row for row in json.loads(done.stdout)["cells"] if row["cell"]["label"] == "loudest"]
    assert found["cell"]["status"] == "ok"
    assert found["kept"] == 8
