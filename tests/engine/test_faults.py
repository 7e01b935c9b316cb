"""Faults that were found in use, each as a kind: what gave wrong numbers in silence, what crashed, what was refused."""

from __future__ import annotations

import contextvars
import copy
import gc
import sys
import warnings
import weakref

import pytest
import torch
import zoo
from byhand import top
from probes import Pick, forward, generate, new_tokens
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    GraniteConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Olmo2Config,
    SmolLM3Config,
    StableLmConfig,
)

import winnow
from winnow.core.ledger import Ledger
from winnow.signals.tap import Tap

ONE = ("3 A 6",)


# 2, 20: torch.compile


@pytest.mark.parametrize(("build", "plan"), [("llava_clip", Pick(keep=5)), ("llava_next", "visionzip:keep=6")])
def test_compiled_callers_run_compressed_and_detach_cleanly(build, plan):
    """Whether the model was compiled before or after it was compressed; and plain models compile as ever."""
    model, inputs = zoo.model(build), zoo.inputs(build, ONE)
    torch._dynamo.reset()
    plain = forward(model, inputs).logits
    early = torch.compile(model, backend="eager")
    assert torch.equal(forward(early, inputs).logits, plain)
    with winnow.compress(model, plan):
        right = forward(model, inputs).logits
        assert not torch.equal(right, plain)
        assert torch.equal(forward(torch.compile(model, backend="eager"), inputs).logits, right)
        assert torch.equal(forward(early, inputs).logits, right)
    assert torch.equal(forward(early, inputs).logits, plain)
    assert torch.equal(forward(model, inputs).logits, plain)
    torch._dynamo.reset()


def test_a_model_that_was_compiled_in_place_is_refused():
    model = zoo.model("llava_clip")
    model.model.compile(backend="eager")
    with pytest.raises(winnow.UnsupportedError, match="compiled in place"):
        winnow.compress(model, Pick(keep=3))


# 3: rows that hold several samples


@pytest.mark.parametrize("plan", [Pick(keep="100%"), Pick(keep=5), "hiprune:keep=7"])
def test_padding_free_rows_stay_apart(plan):
    """Positions that start again, no mask, no cache: the second sample is what it is alone."""
    model = zoo.model("llava_clip", dtype=torch.float64)
    a, b = zoo.samples("llava_clip", ("3 A 6", "4 B 9"), dtype=torch.float64)
    n, k = a["input_ids"].shape[1], b["input_ids"].shape[1]
    packed = {
        "input_ids": torch.cat([a["input_ids"], b["input_ids"]], 1),
        "pixel_values": torch.cat([a["pixel_values"], b["pixel_values"]]),
        "position_ids": torch.cat([torch.arange(n), torch.arange(k)])[None],
    }
    with winnow.compress(model, plan):
        together = forward(model, packed, use_cache=False).logits[0, -1]
        alone = forward(model, b, use_cache=False).logits[0, -1]
    assert (together - alone).abs().max() < 1e-12


def test_padding_free_rows_are_refused_where_the_question_is_read():
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", ONE)
    n = inputs["input_ids"].shape[1]
    packed = {k: v for k, v in inputs.items() if k != "attention_mask"}
    packed["position_ids"] = torch.cat([torch.arange(n - 4), torch.arange(4)])[None]
    with winnow.compress(model, "fastv:keep=5"), pytest.raises(winnow.UnsupportedError, match="several samples"):
        forward(model, packed, use_cache=False)


# 6: the ledger is the last request's


def test_the_ledger_of_a_request_without_pictures_says_so():
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", ONE)
    text = zoo.inputs("llava_clip", ("9",))
    with winnow.compress(model, Pick(keep=5)) as handle:
        generate(model, inputs)
        assert [len(item.kept) for item in handle.last.items] == [5]
        generate(model, text)
        assert handle.last.items == ()
        assert "no picture" in handle.last.read_in_full
        assert handle.last.flops == handle.last.flops_full > 0
        assert handle.last.kv_bytes == handle.last.kv_bytes_full > 0
        embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
        generate(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})
        assert "inputs_embeds" in handle.last.read_in_full
        generate(model, {k: v for k, v in inputs.items() if k != "pixel_values"})
        assert "25 image placeholders" in handle.last.read_in_full


# 7, 8: 3-D positions


def test_qwen_without_token_types_runs_as_the_plain_model():
    model, inputs = zoo.model("qwen2_5_vl"), zoo.inputs("qwen2_5_vl", ONE)
    del inputs["mm_token_type_ids"]
    plain = forward(model, inputs).logits
    with winnow.compress(model, Pick(keep="100%")):
        assert torch.equal(forward(model, inputs).logits, plain)
    with winnow.compress(model, Pick(keep=3)) as handle:
        assert generate(model, inputs).sequences.shape[1] > inputs["input_ids"].shape[1]
        assert [len(item.kept) for item in handle.last.items] == [3]


@pytest.mark.parametrize("build", zoo.BUILDS)
@torch.no_grad()
def test_a_cache_that_was_reset_is_a_new_cache(build):
    model = zoo.model(build)
    a, b = zoo.samples(build, ("3 A 6", "3 B 9"))
    config = model.config.get_text_config()
    with winnow.compress(model, Pick(keep=5)):
        fresh, used = DynamicCache(config=config), DynamicCache(config=config)
        want = model(**b, past_key_values=fresh, use_cache=True).logits
        model(**a, past_key_values=used, use_cache=True)
        used.reset()
        assert torch.equal(model(**b, past_key_values=used, use_cache=True).logits, want)


@pytest.mark.parametrize("build", zoo.BUILDS)
@torch.no_grad()
def test_a_turn_with_padding_equals_the_turn_alone(build):
    model = zoo.model(build)
    parts = zoo.samples(build, ("3 A 6", "3 B 9"))
    batch = zoo.collate(parts)
    turn = torch.tensor([[0, 0, 0, 11, 12], [13, 14, 15, 16, 17]])
    mask = torch.cat([batch["attention_mask"], torch.tensor([[0, 0, 0, 1, 1], [1] * 5])], 1)
    positions = None if build == "qwen2_5_vl" else (mask.cumsum(1) - 1).clamp_min(0)
    first = {} if positions is None else {"position_ids": positions[:, :-5]}
    then = {} if positions is None else {"position_ids": positions[:, -5:]}
    with winnow.compress(model, Pick(keep=5)):
        cache = model(**batch, use_cache=True, **first).past_key_values
        got = model(input_ids=turn, attention_mask=mask, past_key_values=cache, **then).logits[0, -1]
        cache = model(**parts[0], use_cache=True).past_key_values
        alone = model(input_ids=turn[:1, 3:], past_key_values=cache).logits[0, -1]
    assert (got - alone).abs().max() < 1e-5


# 9: lifetime


@pytest.mark.parametrize("plan", ["fastervlm:keep=5", "fastv:keep=5", "visionzip:keep=6"])
def test_a_dropped_model_is_freed_while_it_is_compressed(plan):
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", ONE)
    gone = weakref.ref(model)
    handle = winnow.compress(model, plan)
    generate(model, inputs)
    del model, handle
    gc.collect()
    assert gone() is None


def test_attaching_and_detaching_leaves_nothing_behind():
    model, inputs = zoo.model("llava_next"), zoo.inputs("llava_next", ONE)
    others = [x for x in gc.get_objects() if isinstance(x, Ledger)]  # of tests before this one
    for _ in range(5):
        with winnow.compress(model, "visionzip:keep=10"):
            forward(model, inputs)
    gc.collect()
    held = [value for name, value in contextvars.copy_context().items() if name.name.startswith("winnow")]
    assert not any(value for value in held)
    assert not [x for x in gc.get_objects() if isinstance(x, Ledger) and not any(x is other for other in others)]


# 10: layers that are not Llama's


@pytest.mark.parametrize("kind", [SmolLM3Config, Olmo2Config, StableLmConfig, GraniteConfig])
def test_a_probe_sees_what_the_layer_itself_will_use(kind):
    """Layers without rotation, with norms behind or within attention, with partial rotation; scaled embeddings."""
    vision = CLIPVisionConfig(num_hidden_layers=5, projection_dim=48, **zoo._tower(zoo.SIDE))
    text = kind(**zoo._text(4, {"embedding_multiplier": 3.0} if kind is GraniteConfig else {}))
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=zoo.IMAGE, vision_feature_layer=-2)
    )
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        zoo._fill(name, weight.data, generator)
    model, sample, seen = model.double().eval(), zoo.sample("llava_clip", "3 A 6", dtype=torch.float64), {}
    tap = Tap(
        model.model.language_model.layers[3].self_attn, lambda m, q, k, *_: seen.update(q=q, k=k, scale=m.scaling)
    )
    forward(model, sample, use_cache=False)
    tap.remove()
    keys = seen["k"].repeat_interleave(2, 1)
    row = (seen["q"][:, :, -1:] @ keys.transpose(-1, -2) * seen["scale"]).softmax(-1).mean(1)[0, 0]
    want = top(row[(sample["input_ids"][0] == zoo.IMAGE).nonzero()[:, 0]], 12).tolist()
    with winnow.compress(model, "pyramiddrop:ratios=[50%],layers=[3]") as handle:
        for _ in range(2):  # the first request compares the quick way with the layer's own
            forward(model, sample)
            assert handle.last.items[0].kept.tolist() == want
    with winnow.compress(model, Pick(keep="100%")):
        plain = forward(copy.deepcopy(model), sample).logits
        assert torch.equal(forward(model, sample).logits, plain)


# 16: what the mask hides


@pytest.mark.parametrize("plan", [Pick(keep="100%"), Pick(keep="100%", at="layers[1]"), "pyramiddrop:ratios=[100%]"])
def test_picture_tokens_that_the_mask_hides_stay_hidden(plan):
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", ("3 A 6", "4 B 9"))
    at = (inputs["input_ids"][0] == zoo.IMAGE).nonzero()[:, 0]
    inputs["attention_mask"][0, at[3:7]] = 0
    inputs["attention_mask"][1, -3] = 0  # a hole in the text
    plain = forward(model, inputs).logits[:, -1]
    with winnow.compress(model, plan):
        assert torch.equal(forward(model, inputs).logits[:, -1], plain)
    with winnow.compress(model, Pick(keep=21)) as handle:
        forward(model, inputs)
        assert not set(handle.last.items[0].kept.tolist()) & {3, 4, 5, 6}


# 17, 18, 19: copies, attention implementations, lists of states


def test_a_copy_follows_its_own_configuration_and_can_be_compressed():
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", ONE)
    plain = forward(model, inputs).logits
    with winnow.compress(model, "fastv:keep=8"):
        made = copy.deepcopy(model)
    assert torch.equal(forward(made, inputs).logits, plain)
    for layer in made.model.language_model.layers:
        assert layer.self_attn.config is made.model.language_model.config
    with winnow.compress(made, "fastv:keep=8") as handle:
        forward(made, inputs)
        assert [len(item.kept) for item in handle.last.items] == [8]


def test_tapped_layers_follow_a_change_of_the_attention_implementation():
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", ONE)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    plain = forward(eager, inputs, output_attentions=True)
    with winnow.compress(model, "fastv:layer=1,keep=100%"):
        assert model.model.language_model.layers[0].self_attn.config._attn_implementation == "sdpa"
        model.set_attn_implementation("eager")
        got = forward(model, inputs, output_attentions=True)
        assert model.model.language_model.layers[0].self_attn.config._attn_implementation == "eager"
    assert torch.equal(got.logits, plain.logits)
    assert len(got.attentions) == len(plain.attentions) == zoo.DEPTH
    assert all(torch.equal(a, b) for a, b in zip(got.attentions, plain.attentions, strict=True))


@pytest.mark.parametrize("wanted", [[1], [0, 2], [0]])
def test_a_list_of_hidden_states_has_these_states_at_their_logical_length(wanted):
    """Qwen's base model does not pass the request on to its tower, so plain transformers runs on every version."""
    model, inputs = zoo.model("qwen2_5_vl"), zoo.inputs("qwen2_5_vl", ONE)
    plain = forward(model, inputs, output_hidden_states=wanted).hidden_states
    full = forward(model, inputs, output_hidden_states=True).hidden_states
    with winnow.compress(model, Pick(keep="100%", at="layers[1]")):
        same = forward(model, inputs, output_hidden_states=wanted).hidden_states
    with winnow.compress(model, Pick(keep=5, at="layers[1]")):
        cut = forward(model, inputs, output_hidden_states=wanted).hidden_states
    assert len(plain) == len(same) == len(cut)
    for a, b, c in zip(plain, same, cut, strict=True):
        assert (a is None) == (b is None) == (c is None)
        if a is not None:
            assert torch.equal(a, b)
            assert c.shape == full[0].shape


# 21: what the plain model does


def test_a_compressed_model_can_be_its_own_assistant():
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", ONE)
    with winnow.compress(model, Pick(keep=5)):
        want = new_tokens(generate(model, inputs), inputs)
        assert torch.equal(new_tokens(generate(model, inputs, assistant_model=model), inputs), want)


@pytest.mark.parametrize("build", zoo.BUILDS)
def test_embeddings_with_pixels_equal_ids_with_pixels(build):
    model, inputs = zoo.model(build), zoo.inputs(build, ONE)
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "mm_token_type_ids")}
    ids = {k: v for k, v in inputs.items() if k != "mm_token_type_ids"}
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with winnow.compress(model, Pick(keep=5)) as handle:
        want = forward(model, ids).logits
        assert torch.equal(forward(model, {**rest, "inputs_embeds": embeds}).logits, want)
        assert [len(item.kept) for item in handle.last.items] == [5]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: torch.utils._pytree.tree_map(lambda y: y, x)])
def test_encoder_outputs_may_be_copied_and_rebuilt(copied):
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", ONE)
    text = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with winnow.compress(model, Pick(keep=5)):
        want = forward(model, inputs).logits
        with torch.no_grad():
            outputs = {"image": model.model.get_image_features(inputs["pixel_values"], return_dict=True)}
        assert torch.equal(forward(model, {**text, "mm_encoder_outputs": copied(outputs)}).logits, want)


@pytest.mark.parametrize("first", ["offload", "compress"])
def test_accelerates_hooks_and_ours_go_together(first):
    accelerate = pytest.importorskip("accelerate", reason="accelerate comes with the development extra")
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", ONE)
    plain = forward(model, inputs).logits
    with winnow.compress(model, Pick(keep=5)):
        want = forward(model, inputs).logits
    if first == "offload":
        accelerate.cpu_offload(model, torch.device("cpu"))
    with winnow.compress(model, Pick(keep=5)) as handle:
        if first == "compress":
            accelerate.cpu_offload(model, torch.device("cpu"))
        assert torch.equal(forward(model, inputs).logits, want)
        generate(model, inputs)
        assert [len(item.kept) for item in handle.last.items] == [5]
    assert torch.equal(forward(model, inputs).logits, plain)


# What the engine does not understand, it refuses


def _other_projector(model):
    model.model.multi_modal_projector = copy.deepcopy(model.model.multi_modal_projector)


def _other_tower(model):
    model.model.vision_tower = copy.deepcopy(model.model.vision_tower)


def _other_lm(model):
    model.model.language_model = copy.deepcopy(model.model.language_model)


def _other_forward(model):
    plain = type(model.model).forward
    model.model.forward = lambda *args, **kwargs: plain(model.model, *args, **kwargs)


@pytest.mark.parametrize("replace", [_other_projector, _other_tower, _other_lm, _other_forward])
def test_a_part_that_was_replaced_while_compressed_is_refused(replace):
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", ONE)
    with winnow.compress(model, Pick(keep=5)):
        replace(model)
        with pytest.raises(winnow.UnsupportedError, match="replaced"):
            forward(model, inputs)


def test_attention_that_cannot_be_seen_is_refused():
    """A module that attends by itself never calls the tap: the method would rank by nothing."""
    model, inputs = zoo.model("llava_clip"), zoo.inputs("llava_clip", ONE)
    with winnow.compress(model, "fastv:layer=1,keep=5"):
        attention = model.model.language_model.layers[0].self_attn
        attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)
        with pytest.raises(winnow.WinnowError, match="was not recorded"):
            forward(model, inputs, use_cache=False)


def test_a_plan_that_reads_the_question_warns_once_without_a_processor():
    model = zoo.model("llava_clip")
    with pytest.warns(winnow.WinnowWarning, match="processor="):
        handle = winnow.compress(model, "todre")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with handle.using("todre:keep=3"):
            pass
        handle.detach()
        winnow.compress(model, "fastv").detach()  # the last token needs no template


def test_nothing_of_winnow_is_imported_by_the_model():
    """Hooks are found by their module: after detaching none is left anywhere in the model."""
    model = zoo.model("llava_clip")
    winnow.compress(model, "fastv + visionzip:keep=5 | positions=keep").detach()
    ours = [
        hook
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
        if type(hook).__module__.startswith("winnow")
    ]
    assert ours == []
    assert "forward" not in vars(model.model)
    assert sys.modules["winnow"] is winnow
