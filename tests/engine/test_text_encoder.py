"""CLIP's text tower, handed over: what signals of its space give, how it is loaded, and what is refused."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import zoo
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

import winnow
from winnow.contract import ClipPatches, ClipText, Method, Observe, Point, Step, UnsupportedError, WinnowError
from winnow.core.plan import Plan

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Tokenizer:
    """Of the language model: a letter for each token."""

    all_special_ids = (zoo.IMAGE, zoo.PICTURE_START, zoo.PICTURE_END)

    def decode(self, ids, **options):
        return "".join(LETTERS[i % 26] for i in ids)


PROCESSOR = SimpleNamespace(tokenizer=Tokenizer(), chat_template=None)


@pytest.fixture(scope="module")
def clip():
    """A CLIP whose vision tower has the shape of the zoo's, and its tokenizer."""
    torch.manual_seed(0)
    vocabulary = {c: i for i, c in enumerate([*LETTERS, *(f"{c}</w>" for c in LETTERS)])}
    vocabulary |= {"<|startoftext|>": 52, "<|endoftext|>": 53}
    tower = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 5}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    text |= {"vocab_size": 54, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    vision = tower | {"image_size": zoo.SIDE, "patch_size": zoo.PATCH}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    torch.nn.init.normal_(model.vision_model.post_layernorm.weight)
    return model, CLIPTokenizer(vocab=vocabulary, merges=[])


@dataclass(frozen=True)
class Ear(Method):
    """Keeps what it sees."""

    heard: list = field(default_factory=list, compare=False, metadata={"setting": False})

    slug: ClassVar[str] = "clip-ear"

    def steps(self, info):
        needs = (ClipPatches(), ClipPatches(-1, norm=False), *(ClipText(pool=p) for p in ("eot", "pieces", "end")))
        return (Step(Point("projected"), self._hear, needs),)

    def _hear(self, view, state):
        self.heard.append(view)
        return Observe()


@pytest.fixture(autouse=True)
def _no_template():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", winnow.WinnowWarning)
        yield


def words_of(sample) -> str:
    ids = sample["input_ids"][0].tolist()
    behind = ids[max(i for i, token in enumerate(ids) if token == zoo.IMAGE) + 1 :]
    return Tokenizer().decode([token for token in behind if token > zoo.PICTURE_END])


@torch.no_grad()
def by_hand(model, clip, sample):
    """Patches, patches of the last block, and the text at its end, in pieces, and at the last of 77 places."""
    model_, tokenizer = clip
    out = model.model.vision_tower(sample["pixel_values"], output_hidden_states=True)
    feature, last = out.hidden_states[-2][:, 1:], out.hidden_states[-1][:, 1:]
    text = words_of(sample)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids.shape[1] <= 77
    short = model_.text_projection(model_.text_model(input_ids=ids).pooler_output)
    gap = torch.nn.functional.pad
    wide, mask = gap(ids, (0, 77 - ids.shape[1])), gap(torch.ones_like(ids), (0, 77 - ids.shape[1]))
    piece = model_.text_projection(model_.text_model(input_ids=wide, attention_mask=mask).pooler_output)
    full = tokenizer(text, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    end = model_.text_projection(model_.text_model(input_ids=full).last_hidden_state[:, -1])
    patches = model_.visual_projection(model_.vision_model.post_layernorm(feature))
    return patches, model_.visual_projection(last), short[None], piece[None], end[None]


def test_signals_of_the_common_space(clip):
    model, samples = zoo.model("llava_clip"), zoo.samples("llava_clip", ("3 A 6", "3 A 9"))
    ear = Ear()
    with winnow.compress(model, Plan((ear,)), processor=PROCESSOR, text_encoder=clip), torch.no_grad():
        model(**zoo.collate(samples))
    for i, sample in enumerate(samples):
        for signal, want in zip(ear.steps(None)[0].needs, by_hand(model, clip, sample), strict=True):
            views = [(view, lane) for view in ear.heard for lane in range(view.b)]
            view, lane = views[i]
            torch.testing.assert_close(view[signal][lane], want[0], rtol=1e-4, atol=1e-5)


def test_a_long_question_is_cut_into_pieces(clip):
    from winnow.engine.text_encoder import TextEncoder

    encoder = TextEncoder(clip, torch.device("cpu"))
    text = " ".join(LETTERS[i % 26] for i in range(100))
    ids = clip[1](text, return_tensors="pt")["input_ids"]
    assert 77 < ids.shape[1] <= 154
    assert encoder.text(text, "pieces").shape == (2, 16)
    with torch.no_grad():
        first = clip[0].text_model(input_ids=ids[:, :77], attention_mask=torch.ones(1, 77, dtype=torch.int64))
        # Without an end of the text transformers takes the first place.
        want = clip[0].text_projection(first.pooler_output)
    torch.testing.assert_close(encoder.text(text, "pieces")[:1], want)


@pytest.mark.parametrize("plan", ["cdpruner:released,keep=9", "recoverable-compression:text=clip,keep=9"])
def test_methods_run_as_on_the_tensors_alone(clip, plan):
    model, (sample,) = zoo.model("llava_clip"), zoo.samples("llava_clip", zoo.SINGLE)
    with winnow.compress(model, plan, processor=PROCESSOR, text_encoder=clip) as handle, torch.no_grad():
        model(**sample)
        (item,) = handle.last.items
        assert len(item.kept) == 9
    if plan.startswith("cdpruner"):
        from methods.test_cdpruner import authors

        patches, _, _, piece, _ = by_hand(model, clip, sample)
        with torch.no_grad():
            rows = model.model.get_image_features(sample["pixel_values"], return_dict=True).pooler_output[0]
        assert [item.kept.tolist()] == authors(rows[None], patches, piece[0], 9)


def test_a_folder_is_read_when_a_plan_needs_it(clip, tmp_path):
    model, (sample,) = zoo.model("llava_clip"), zoo.samples("llava_clip", zoo.SINGLE)
    missing = {"processor": PROCESSOR, "text_encoder": str(tmp_path / "nothing")}
    with winnow.compress(model, "divprune:keep=5", **missing) as handle, pytest.raises(WinnowError, match="be loaded"):
        handle.bind("cdpruner:text=clip")
    for part in clip:
        part.save_pretrained(tmp_path / "clip")
    ears = [Ear(), Ear()]
    for ear, given in zip(ears, (clip, tmp_path / "clip"), strict=True):
        with winnow.compress(model, Plan((ear,)), processor=PROCESSOR, text_encoder=given), torch.no_grad():
            model(**sample)
    for signal in ears[0].steps(None)[0].needs:
        torch.testing.assert_close(ears[0].heard[0][signal], ears[1].heard[0][signal])
    clip[0].vision_model.save_pretrained(tmp_path / "half")
    clip[1].save_pretrained(tmp_path / "half")
    with pytest.raises(WinnowError, match=r"lacks|could not be loaded"):
        winnow.compress(model, "cdpruner:text=clip", processor=PROCESSOR, text_encoder=tmp_path / "half")
    torch.save({}, tmp_path / "clip" / "pytorch_model.bin")
    (tmp_path / "clip" / "model.safetensors").unlink()
    with pytest.raises(WinnowError, match="could not be loaded"):
        winnow.compress(model, "cdpruner:text=clip", processor=PROCESSOR, text_encoder=tmp_path / "clip")


def test_what_does_not_fit_is_refused(clip):
    plan = "cdpruner:text=clip"
    for build in ("llava_siglip", "qwen2_5_vl"):
        with pytest.raises(UnsupportedError, match="the CLIP whose vision tower the model has"):
            winnow.compress(zoo.model(build), plan, processor=PROCESSOR, text_encoder=clip)
    model = zoo.model("llava_clip")
    with pytest.raises(UnsupportedError, match="and the processor"):
        winnow.compress(model, plan, text_encoder=clip)
    for wrong in (3, clip[0]):
        with pytest.raises(WinnowError, match=r"model, tokenizer"):
            winnow.compress(model, plan, processor=PROCESSOR, text_encoder=wrong)
    with pytest.raises(WinnowError, match="has no visual_projection"):
        winnow.compress(model, plan, processor=PROCESSOR, text_encoder=(torch.nn.Linear(2, 2), clip[1]))
