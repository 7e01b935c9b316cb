"""How `winnow studio` starts, and what it refuses first."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from winnow import cli_studio
from winnow.cli import app
from winnow.core.errors import UnsupportedError
from winnow.reference.text import load as load_text
from winnow.studio.answering import Asker
from winnow.studio.stores import stores_of


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["studio", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    return result.stderr


def test_it_says_what_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli_studio, "NEEDS", ("starlette", "no_such_package"))
    assert refused() == "winnow: winnow studio needs no_such_package: pip install 'tokenwinnow[studio]'\n"


def test_a_store_that_is_not_there(tmp_path: Path):
    assert "There is no store" in refused("--store", tmp_path / "no.sqlite")


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "give another --port" in refused("--port", taken.getsockname()[1])


def test_a_language_model_is_refused():
    with pytest.raises(UnsupportedError, match="asks about pictures"):
        Asker(*load_text(), "a text model", bundled=False)


def test_stores_are_those_that_were_named_or_lie_in_the_folder(tmp_path: Path):
    for name in ("b.sqlite", "a.sqlite", "a.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.sqlite").mkdir()
    assert stores_of([], tmp_path) == [Path("a.sqlite"), Path("b.sqlite")]
    assert stores_of([tmp_path / "a.txt"], tmp_path) == [tmp_path / "a.txt"]
