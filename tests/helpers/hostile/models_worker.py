"""Gives paths of hostile models to the command that converts, one after the other, in a process with little memory.

Reads paths from standard input, a JSON list; writes a line of JSON for each: path, exit code, what was printed, seconds
of CPU time, and the peak of the process's memory in MB. What ends the process is the last one's fault.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path

SPARE = 300 << 20  # bytes that may be reserved beyond what Python and JAX have; a mapped file does not count


def run(path: str, out: str) -> tuple[int | str, str]:
    from converters import from_torch
    from slimsam_jax import cli

    sys.argv = ["from_torch", path, out]
    printed, code = io.StringIO(), 0
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
        try:
            cli.run(from_torch.main)
        except SystemExit as end:
            code = end.code
        except BaseException:
            return "traceback", traceback.format_exc()
    return code, printed.getvalue()


def used(what: str) -> int:
    """MB of this process: "VmHWM" the most it had in memory, "VmData" what it has reserved."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index(f"{what}:") + 1]) >> 10


def main() -> None:
    from slimsam_jax.models import sam
    from slimsam_jax.models.config import preset

    sam.abstract_params(preset("small"))  # imports, and what JAX does at its first use
    limit = (used("VmData") << 20) + SPARE
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with tempfile.TemporaryDirectory() as out:
        for path in json.load(sys.stdin):
            start = time.process_time()
            code, printed = run(path, f"{out}/{time.time_ns()}")
            seconds = time.process_time() - start
            result = {"path": path, "code": code, "printed": printed, "seconds": seconds, "peak": used("VmHWM")}
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
