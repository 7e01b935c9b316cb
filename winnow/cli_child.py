"""The command line for a program that starts it and holds its stdin: it ends with that program, however that ended."""

from __future__ import annotations

import os
import threading

STDIN = 0


def _follow() -> None:
    while os.read(STDIN, 4096):  # not by sys.stdin, whose lock a thread must not hold when Python ends
        pass
    os._exit(1)


if __name__ == "__main__":
    from winnow.cli import main

    threading.Thread(target=_follow, daemon=True).start()
    main()
