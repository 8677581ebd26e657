"""Runs programs that `slimsam plan` planned on the device that is here: planned against real memory and time.

    slimsam plan --teacher vit_b --ratio 0.77 --per-device 1 --on h100 --only distill encode --out plan.json
    python -m experiments.bench.planned plan.json

A line for each program of a distillation or of an encoder in --dtype, of ones in place of parameters and images. Real
memory is the most that JAX had allocated in this process, where the device says it: give a plan of one program if more
are to be told apart.
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

from slimsam_jax import cli, limits
from slimsam_jax.errors import InputError, reading
from slimsam_jax.plan import options as planning
from slimsam_jax.plan.programs import Program, programs
from slimsam_jax.plan.run import architecture, of_options

MIB = 2**20
KINDS = ("distill", "encode")
# What a plan says of the options that it was made with.
SAID = ("recipe", "ratio", "budget", "uniform", "batch", "accumulate", "fsdp", "attention", "dtype", "cache", "steps")


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
    """Raises InputError for a plan that is none, is of another version's options, or of other devices."""
    limits.check("--runs", options.runs, limits.Range(1, limits.COUNT, True))
    here = {"device": jax.devices()[0].device_kind}
    for entry, given, expected in read(options.plan):
        said = here | {"teacher": entry["teacher"], "planned_for": entry["on"]}
        for program in programs_of(entry["teacher"], given):
            if plan := expected.get(program.name):
                line = said | {"program": program.name} | compared(plan, *measured(program, options.runs))
                print(json.dumps(line), flush=True)


def read(path: Path) -> list[tuple[dict[str, Any], planning.Options, dict[str, Any]]]:
    """Returns of each of a plan's entries itself, the options it was made with, {program: what was planned}."""
    with reading(path):
        entries = json.loads(path.read_text())
        found = [(entry, options_of(entry), expected(entry)) for entry in entries]
    for entry, _, _ in found:
        if entry["devices"] != jax.device_count():
            raise InputError(f"{path} is for {entry['devices']} devices; here are {jax.device_count()}")
    return found


def options_of(entry: dict[str, Any]) -> planning.Options:
    """The options of a plan's entry; raises InputError if it does not say all, as those of old versions."""
    if missing := [name for name in (*SAID, "set", "student", "images", "teacher", "on") if name not in entry]:
        raise InputError(f"a plan does not say its {', '.join(missing)}: write it again with slimsam plan")
    student = None if entry["student"] is None else Path(entry["student"])
    said = {name: entry[name] for name in SAID} | {"set": tuple(entry["set"]), "limit": entry["images"]}
    options = planning.Options(**said, student=student, only=KINDS)
    options.check()
    return options


def expected(entry: dict[str, Any]) -> dict[str, Any]:
    """Peak and seconds by a program's name, of the kinds that are run."""
    programs = [each for each in entry["programs"] if each["kind"] in KINDS]
    return {each["name"]: {name: each[name] for name in ("peak", "seconds")} for each in programs}


def programs_of(teacher: str, options: planning.Options) -> list[Program]:
    """Makes the programs of a plan again, of this process's devices."""
    config = architecture(teacher)
    steps, target, how = of_options(options, config)
    return list(programs(steps, config, target, how, KINDS))


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
    cli.run(Options, main)
