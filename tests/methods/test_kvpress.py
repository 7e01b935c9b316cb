"""kvpress: an object with its interface is the score of a cache method."""

import pytest
import torch

import winnow
from tests import kvhand, zoo
from winnow.contract import KVView, State
from winnow.core.errors import WinnowError
from winnow.methods import kvpress
from winnow.methods.kvpress import KVPress, add_press


class WindowPress:
    """A stand-in in the manner of kvpress's SnapKV: it makes the window's queries anew from hidden states."""

    window = 4

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        b, g, n, d = keys.shape
        cos, sin = kwargs["position_embeddings"]
        q = module.q_proj(hidden_states[:, -self.window :]).view(b, self.window, -1, d).transpose(1, 2)
        cos, sin = cos[:, -self.window :, None].transpose(1, 2), sin[:, -self.window :, None].transpose(1, 2)
        half = torch.cat([-q[..., d // 2 :], q[..., : d // 2]], -1)
        q = q * cos + half * sin
        group = q.shape[1] // g
        logits = q @ keys.repeat_interleave(group, 1).transpose(2, 3) * d**-0.5
        later = torch.ones(self.window, n).triu(n - self.window + 1).bool()
        votes = logits.masked_fill(later, -torch.inf).softmax(-1).mean(2)
        scores = votes.view(b, g, group, n).mean(2)
        scores[..., -self.window :] = scores.max() + 1
        return scores


@pytest.fixture
def presses(monkeypatch):
    monkeypatch.setattr(kvpress, "_presses", dict(kvpress._presses))
    return add_press


@pytest.mark.system("kvpress", "exact")
def test_a_scorer_keeps_what_it_prefers():
    keys, values = torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 8)
    action, _ = KVPress(keep=10).evict(KVView.of(keys, values), State())
    want = keys.norm(dim=-1).topk(10, largest=False).indices.sort().values
    assert torch.equal(action.k.index, want)
    stub = torch.arange(10).expand(2, 2, -1)
    assert not torch.equal(action.k.index, stub)


@pytest.mark.system("kvpress", "directional")
def test_a_scorer_that_looks_at_the_question_finds_a_planted_key(presses):
    keys = torch.randn(1, 1, 64, 16, generator=torch.Generator().manual_seed(0)) * 0.1
    keys[0, 0, 20] = 4.0

    class Sees:
        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            return (keys @ torch.ones(16)).abs()

    presses("sees", Sees())
    view = KVView.of(keys, keys)
    assert 20 in KVPress(press="sees", keep=4).evict(view, State())[0].k.index
    assert 20 not in KVPress(keep=4).evict(view, State())[0].k.index  # small norms first


@pytest.mark.parametrize(
    "build",
    [
        pytest.param("llama", marks=pytest.mark.system("kvpress", "model", build="llama")),
        pytest.param("qwen2", marks=pytest.mark.system("kvpress", "model", build="qwen2")),
        pytest.param("llava_clip", marks=pytest.mark.system("kvpress", "model", build="llava_clip")),
    ],
)
@pytest.mark.parametrize("ragged", [False, True])
def test_a_scorer_on_a_model_keeps_what_snapkv_keeps(presses, build, ragged):
    """What it is called with are the real tokens: the same slots as the method that reads the queries itself."""
    presses("window", WindowPress())
    if build in kvhand.TEXTS:
        model, inputs = kvhand.text_model(build), kvhand.prompt((19, 26, 11) if ragged else (20, 20))
    else:
        model, inputs = zoo.model(build), zoo.inputs(build, zoo.RAGGED if ragged else ("3 A 6",) * 2)
    found = []
    for plan in ("kvpress:press=window,keep=8", "snapkv:keep=8,window=4,kernel=1"):
        with winnow.compress(model, plan), torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
        found.append(kvhand.evicted_of(cache))
    assert len(found[0]) == len(found[1])
    for layer, gone in found[0].items():
        assert torch.equal(gone, found[1][layer])


def test_what_a_later_turn_reads_stays():
    model, inputs = kvhand.text_model("llama"), kvhand.prompt((20,))
    with winnow.compress(model, "kvpress:keep=8"), torch.no_grad():
        cache = model(**inputs).past_key_values
        model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache)
    assert cache.layers[0].store.length == 8 + 3


def test_what_a_scorer_does_wrong_is_said(presses):
    class Wrong:
        def score(self, *args):
            return torch.zeros(3)

    class Broken:
        def score(self, *args):
            raise KeyError("cache_position")

    presses("wrong", Wrong())
    presses("broken", Broken())
    model, inputs = kvhand.text_model("llama"), kvhand.prompt((12,))
    for name, said in (("wrong", r"expected \(1, 2, 12\)"), ("broken", "failed with KeyError")):
        with winnow.compress(model, f"kvpress:press={name},keep=4"), pytest.raises(WinnowError, match=said):
            model(**inputs)
    with pytest.raises(WinnowError, match="no scorer was added"):
        winnow.compress(model, "kvpress:press=unknown,keep=4")
    with pytest.raises(WinnowError, match="has a method score"):
        add_press("number", 3)
    with pytest.raises(WinnowError, match="is a word"):
        add_press("a,b=c", WindowPress())
