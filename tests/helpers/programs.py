"""Programs as modules: `slimsam_jax.predict` itself is the function of that name."""

from __future__ import annotations

import importlib
from types import ModuleType


def program(name: str) -> ModuleType:
    """The module of `python -m slimsam_jax.NAME`."""
    return importlib.import_module(f"slimsam_jax.{name}")
