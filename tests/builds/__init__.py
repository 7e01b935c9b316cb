"""Tiny random-weight builds of every image-text-to-text class that transformers has; see `builds.build`."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from builds.build import Build


@functools.cache
def every() -> dict[str, Build]:
    """All builds by name. Each module of this package lists its own in `BUILDS`."""
    found: dict[str, Build] = {}
    for module in pkgutil.iter_modules(__path__):
        for build in getattr(importlib.import_module(f"builds.{module.name}"), "BUILDS", ()):
            if build.name in found:
                raise ValueError(f"two builds are called {build.name!r}")
            found[build.name] = build
    return found
