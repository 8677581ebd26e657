"""The vectors of SlimSAM's original code."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.shared import shared


@pytest.fixture(scope="module")
def golden():
    """All of them, which lie outside the repository."""
    return np.load(shared("golden/tiny_slimsam.npz"))
