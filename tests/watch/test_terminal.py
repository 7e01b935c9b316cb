"""Questions that are typed while a video runs: on a terminal of the test's own, and in a real process."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from winnow.cli import app
from winnow.watch.clip_files import save_clip
from winnow.watch.questions import Question, Typed
from winnow.world.clips import clip

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "120",
    "TERM": "xterm-256color",
}
QUESTION = "is there a frog?"


@pytest.fixture
def terminal():
    """Both ends of one: the user's, and the program's."""
    user, program = pty.openpty()
    yield user, program
    os.close(user)
    os.close(program)


def modes(file: int) -> tuple[int, ...]:
    """The flags of a terminal; the rest are characters and speeds."""
    return tuple(termios.tcgetattr(file)[:4])


def lines(typed: Typed, count: int) -> list[str]:
    found: list[str] = []
    until = time.monotonic() + 10
    while len(found) < count and time.monotonic() < until:
        found += typed.lines(seconds=0.1)
    return found


def test_lines_come_as_they_are_typed_and_the_terminal_is_left_as_it_was(terminal):
    user, program = terminal
    before = modes(program)
    with open(program, closefd=False) as stream, Typed.of(stream) as typed:
        assert not termios.tcgetattr(program)[3] & (termios.ECHO | termios.ICANON)
        assert list(typed.lines()) == []
        os.write(user, b"is there a \x1b[Dcuk\x7fp?\rno\x15wh\xc3\xbc\x1bOA\nhalf")
        assert lines(typed, 2) == ["is there a cup?", "whü"]
        until = time.monotonic() + 10
        while typed.text != "half" and time.monotonic() < until:
            time.sleep(0.01)
        os.write(user, b"\x04")  # of a line that has begun, nothing ends
        os.write(user, b"\r\x04")
        assert lines(typed, 1) == ["half"]
        while not typed.ended and time.monotonic() < until:
            time.sleep(0.01)
        assert typed.ended
    assert modes(program) == before


def test_what_is_no_terminal_types_nothing(tmp_path):
    with open(os.devnull) as stream:
        assert Typed.of(stream) is None
    assert Typed.of(None) is None


@pytest.mark.parametrize(
    ("said", "time_", "text"),
    [
        ("12.5:where is the cup?", 12.5, "where is the cup?"),
        (" .5 : who? ", 0.5, "who?"),
        ("who?", float("inf"), "who?"),
        ("a: who?", float("inf"), "a: who?"),
        ("3: at 4: who?", 3.0, "at 4: who?"),
    ],
)
def test_a_question_and_its_time(said, time_, text):
    assert Question.parse(said) == Question(time_, text)


class Session:
    """`winnow stream` on a terminal, as its foreground process."""

    def __init__(self, terminal: tuple[int, int], *arguments: object) -> None:
        self.user, self.program = terminal
        fcntl.ioctl(self.program, termios.TIOCSWINSZ, b"\x28\0\x78\0\0\0\0\0")  # 40 rows of 120
        self.seen = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "winnow.cli", "stream", *map(str, arguments)],
            stdin=self.program,
            stdout=self.program,
            stderr=self.program,
            env=ENVIRONMENT,
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=self._in_front,
        )

    def _in_front(self) -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite in the background ignores it

    def until(self, pattern: str, seconds: float = 90.0) -> str:
        """What is shown, once it holds this."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.seen):
            assert time.monotonic() < deadline, (pattern, self.seen[-3000:])
            if select.select([self.user], [], [], 0.1)[0]:
                self.seen += os.read(self.user, 65536).decode(errors="replace")
            else:
                assert self.process.poll() is None, self.seen[-3000:]
        return self.seen

    def type(self, text: str) -> None:
        os.write(self.user, text.encode())

    def members(self) -> list[str]:
        """The processes that are left of it."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid and fields[0] != "Z":
                found.append((folder / "cmdline").read_text())
        return found

    def end(self) -> int:
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def started(terminal):
    """Starts one; it is ended with the test."""
    found: list[Session] = []

    def start(*arguments: object) -> Session:
        found.append(Session(terminal, *arguments))
        return found[-1]

    yield start
    for session in found:
        session.process.kill()
        session.process.wait()


def test_a_question_typed_while_the_video_runs_and_ctrl_c(terminal, started, tmp_path):
    save_clip(clip(3, 64, split="test"), tmp_path / "clip.mp4")
    before = modes(terminal[1])
    session = started(tmp_path / "clip.mp4", "--realtime")
    seen = session.until("ask ▸")
    assert "held by a head" in seen
    session.until(r"\b3\.50\b")  # the time of a frame, in the table
    session.type(f"where is the zebracorn?\r{QUESTION}\r")
    seen = session.until(rf"{re.escape(QUESTION)}.*(yes|no)")
    assert "does not know" in seen
    assert "32.0" not in seen  # it goes on
    if sys.platform == "linux":
        assert any("decoder.py" in command for command in session.members())
    session.type("\x03")
    seen = session.until("ms a frame")
    assert session.end() == 130
    assert "Traceback" not in seen
    assert session.members() == []
    assert modes(terminal[1]) == before


def test_at_the_end_more_is_asked_until_an_empty_line(started):
    session = started("clip:3:16")
    session.until("The video has ended")
    session.type(f"{QUESTION}\r")
    session.until(rf"{re.escape(QUESTION)}.*(yes|no)")
    session.type("\r")
    session.until("ms a frame")
    assert session.end() == 0


def test_in_a_pipe_nothing_waits():
    done = CliRunner().invoke(app, ["stream", "clip:3", "--ask", QUESTION], input="is there a cup?\n")
    assert done.exit_code == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert done.stderr == ""
