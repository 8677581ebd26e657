"""The peak memory that is planned is that of a call, on the one device there is here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_planned_memory_is_what_a_step_takes():
    """A process for each batch size, as memory that one program has let go would be the next one's."""
    for batch in ("4", "16"):
        command = [sys.executable, "-m", "helpers.measured_memory", batch]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        ((_, planned, measured),) = json.loads(run.stdout)
        assert 0.8 < planned / measured < 1.2, f"batch {batch}: planned {planned}, measured {measured}"
