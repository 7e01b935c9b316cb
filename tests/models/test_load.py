"""Loading: a complete checkpoint in safetensors, or an error of our own that says what to do. F1, F2, F3."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
import transformers
from PIL import Image

import winnow
from tests import kvhand
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.models.load import load
from winnow.reference.build import make_model, make_processor
from winnow.reference.presets import preset


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model(preset("micro"), seed=3).save_pretrained(folder)
    make_processor(preset("micro")).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def refused(folder, **kwargs) -> str:
    with pytest.raises(WinnowError) as caught:
        load(folder, **kwargs)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None, "the library's own error must not ride along"
    return str(caught.value)


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_gives_the_same_weights_in_evaluation_mode(original):
    model, processor = load(original, device="cpu")
    expected = make_model(preset("micro"), seed=3).state_dict()
    assert not model.training
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert processor.image_processor is not None


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype(original, dtype):
    assert load(original, device="cpu", dtype=dtype)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", "float33", torch.int64, "nn"])
def test_a_dtype_that_is_none_is_refused(original, dtype):
    assert "bfloat16" in refused(original, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:97", "meta7"])
def test_a_device_that_is_not_there_is_refused(original, device):
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "cpu" in refused(original, device=device)


@pytest.mark.parametrize("name", ["no/such-checkpoint", "nothing", "./nowhere", "../../etc/passwd", "a b/c", ""])
def test_what_is_not_there_is_named_with_what_to_give(name):
    text = refused(name)
    assert "llava-hf/llava-1.5-7b-hf" in text
    assert "http" not in text


def test_a_folder_without_a_config_is_no_checkpoint(tmp_path):
    assert "config.json" in refused(tmp_path)


def test_a_model_that_says_no_words_is_unsupported(checkpoint):
    edit(checkpoint, model_type="vit")
    with pytest.raises(UnsupportedError, match="llava_next"):
        load(checkpoint)


def test_a_language_model_comes_with_its_tokenizer_and_its_cache_is_compressed(tmp_path):
    """Saved and loaded again, the plan that stands beside the weights among the rest."""
    plain = kvhand.text_model("llama")
    make_processor(preset("micro")).tokenizer.save_pretrained(tmp_path)
    with winnow.compress(plain, "snapkv:keep=8,window=2"):
        plain.save_pretrained(tmp_path)
    in_full, tokenizer = winnow.load(tmp_path, plan=None, device="cpu")
    assert type(in_full).__name__ == "LlamaForCausalLM"
    assert tokenizer.vocab_size
    inputs = kvhand.prompt((20,))
    assert torch.equal(in_full(**inputs).logits, plain(**inputs).logits)
    model, _ = winnow.load(tmp_path, device="cpu")
    handle = winnow.handle_of(model)
    assert handle is not None
    cache = model(**inputs).past_key_values
    assert handle.last.kv_slots == (2 * 8,) * 3
    assert cache.get_seq_length() == 20
    with pytest.raises(UnsupportedError, match="is a language model"):
        winnow.load(tmp_path, plan="divprune:keep=4", device="cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"_attn_implementation_internal": "somebody/kernel"},
        {"attn_implementation": "somebody/kernel"},
    ],
    ids=["auto_map", "attn_internal", "attn_kernel"],
)
@pytest.mark.parametrize("nested", [False, True])
def test_F3_a_config_that_brings_code_is_refused(checkpoint, changes, nested):
    (checkpoint / "evil.py").write_text("raise SystemExit('the code of the checkpoint ran')")
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    edit(checkpoint, **({"text_config": {**text, **changes}} if nested else changes))
    message = refused(checkpoint)
    assert next(iter(changes)) in message
    assert "trust_remote_code" in message


def test_F3_code_in_the_processor_alone_is_not_run(checkpoint):
    (checkpoint / "evil.py").write_text("raise SystemExit('the code of the checkpoint ran')")
    path = checkpoint / "processor_config.json"
    settings = {"auto_map": {"AutoProcessor": "evil.Processor"}, "processor_class": "EvilProcessor"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    assert "processor" in refused(checkpoint)


def test_F1_pickled_weights_are_refused(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    assert "safetensors" in refused(checkpoint)


def test_F2_a_truncated_file_is_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "safetensors" in refused(checkpoint)


def test_F2_missing_weights_are_named_instead_of_made_up(checkpoint):
    from safetensors.torch import load_file, save_file

    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    gone = next(name for name in weights if "mlp" in name and name.endswith("down_proj.weight"))
    del weights[gone]
    save_file(weights, path, metadata={"format": "pt"})
    assert "down_proj" in refused(checkpoint)


def test_F2_a_weight_of_another_shape_is_refused(checkpoint):
    from safetensors.torch import load_file, save_file

    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("down_proj.weight"))
    weights[name] = weights[name][:, :-1].contiguous()
    save_file(weights, path, metadata={"format": "pt"})
    assert refused(checkpoint)


def test_a_checkpoint_without_a_processor_is_refused(checkpoint):
    for path in checkpoint.glob("*"):
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    assert "processor" in refused(checkpoint)


@pytest.mark.parametrize("dtype", ["float16", "half", torch.float64, "auto", None])
def test_every_dtype_in_which_a_model_runs_is_taken(original, dtype):
    assert load(original, device="cpu", dtype=dtype)[0].dtype in (torch.float16, torch.float32, torch.float64)


STRANGE = [
    name
    for name in sorted(dir(torch))
    if isinstance(getattr(torch, name), torch.dtype)
    and getattr(torch, name) not in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
]


@pytest.mark.parametrize("dtype", [*STRANGE, *(getattr(torch, name) for name in STRANGE), "", "Tensor", 0, [], 3.5])
def test_every_other_dtype_is_refused_with_those_that_are_allowed(original, dtype):
    said = refused(original, dtype=dtype)
    assert all(name in said for name in ("float32", "bfloat16", "float16", "float64"))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "nonsense"])
def test_a_checkpoint_whose_own_dtype_no_model_runs_in_needs_another(checkpoint, dtype):
    edit(checkpoint, dtype=dtype)
    said = refused(checkpoint, device="cpu")
    assert dtype in said
    assert "--dtype" in said


@pytest.mark.parametrize("device", ["meta", "xla", "", 5.5, []])
def test_a_device_that_cannot_compute_is_refused(original, device):
    assert "cpu" in refused(original, device=device)


@pytest.mark.parametrize("revision", ["", 5, ["main"]])
def test_a_revision_that_is_none_is_refused(revision):
    assert "commit" in refused("llava-hf/llava-1.5-7b-hf", revision=revision)


def test_a_folder_and_the_bundled_model_have_no_revisions(original):
    assert "Hub id" in refused(original, revision="main")
    assert "Hub id" in refused(None, revision="main")


def test_a_revision_is_asked_for_and_named(monkeypatch):
    asked = []
    monkeypatch.setattr(
        transformers.PretrainedConfig, "get_config_dict", lambda name, **kwargs: asked.append(kwargs) or ({}, {})
    )
    refused("no/such-checkpoint", revision="v1")
    assert asked == [{"revision": "v1"}]


@pytest.mark.parametrize("places", ["cpu", "cuda:0", "", 5, ["cpu"]])
def test_a_device_map_that_is_none_is_refused(original, places):
    assert "balanced" in refused(original, device_map=places)


def test_a_map_that_does_not_fit_the_model_is_refused(original):
    assert "device_map" in refused(original, device_map={"": "nowhere"})
    assert "multi_modal_projector" in refused(
        original, device_map={"model.vision_tower": "cpu", "model.language_model": "cpu"}
    )


def test_a_device_and_a_map_are_one_too_many(original):
    assert "not both" in refused(original, device="cpu", device_map="auto")


@pytest.mark.parametrize("places", ["auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}, None])
def test_a_map_places_the_model(original, places):
    model, _ = load(original, device_map=places, **({} if places else {"device": "cpu"}))
    expected = make_model(preset("micro"), seed=3).state_dict()
    assert not model.training
    assert all(torch.equal(value.cpu(), expected[name]) for name, value in model.state_dict().items())


def test_parts_may_stay_on_disk(original, tmp_path):
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "model.language_model": "disk"}
    model, processor = winnow.load(original, device_map={**places, "lm_head": "disk"}, plan="hiprune:keep=5")
    assert any(weight.is_meta for weight in model.parameters())
    plain, _ = winnow.load(original, device="cpu", plan="hiprune:keep=5")
    inputs = processor(
        images=Image.new("RGB", (64, 48), "red"), text="USER: <image>\n what ASSISTANT:", return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("absent", ["accelerate"])
@pytest.mark.parametrize("asked", [{"device_map": "auto"}, {"quantization": "8bit"}])
def test_what_is_not_installed_is_named(original, monkeypatch, absent, asked):
    from winnow.models import load as loading
    from winnow.models import quantized

    for module in (loading, quantized):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name == absent else find_spec(name))
    assert f"pip install {absent}" in refused(original, device="cpu" if "quantization" in asked else None, **asked)
