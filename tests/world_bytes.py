"""The same seed, drawn in two processes."""

from __future__ import annotations

import os
import subprocess
import sys


def digests(program, capsys):
    """What a program prints in this process, and in another one with another hash seed."""
    exec(program, {})  # noqa: S102
    own = capsys.readouterr().out.strip()
    environment = os.environ | {"PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return own, done.stdout.strip()
