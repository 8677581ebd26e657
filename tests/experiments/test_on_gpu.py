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


def machine(tmp_path, gpu, fails=""):
    """A folder of results with an earlier plan, the script, and an environment with this GPU."""
    out, tools, script = tmp_path / "out", tmp_path / "tools", tmp_path / "experiments" / "on_gpu.sh"
    for folder in (out, tools, script.parent):
        folder.mkdir()
    shutil.copy(SCRIPT, script)
    (out / "plan.json").write_text("an earlier call's")
    for name, text in (("python3", PYTHON), ("nvidia-smi", f"#!/bin/sh\necho 'GPU 0: {gpu} (UUID: GPU-0)'\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return out, script, {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "FAILS": fails}


@pytest.mark.parametrize(
    ("gpu", "fails", "ran"),
    [
        ("NVIDIA H200", "", ["plan", "planned"]),
        ("NVIDIA H200", "yes", ["plan"]),  # an earlier call's plan.json is not its own
        ("NVIDIA L4", "", []),
    ],
)
def test_a_plan_is_of_the_gpu_that_is_here_and_of_this_call(gpu, fails, ran, tmp_path):
    out, script, environment = machine(tmp_path, gpu, fails)
    subprocess.run(["bash", str(script), str(out)], env=environment, check=True, timeout=60)
    lines = (out / "results.txt").read_text().splitlines()
    parts = [line.split()[1].rstrip(":") for line in lines if line.startswith("## plan") and " -m " in line]
    assert parts == ran
    assert all("--on h200" in line for line in lines if line.startswith("## plan: ") and " -m " in line)
    assert any("plan, planned: left out" in line for line in lines) == (not ran)


def test_parts_that_are_named_run_alone_and_with_what_is_there(tmp_path):
    out, script, environment = machine(tmp_path, "NVIDIA H200")
    command = ["bash", str(script), str(out), "--only"]
    subprocess.run([*command, "planned forward"], env=environment, check=True, timeout=60)
    lines = (out / "results.txt").read_text().splitlines()
    assert [line.split()[1] for line in lines if " -m " in line] == ["forward:", "planned:"]
    assert (out / "plan.json").read_text() == "an earlier call's"
    ran = subprocess.run([*command, "plans"], env=environment, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (2, "--only: no part is plans\n")


@pytest.mark.parametrize(
    ("gpu", "only", "said"),
    [
        ("NVIDIA H200", "planned", "## planned: left out, there is no plan.json, which plan writes\n"),
        ("NVIDIA H200", "teacher", "## teacher: left out, there is no --pack\n"),
        ("NVIDIA L4", "teacher", "## teacher: left out, there is no --pack\n"),
        ("NVIDIA L4", "planned", "## plan, planned: left out, this GPU is none that slimsam plan knows\n"),
    ],
)
def test_a_part_that_is_wanted_and_cannot_run_is_said(gpu, only, said, tmp_path):
    out, script, environment = machine(tmp_path, gpu)
    (out / "plan.json").unlink()
    command = ["bash", str(script), str(out), "--only", only]
    ran = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60)
    assert ran.stdout == said and (out / "results.txt").read_text().endswith(said)
