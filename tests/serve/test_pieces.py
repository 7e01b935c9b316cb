"""Pieces of an answer, and how tokens are chosen: without a server."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from winnow.serve.decoding import Chooser
from winnow.serve.pieces import HALF, Pieces
from winnow.serve.schema import Sampling


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, so that most characters take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES = byte_tokenizer()
TEXTS = ["plain words", "é à ü", "日本語のテキスト", "🏍️ and 👩‍👩‍👧", "mixed 日 é x 🏍", "a" * 50, ""]


def decode(ids: Sequence[int]) -> str:
    return BYTES.decode(ids)


def run(text: str, stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    pieces, sent = Pieces(decode, stop), []
    for token in BYTES(text)["input_ids"]:
        sent.append(pieces.add(token))
        if pieces.stopped:
            break
    sent.append(pieces.rest())
    return sent, pieces.stopped


@pytest.mark.parametrize("text", TEXTS)
def test_W16_no_character_is_split(text: str) -> None:
    sent, stopped = run(text)
    assert "".join(sent) == text
    assert not stopped
    assert not any(HALF in piece for piece in sent)


def test_W16_half_a_character_at_the_end_is_left_out() -> None:
    pieces = Pieces(decode)
    sent = [pieces.add(token) for token in BYTES("a日")["input_ids"][:-1]]
    assert "".join([*sent, pieces.rest()]) == "a"


@pytest.mark.parametrize("seed", range(30))
def test_an_answer_is_cut_before_the_first_stop_string_and_no_part_of_it_is_sent(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choices("ab日", k=40))
    stop = ["".join(draw.choices("ab日", k=draw.randint(2, 5))) for _ in range(3)]
    places = [at for own in stop if (at := text.find(own)) >= 0]
    # While text grows, the stop string that is complete first ends it.
    ends = [(at + len(own), at) for own in stop if (at := text.find(own)) >= 0]
    sent, stopped = run(text, stop)
    assert stopped == bool(places)
    whole = "".join(sent)
    assert not any(own in whole for own in stop)
    if places:
        first = min(end for end, _ in ends)
        assert whole == text[: min(at for end, at in ends if end == first)]
    else:
        assert whole == text


def test_pieces_come_while_tokens_do() -> None:
    sent, _ = run("one two three")
    assert sum(bool(piece) for piece in sent) > 8


SCORES = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def drawn(row: Sampling, count: int = 4000) -> torch.Tensor:
    """Shares of the tokens that one row draws."""
    chooser = Chooser([row])
    found = [int(chooser(torch.zeros(1, 1, dtype=torch.long), SCORES.clone()).argmax()) for _ in range(count)]
    return torch.bincount(torch.tensor(found), minlength=4) / count


def test_tokens_are_drawn_with_their_chances() -> None:
    for temperature in (0.5, 1.0, 2.0):
        want = (SCORES[0] / temperature).softmax(-1)
        found = drawn(Sampling(1, temperature, seed=1))
        assert torch.allclose(found, want, atol=0.03)


def test_top_p_keeps_the_smallest_set_that_has_the_share() -> None:
    chances = SCORES[0].softmax(-1)  # 0.64, 0.24, 0.09, 0.03
    assert (drawn(Sampling(1, 1.0, 0.5, seed=1)) > 0).tolist() == [True, False, False, False]
    found = drawn(Sampling(1, 1.0, 0.8, seed=1))
    assert (found > 0).tolist() == [True, True, False, False]
    assert found[0].item() == pytest.approx((chances[0] / chances[:2].sum()).item(), abs=0.03)


def test_a_tiny_temperature_is_greedy_and_overflows_nothing() -> None:
    assert drawn(Sampling(1, 1e-300, seed=1), 20)[0] == 1


def test_rows_draw_apart_and_greedy_rows_are_left_alone() -> None:
    rows = [Sampling(1, 1.0, seed=3), Sampling(1, 0.0), Sampling(1, 1.0, seed=4)]
    together, alone = Chooser(rows), [Chooser([row]) for row in rows]
    ids = torch.zeros(3, 1, dtype=torch.long)
    for _ in range(50):
        scores = torch.randn(3, 8)
        singles = [chooser(ids[:1], scores[i : i + 1].clone()) for i, chooser in enumerate(alone)]
        assert torch.equal(together(ids, scores.clone()), torch.cat(singles))
        assert torch.equal(singles[1][0], scores[1])
