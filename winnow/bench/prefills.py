"""What the benchmarks of prefills share: a plan over pictures that are encoded already, and the head of a table."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from winnow.core.errors import WinnowError
from winnow.core.method import Method
from winnow.core.plan import Plan
from winnow.engine.compress import compress
from winnow.engine.encoding import record_of
from winnow.engine.handle import Handle


@contextmanager
def attached(model: Any, plan: str | Plan | Method, encoded: Any) -> Iterator[Handle]:
    """A plan that is attached anew, for what the same plan has encoded under an earlier attachment.

    Attached anew, because nothing of a plan may be left on a model while the plain one is timed.

    Args:
        encoded: the encoder's output, with what steps in the encoder did.

    Raises:
        WinnowError: it was encoded under another plan, or under none.
    """
    record = record_of(encoded)
    with compress(model, plan) as handle:
        if record is None or record.plan is None or record.plan.plan.key != handle.plan.key:
            raise WinnowError(f"this was not encoded under {handle.plan}; encode it under that plan first.")
        record.plan = handle.bind(handle.plan)
        yield handle


def machine() -> str:
    """Versions and threads, for the head of a table of times."""
    threads = torch.get_num_threads()
    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, "
        f"{threads} thread{'s' * (threads > 1)}"
    )
