"""Stores of `winnow bench` as pages: only files that were named, or lay in the folder, when the studio started."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from winnow.bench.charts import require
from winnow.bench.report_data import reports
from winnow.bench.report_page import page
from winnow.bench.store import Store
from winnow.core.errors import WinnowError

PAGES = 8  # that are held at once


class Stores:
    """The stores that the page may open.

    Args:
        paths: of the files, by the order in which the page lists them.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = {str(path): path for path in paths}
        self._pages: OrderedDict[str, str] = OrderedDict()

    @property
    def names(self) -> list[str]:
        return list(self._paths)

    def open(self, name: str) -> str:
        """Make the page of a store; returns the word under which `page` has it, which nobody can guess.

        Raises:
            WinnowError: there is no such store, it has no answers, or what draws the page is not installed.
        """
        path = self._paths.get(name)
        if path is None:
            raise WinnowError("The studio was not started with this store; name it with --store.")
        require()
        with Store(path) as store:
            found = reports(store)
            if not found:
                raise WinnowError(f"{path.name} has no answers yet; fill it with `winnow bench`.")
            html = page(store, found, path.parent)
        word = secrets.token_urlsafe(24)
        self._pages[word] = html
        if len(self._pages) > PAGES:
            self._pages.popitem(last=False)
        return word

    def page(self, word: str) -> str | None:
        """A page that was made; None where it was not, or has had to make room."""
        return self._pages.get(word)


def stores_of(named: Sequence[Path], folder: Path) -> list[Path]:
    """The stores that were named; where none was, the `*.sqlite` files of a folder.

    Raises:
        WinnowError: a file that was named is not there.
    """
    for path in named:
        if not path.is_file():
            raise WinnowError(f"There is no store {path}; make one with `winnow bench --store {path}`.")
    return list(named) or sorted(path.relative_to(folder) for path in folder.glob("*.sqlite") if path.is_file())
