"""What is asked of all files that load our .pth in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


def assert_refused(
    loader: ModuleType, pth: Path, changes: Mapping[str, torch.Tensor | None], overrides: Any, message: str
) -> None:
    """Asserts that a .pth with other arrays, of which None takes one out, is refused in one line that names it."""
    state, path = torch.load(pth, weights_only=True), pth.with_name("changed.pth")
    for name, array in changes.items():
        state.pop(name) if array is None else state.update({name: array})
    torch.save(state, path)
    with pytest.raises(ValueError, match=message) as refusal:
        loader.load(path, **overrides)
    path.unlink()
    assert str(refusal.value).startswith(f"{path} cannot be loaded") and "\n" not in str(refusal.value)
