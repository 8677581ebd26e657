"""Runs programs that `slimsam plan` planned on the device that is here: planned against real memory and time.

    slimsam plan --teacher vit_b --ratio 0.77 --per-device 1 --on h100 --only distill encode --out plan.json
    python -m experiments.bench.planned plan.json

A line for each program, of ones in place of parameters and images. Real memory is the most that JAX had allocated in
this process, where the device says it: give a plan of one program if more are to be told apart.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.plan import planned
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.set_option import change
from slimsam_jax.errors import InputError
from slimsam_jax.plan.programs import How, Program, programs
from slimsam_jax.plan.run import architecture

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
      plan: written by `slimsam plan`, for as many devices as there are here.
      runs: timed, after one that is not; each waits for its end.
    """

    plan: tyro.conf.Positional[Path]
    runs: int = 10


def main(options: Options) -> None:
    for entry in json.loads(options.plan.read_text()):
        if entry["devices"] != jax.device_count():
            raise InputError(f"{options.plan} is for {entry['devices']} devices; here are {jax.device_count()}")
        expected = {each["name"]: each for each in entry["programs"] if each["kind"] in ("distill", "encode")}
        for program in programs_of(entry):
            if program.name in expected:
                said = {"teacher": entry["teacher"], "planned_for": entry["on"], "program": program.name}
                print(json.dumps(said | compared(expected[program.name], *measured(program, options.runs))), flush=True)


def programs_of(entry: dict[str, Any]) -> list[Program]:
    """Makes the programs of a plan's entry again, of this process's devices."""
    recipe = change(RECIPES[entry["recipe"]], tuple(entry["set"]))
    steps = planned(recipe, [100 if hasattr(step, "optimizer") else 0 for step in recipe])
    dtype = jnp.dtype(entry["dtype"])
    how = How(entry["batch"], dtype, entry["accumulate"], entry["fsdp"], entry["attention"], 100)
    return list(programs(steps, architecture(entry["teacher"]), Target(entry["ratio"]), how, ("distill", "encode")))


def measured(program: Program, runs: int) -> tuple[int | None, float]:
    """Returns the most bytes that were allocated on a device (None if it does not say), and the median seconds."""
    args = jax.tree.map(_ones, program.args)
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        out = jax.block_until_ready(program.function(*args))
        seconds.append(time.perf_counter() - start)
        if program.kind == "distill":  # its state is donated
            args = (out[0], *args[1:])
    told = jax.local_devices()[0].memory_stats() or {}
    return told.get("peak_bytes_in_use"), float(np.median(seconds[1:]))


def _ones(leaf: Any) -> Any:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    return jnp.ones(leaf.shape, leaf.dtype, device=leaf.sharding)


def compared(plan: dict[str, Any], peak: int | None, seconds: float) -> dict[str, float | None]:
    """Planned beside real, and real as a multiple of planned; None of what is not known."""
    rounded = lambda value, scale: None if value is None else round(value / scale, 3)
    ratio = lambda real, of: None if real is None or not of else round(real / of, 3)
    return {
        "planned_mib": rounded(plan["peak"], MIB),
        "real_mib": rounded(peak, MIB),
        "memory_times": ratio(peak, plan["peak"]),
        "planned_ms": rounded(plan["seconds"], 1e-3),
        "real_ms": rounded(seconds, 1e-3),
        "time_times": ratio(seconds, plan["seconds"]),
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
