"""What readers make of hostile files, each in a process of its own, and what may come of it."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.hostile import files as hostile
from slimsam_jax.errors import MESSAGE

SECONDS, MEGABYTES = 1.0, 500


def outcomes(cases: list[list[str]], **variables: str) -> list[dict[str, Any]]:
    """Of the worker, in their order; with variables of its environment one is started for them alone."""
    worker = started(**variables)
    worker.stdin.write(f"{json.dumps(cases)}\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    assert answer, f"the worker ended with {worker.wait()}"
    return json.loads(answer)


@functools.cache
def started(**variables: str) -> subprocess.Popen:
    """A worker that has imported everything, for all tests of this process."""
    command = [sys.executable, "-m", "helpers.hostile.worker"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    worker = subprocess.Popen(command, env=os.environ | variables, **pipes)
    atexit.register(worker.communicate)  # which ends it
    return worker


def assert_harmless(found: dict[str, Any], name: str) -> None:
    """No crash, hang or traceback; what is said can be shown; and nothing takes long or much."""
    said = found["out"] + found["error"]
    assert found["code"] in (0, 1, 2), (name, found["code"], said[-2000:])
    assert "Traceback" not in said and "Warning" not in said, (name, said[-2000:])
    assert all(line.isprintable() and len(line) < MESSAGE for line in said.splitlines()), (name, said[-2000:])
    strays = [line for line in found["error"].splitlines() if not line.startswith(("check: ", "error: "))]
    assert not strays, (name, strays)
    assert found["seconds"] < SECONDS and found["megabytes"] < MEGABYTES, (name, found)


def assert_refused(found: dict[str, Any], name: str, most: int = 1) -> None:
    """One line says what is wrong: among the problems that `check` lists, or as the error of the command."""
    assert_harmless(found, name)
    problems = [line for line in found["out"].splitlines() if line.startswith(("  ", "refused: "))]
    errors = [line for line in found["error"].splitlines() if line.startswith("error: ")]
    if found["code"] == 2:
        assert not problems and len(errors) == 1, (name, found)
    else:
        assert not errors and 1 <= len(problems) <= most, (name, found)
        assert found["code"] == 1 or problems[0].startswith("refused: "), (name, found)


def folder_with(path: Path, name: str | bytes, content: bytes | hostile.Place) -> Path:
    """A folder with a sound image, and something beside it."""
    path.mkdir(parents=True)
    (path / "x.png").write_bytes(hostile.GOOD)
    target = path / os.fsdecode(name)
    target.write_bytes(content) if isinstance(content, bytes) else content(target)
    return path
