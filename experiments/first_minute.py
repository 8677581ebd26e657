"""Times `slimsam compress` with its defaults: the first time, when everything is compiled, and the next.

    python -m experiments.first_minute

Wall and CPU seconds of a process each, the imports included, and how well its model agrees with the SAM that ships.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments import results
from slimsam_jax import cli
from slimsam_jax.errors import RunError

TIMES = ("the first time", "the next")
CACHES = ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")


def main() -> None:
    """Print a line for each of two runs.

    Raises:
      InputError: the code is no commit's.
      RunError: a run failed.
    """
    results.check_committed()
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if name not in CACHES}
        environment["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        for index, called in enumerate(TIMES):
            out = Path(folder) / f"slim{index}"
            start, before = time.perf_counter(), cpu_seconds()
            command = [sys.executable, "-m", "slimsam_jax.compress", "--out", str(out)]
            if (ended := subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)).returncode:
                raise RunError(f"{called}: python -m slimsam_jax.compress ended with {ended.returncode}")
            seconds, cpu = time.perf_counter() - start, cpu_seconds() - before
            agreement = json.loads((out / "report.json").read_text())["agreement"]
            print(f"{called}: {seconds:.0f} s, {cpu:.0f} CPU seconds; agreement {100 * agreement:.2f} %", flush=True)


def cpu_seconds() -> float:
    """Of processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    cli.run(main)
