"""What `on_gpu.sh` runs of a plan and of what was planned: programs in place of Python and the driver's tool."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "on_gpu.sh"
# Writes where `--out` says, unless it fails; `on_gpu.sh` records what it was called with.
PYTHON = """#!/bin/sh
while [ $# -gt 1 ]; do [ "$1" = --out ] && { [ -n "$FAILS" ] && exit 1; echo "[]" >"$2"; }; shift; done
"""


@pytest.mark.parametrize(
    ("gpu", "fails", "ran"),
    [
        ("NVIDIA H200", "", ["plan", "planned"]),
        ("NVIDIA H200", "yes", ["plan"]),  # an earlier call's plan.json is not its own
        ("NVIDIA L4", "", []),
    ],
)
def test_a_plan_is_of_the_gpu_that_is_here_and_of_this_call(gpu, fails, ran, tmp_path):
    out, tools, script = tmp_path / "out", tmp_path / "tools", tmp_path / "experiments" / "on_gpu.sh"
    for folder in (out, tools, script.parent):
        folder.mkdir()
    shutil.copy(SCRIPT, script)
    (out / "plan.json").write_text("[]")
    for name, text in (("python3", PYTHON), ("nvidia-smi", f"#!/bin/sh\necho 'GPU 0: {gpu} (UUID: GPU-0)'\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        ["bash", str(script), str(out)], env={**os.environ, "PATH": path, "FAILS": fails}, check=True, timeout=60
    )
    lines = (out / "results.txt").read_text().splitlines()
    parts = [line.split()[1].rstrip(":") for line in lines if line.startswith("## plan") and " -m " in line]
    assert parts == ran
    assert all("--on h200" in line for line in lines if line.startswith("## plan: ") and " -m " in line)
    assert any("plan, planned: left out" in line for line in lines) == (not ran)
