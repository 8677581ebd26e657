"""Kills a compression again and again and compares what it ends with to a run that nobody killed.

    python -m experiments.kills --teacher TEACHER --images bsds_train --val bsds_val --steps 900 --kills 20

SIGKILL comes at random moments, spread so that each attempt gets through its share of the work. On a CPU
both runs end with the same parameters and the same log, to the bit.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tyro

from converters.from_torch import load


def main(
    out: Path,
    teacher: Path | None = None,
    images: tuple[Path, ...] = (),
    val: tuple[Path, ...] = (),
    steps: int = 900,
    kills: int = 20,
    seed: int = 0,
) -> None:
    """Run, run and kill, compare.

    Args:
      out: a new folder for both runs.
      teacher, images, val, steps: as `slimsam_jax.compress` takes them.
      kills: how many times.
      seed: of the moments.
    """
    command = [sys.executable, "-m", "slimsam_jax.compress", "--steps", str(steps), "--save-every", "20"]
    command += ["--teacher", str(teacher)] if teacher else []
    for name, folders in (("--images", images), ("--val", val)):
        command += [name, *map(str, folders)] if folders else []
    start = time.perf_counter()
    subprocess.run([*command, "--out", str(out / "whole")], check=True)
    whole = time.perf_counter() - start
    start = time.perf_counter()
    killed = killed_run([*command, "--out", str(out / "killed")], out / "killed", whole, kills, seed)
    print(f"uninterrupted: {whole:.0f} s; killed {killed} times: {time.perf_counter() - start:.0f} s")
    print("the same" if same(out / "whole", out / "killed") else "DIFFERENT")


def killed_run(command: list[str], out: Path, whole: float, kills: int, seed: int) -> int:
    """Runs to the end; returns how often it was killed. Each attempt has its share of the time, more or less."""
    random, done = np.random.default_rng(seed), 0
    start_up = 25.0
    while not (out / "report.json").exists() or (out / "checkpoints").exists():
        resume = ["--resume"] if (out / "checkpoints" / "origin.json").exists() else []
        process = subprocess.Popen([*command, *resume], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            limit = start_up + random.uniform(0.5, 1.5) * whole / kills if done < kills else None
            code = process.wait(limit)
            if code:
                raise SystemExit(f"the run ended with {code}")
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
            log = out / "log.jsonl"
            lines = [line for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []
            print(f"kill {done}: {lines[-1] if lines else 'before the first step'}"[:60], flush=True)
    return done


def same(one: Path, other: Path) -> bool:
    models = [load(path) for path in (one, other)]
    logs = [(path / "log.jsonl").read_text() for path in (one, other)]
    equal = jax.tree.map(lambda a, b: bool((a == b).all()), *(model.params for model in models))
    return logs[0] == logs[1] and all(jax.tree.leaves(equal))


if __name__ == "__main__":
    tyro.cli(main)
