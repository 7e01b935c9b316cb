"""The text of an answer while its tokens come: pieces that later tokens cannot change, up to the first stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

HALF = "\ufffd"  # what a tokenizer makes of the first bytes of a character


class Pieces:
    """Turns tokens into pieces of text. Joined, they are the text of all tokens, cut before the first stop string.

    A piece is sent once two decodings in a row agree on it: a tokenizer may join a token with the one before, and a
    character can take several tokens.

    Args:
        decode: token ids → text.
        stop: strings at which the answer ends.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self.decode, self.stop = decode, tuple(stop)
        self.ids: list[int] = []
        self.stopped = False
        self._text = self._sent = ""

    def add(self, token: int) -> str:
        """The piece that is safe to send now; `stopped` says whether a stop string has come."""
        self.ids.append(token)
        before, self._text = self._text, self.decode(self.ids)
        cut = self._first_stop()
        if cut is not None:
            self.stopped, self._text = True, self._text[:cut]
            return self.rest()
        sure = _common(before, self._text).rstrip(HALF)
        return self._piece(sure[: len(sure) - self._held(sure)])

    def rest(self) -> str:
        """What is left to send when the answer ends; half a character is not."""
        return self._piece(self._text.rstrip(HALF))

    def _piece(self, upto: str) -> str:
        piece = upto[len(self._sent) :]
        self._sent += piece
        return piece

    def _first_stop(self) -> int | None:
        found = [at for own in self.stop if (at := self._text.find(own)) >= 0]
        return min(found) if found else None

    def _held(self, text: str) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max((len(own) - 1 for own in self.stop), default=0)
        for count in range(min(longest, len(text)), 0, -1):
            if any(own.startswith(text[-count:]) for own in self.stop):
                return count
        return 0


def _common(a: str, b: str) -> str:
    """The longest text that both begin with."""
    if b.startswith(a):
        return a
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]
