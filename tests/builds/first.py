"""The builds of `zoo`, with which the engine's own tests began, as builds among the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import zoo
from torch import nn

from builds.build import Inputs


@dataclass(frozen=True)
class First:
    """A build of `zoo`; see `Build` for what it offers."""

    name: str
    model_type: str
    letters: str = "ABC"
    padding: str = "left"
    per_token: tuple[str, ...] = ()
    cannot: str = ""

    def model(self, **options: Any) -> nn.Module:
        return zoo.model(self.name, **options)

    def sample(self, row: str, **options: Any) -> Inputs:
        return zoo.sample(self.name, row, **options)

    def samples(self, rows: Sequence[str], **options: Any) -> list[Inputs]:
        return zoo.samples(self.name, rows, **options)

    def collate(self, parts: Sequence[Inputs], *, side: str | None = None, extra: int = 0) -> Inputs:
        return zoo.collate(parts, side=side or "left", extra=extra)

    def batch(self, rows: Sequence[str], **options: Any) -> Inputs:
        return zoo.inputs(self.name, rows, **options)


BUILDS = (
    First("llava_clip", "llava"),
    First("llava_siglip", "llava"),
    First("llava_next", "llava_next"),
    First("qwen2_5_vl", "qwen2_5_vl", "ABCV", per_token=("mm_token_type_ids",)),
)
