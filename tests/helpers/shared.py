"""The shared material beside a checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Golden vectors from the original code and a trained checkpoint. Too large for the repository (40 MB); they lie
# beside a developer's checkout. Parity with the original packages (tests/peers.py) needs none of them, nor does that
# with the part of the vectors that is small enough (tests/golden).
SHARED = Path(os.environ.get("SLIMSAM_SHARED", Path(__file__).parents[3] / "shared"))


def shared(path: str) -> Path:
    """A file or folder of the shared material; the test is skipped without it."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"needs {path} of the shared material; set SLIMSAM_SHARED to its folder")
    return found
