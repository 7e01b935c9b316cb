"""LoCoCo by its card: heavy hitters as they are, and mixtures of the rest by a prior and a trained convolution."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import winnow
from tests import kvhand
from tests.kvdecode import case, words
from winnow.contract import KVBudget, KVReduce, KVView, ModelInfo, Observe, Reduction, State
from winnow.core.errors import UnsupportedError, WinnowError
from winnow.learn.pruners.text import lococo as learning
from winnow.methods.h2o import H2O
from winnow.methods.lococo import LoCoCo
from winnow.parts.convolved import SHARPNESS, mixtures
from winnow.parts.learned import untrained
from winnow.reference import text

from .kvchecks import attention_by_hand, sample, view_of

INFO = ModelInfo(depth=2, head_dim=8)
SLOTS, CHUNK = learning.SLOTS, learning.CHUNK


def made(**settings) -> tuple[LoCoCo, nn.Module]:
    method = LoCoCo(**settings)
    return method, method.build(INFO)


def shown(module: nn.Module | None, **known) -> KVView:
    return view_of(**({"n": 48, "layer": 1, "module": module} | known))


def _by_hand(view: KVView, method: LoCoCo, count: int) -> list[tuple[list[int], Tensor]]:
    """Slots whose places the outputs take, and rows of W over all slots, by lane."""
    scores = attention_by_hand(view).sum(2).unflatten(1, (view.heads, view.group)).mean(2).flatten(0, 1)
    scores[:, view.n - method.local :] = torch.inf
    mixer, found = view.module[view.layer], []
    kernel = mixer.conv.kernel_size[0]
    alpha = torch.sigmoid(3 + mixer.alpha_bias).item() if method.alpha is None else method.alpha
    x = torch.cat([view.keys, view.values], 3).flatten(0, 1)
    for s, own in zip(scores.tolist(), x, strict=True):
        order = sorted(range(view.n), key=lambda j: (-s[j], j))
        heavy, priors = order[: count // 2], sorted(order[count // 2 : count])
        rest = sorted(set(range(view.n)) - set(heavy))
        rows = {j: torch.eye(view.n)[j] for j in heavy}
        for number, prior in enumerate(priors):
            logits = []
            for place in range(len(rest)):
                taps = [tap for tap in range(kernel) if 0 <= place + tap - kernel // 2 < len(rest)]
                near = own[[rest[place + tap - kernel // 2] for tap in taps]]
                total = (mixer.conv.weight[number][:, taps] * near.T).sum() + mixer.conv.bias[number]
                logits.append(SHARPNESS * max(total.item(), 0.0))
            learned = torch.zeros(view.n)
            learned[rest] = torch.tensor(logits).softmax(0)
            rows[prior] = (1 - alpha) * torch.eye(view.n)[prior] + alpha * learned
        found.append((sorted(rows), torch.stack([rows[j] for j in sorted(rows)])))
    return found


def _is_the_card(shorten) -> None:
    for seed, settings in enumerate(({}, {"alpha": 0.5}, {"alpha": 1.0, "local": 2})):
        method, module = made(keep=8, **settings)
        view = shown(module, b=2, n=24, seed=seed)
        action = shorten(view, method)
        assert action.k is action.v
        maps, slots = action.k.to_matrix().flatten(0, 1), action.k.representatives.flatten(0, 1).tolist()
        mixed = 0
        for lane, (kept, rows) in enumerate(_by_hand(view, method, 8)):
            assert slots[lane] == kept
            torch.testing.assert_close(maps[lane], rows, atol=1e-5, rtol=1e-4)
            mixed += int((rows > 1e-3).sum()) - 8
        assert mixed > 4  # mixtures are no copies


@pytest.mark.system("lococo", "exact")
@torch.no_grad()
def test_equals_the_card_written_naively() -> None:
    _is_the_card(lambda view, method: method.evict(view, State())[0])


@pytest.mark.parametrize("changes", [{"verbatim": 0.75}, {"local": 6}, {"keep": 10}])
@torch.no_grad()
def test_the_card_fails_for_other_settings(changes) -> None:
    with pytest.raises(AssertionError):
        _is_the_card(lambda view, method: method.replace(**changes).evict(view, State())[0])


@torch.no_grad()
def test_the_card_fails_for_stubs() -> None:
    def backwards(view: KVView, method: LoCoCo) -> KVReduce:
        """The places are right, and what is mixed there is not."""
        slots, scores = method.evict(view, State())[0].k.representatives, method.score(view)
        x, mixer = (view.keys.flip(2), view.values.flip(2)), view.module[view.layer]
        matrix = mixtures(mixer, method.alpha, *x, scores, slots, slots.shape[2] // 2)
        chosen = Reduction.mix(matrix, representative=slots)
        return KVReduce(chosen, chosen)

    for stub in (backwards, lambda view, method: method.replace(alpha=0).evict(view, State())[0]):
        with pytest.raises(AssertionError):
            _is_the_card(stub)


@pytest.mark.system("lococo", "exact")
@torch.no_grad()
def test_without_the_convolution_it_is_h2o() -> None:
    for seed in range(4):
        for keep in (1, 9, 20, "50%"):
            view = view_of(b=2, n=48, seed=seed)
            heavy = H2O(keep=keep, recent_share=0.0).evict(view, State())[0].k
            action = LoCoCo(keep=keep, alpha=0).evict(view, State())[0]
            assert action.k.is_selection
            assert torch.equal(action.k.index, heavy.index)
            method, module = made(keep=keep)
            own = method.evict(replace(view, module=module), State())[0].k
            assert torch.equal(own.representatives, heavy.index)  # the places are H2O's, whatever is mixed
            assert not torch.equal(own.to_matrix(), heavy.to_matrix()) or keep == 1


@pytest.mark.system("lococo", "exact")
@torch.no_grad()
def test_rows_are_means() -> None:
    for settings in ({}, {"alpha": 0.3}, {"verbatim": 0.0}, {"verbatim": 0.9}, {"local": 5}):
        method, module = made(keep=10, **settings)
        action = method.evict(shown(module), State())[0]
        assert action.k.is_stochastic
        entries = (action.k.to_matrix() > 0).sum(-1)
        heavy = int(10 * method.verbatim)
        assert (entries == 1).sum(-1).tolist() == [[heavy, heavy]]
        assert (entries.amax(-1) == 48 - heavy).all()


@pytest.mark.system("lococo", "exact")
@torch.no_grad()
def test_few_slots_are_the_identity() -> None:
    method, module = made(keep=20, buffer=16)
    for n in (1, 20, 36, 37):
        action = method.evict(shown(module, n=n), State())[0]
        assert isinstance(action, Observe) == (n <= 36)
    assert action.k.m == 20
    for keep in (48, 60, "100%"):
        assert isinstance(made(keep=keep)[0].evict(shown(None), State())[0], Observe)


def _read_in_chunks(model, plan: str, chunk: int, tokens: Tensor) -> list[int]:
    """Slots of a head after each chunk, and after each of the last eight tokens, with the most in between."""
    cache, sizes = DynamicCache(), []
    with winnow.compress(model, plan):
        for part in [*tokens[:, :-8].split(chunk, 1), *tokens[:, -8:].split(1, 1)]:
            model(input_ids=part, past_key_values=cache)
            sizes.append(max(layer.store.length for layer in cache.layers))
    return sizes


@pytest.mark.system("lococo", "exact")
@torch.no_grad()
def test_a_cache_never_holds_more_than_its_slots_the_buffer_and_a_chunk() -> None:
    model, tokens = kvhand.text_model("llama", layers=2), words(150)[:1]
    sizes = _read_in_chunks(model, "lococo:weights=untrained,keep=16,buffer=5,limit=16,every=4", 11, tokens)
    assert len(sizes) == 21
    assert max(sizes) <= 16 + 5
    assert 16 in sizes[:-8]
    assert max(sizes[-8:]) < 16 + 5 + 4
    whole = _read_in_chunks(model, "lococo:weights=untrained,keep=400", 11, tokens)
    assert whole[-1] == 150


@torch.no_grad()
def test_a_batch_equals_its_samples_and_broken_slots_do_no_harm() -> None:
    method, module = made(keep=14)
    view = shown(module, b=3)
    action = method.evict(view, State())[0]
    for row in range(3):
        own = method.evict(sample(view, row, layer=1, module=module), State())[0]
        assert torch.equal(own.k.lane(0).to_matrix(), action.k.lane(row).to_matrix())
    left = sorted(set(range(48)) - set(action.k.representatives[0, 0].tolist()))[5]
    assert (action.k.to_matrix()[0, 0, :, left] > 0).any()
    view.values[0, 0, left] = torch.nan
    mixed = method.evict(view, State())[0].k.to_matrix()
    assert (mixed[0, 0, :, left] == 0).all()
    torch.testing.assert_close(mixed.sum(-1), torch.ones(3, 2, 14))
    low = replace(view, **{name: getattr(view, name).bfloat16() for name in ("keys", "values", "queries")})
    assert method.score(low).dtype == method.evict(low, State())[0].k.matrix.dtype == torch.float32


def test_a_convolution_made_for_fewer_or_more_slots() -> None:
    """It makes as many mixtures as it can; the others are heavy hitters."""
    module = made(keep=12)[1]
    for keep, mixed in ((12, 6), (8, 4), (30, 6)):
        action = LoCoCo(keep=keep).evict(shown(module), State())[0]
        assert action.k.m == keep
        assert ((action.k.to_matrix() > 0).sum(-1) > 1).sum(-1).tolist() == [[mixed, mixed]]


def test_what_does_not_fit_is_refused() -> None:
    for settings, said in (
        ({"keep": "mass=0.9"}, "a count, a share"),
        ({"keep": ("visual=10%",)}, "a count, a share"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"verbatim": -0.1}, "verbatim=-0.1"),
    ):
        with pytest.raises(WinnowError, match=said):
            LoCoCo(**settings)
    with pytest.raises(WinnowError, match="module="):
        LoCoCo(keep=8).evict(shown(None), State())
    with pytest.raises(UnsupportedError, match="one width"):
        LoCoCo(keep=8).evict(shown(made(keep=8)[1], d=4), State())
    with pytest.raises(WinnowError, match="winnow train lococo"):
        winnow.compress(kvhand.text_model("llama", layers=2), "lococo")


@cache
def _tested() -> tuple[nn.Module, list[dict[str, Tensor]], nn.Module]:
    """The recall model, rows that neither it nor LoCoCo was trained on, and the shipped convolutions."""
    torch.set_num_threads(1)
    model = text.load()[0].requires_grad_(False)
    recipe = learning.Recipe(model, 1.0)
    rows = [recipe.record(seed) for seed in range(learning.FIRST - 48, learning.FIRST)]
    info = ModelInfo(depth=model.config.num_hidden_layers, head_dim=model.config.head_dim)
    return model, rows, LoCoCo(weights=str(learning.SHIPPED)).build(info)


def _losses(module: nn.Module | None, **changes) -> Tensor:
    model, rows, _ = _tested()
    return learning.answer_losses(model, rows, LoCoCo(keep=SLOTS, **changes), module)


@cache
def _of_heavy_hitters() -> Tensor:
    return _losses(None, alpha=0)


def _lower(own: Tensor, other: Tensor) -> bool:
    """Whether the 95 % interval of what is lost less, row by row, lies above 0."""
    gain = other - own
    return bool(gain.mean() - 1.96 * gain.std() / len(gain) ** 0.5 > 0)


def _untrained() -> nn.Module:
    return untrained(learning.Recipe(_tested()[0], 1.0).make)


@pytest.mark.system("lococo", "directional")
def test_trained_mixtures_lose_less_than_as_many_heavy_hitters_and_than_untrained_ones() -> None:
    trained = _losses(_tested()[2])
    assert _lower(trained, _of_heavy_hitters())
    assert _lower(trained, _losses(_untrained()))


def test_the_direction_fails_for_a_stub() -> None:
    """Convolutions that know no slot from another."""
    flat = _untrained()
    for mixer in flat:
        nn.init.zeros_(mixer.conv.weight)
    assert not _lower(_losses(flat), _of_heavy_hitters())


@pytest.mark.system("lococo", "exact")
@torch.no_grad()
def test_training_reads_as_the_engine_does() -> None:
    model, rows, module = _tested()
    ids = rows[0]["ids"].long()[None]
    method = LoCoCo(keep=SLOTS)
    wanted = learning.read(model, ids, lambda view: method.shorten(view, KVBudget(SLOTS)), module)
    cache = DynamicCache()
    with winnow.compress(model, f"lococo:keep={SLOTS}"):
        for part, logits in zip(ids.split(CHUNK, 1), wanted, strict=True):
            torch.testing.assert_close(model(input_ids=part, past_key_values=cache).logits, logits, atol=1e-4, rtol=0)
    assert cache.layers[0].store.length == SLOTS


@pytest.mark.system("lococo", "model")
@pytest.mark.parametrize("build", ["llama", "qwen3"])
def test_without_mixing_decoding_equals_the_full_cache_with_evicted_keys_masked(build: str) -> None:
    case(build, layers=2).check_evictions("lococo:keep=50%,alpha=0,limit=13,every=3", words(6))


@pytest.mark.system("lococo", "model")
@pytest.mark.parametrize("build", ["llama", "qwen3", "llava_clip"])
def test_decoding_reads_mixed_keys_and_values(build: str) -> None:
    """As the full cache, in the place of which the maps that were asked for are applied to it."""
    maps = case(build, layers=2).check_maps(LoCoCo(keep="50%", weights="untrained"), words(5))
    assert not any(action.k.is_selection for action in maps)


def test_a_padded_batch_equals_its_samples() -> None:
    plan = "lococo:weights=untrained,keep=12,local=1,limit=12,every=3"
    case("llama", layers=2).check_batch(plan, words(6))
