"""Two sides take turns, each a process of its own, and are compared with their neighbours."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from experiments.bench.options import Step


def take(options: Any, make_step: Callable[[Any], Step], compare: Callable[[Any], None]) -> None:
    """Runs the one side that the options name, as a turn, and prints what it took; or compares both."""
    if options.side == "both":
        compare(options)
    else:
        print(json.dumps(timed(make_step(options), options.images)))


def timed(step: Step, images: int) -> dict[str, Any]:
    """Runs a step once for nothing, then until so many images are done."""
    start = time.perf_counter()
    step.run()
    warm, cpu, count = time.perf_counter(), time.process_time(), -(-images // step.images)
    for _ in range(count):
        result = step.run()
    return {
        "seconds": round((time.perf_counter() - warm) / (count * step.images), 4),
        "cpu_seconds": round((time.process_time() - cpu) / (count * step.images), 4),
        "first": round(warm - start, 2),
        "peak_gb": round(step.peak() / 1e9, 2),
        "where": step.where,
        "outcome": step.outcome(result),
    }


def taken(program: str, options: Any, *others: str) -> list[list[dict]]:
    """Runs the sides of a program in turn; returns ours, PyTorch's, and those of the others."""
    turns: dict[str, list[dict]] = {"jax": [], "torch": [], **{name: [] for name in others}}
    for _ in range(options.turns):
        for side, results in turns.items():
            command = [sys.executable, "-m", program, *flags(options), f"--side={side}"]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            results.append(json.loads(output.splitlines()[-1]))
            print(side, {name: value for name, value in results[-1].items() if name != "outcome"}, flush=True)
    return list(turns.values())


def summary(what: str, ours: list[dict], theirs: list[dict], called: str = "PyTorch") -> str:
    """The ratios of neighbours, in a line."""
    highest = lambda side: max(turn["peak_gb"] for turn in side)
    return (
        f"{what}; ours on {ours[0]['where']}, {called} on "
        f"{theirs[0]['where']}: {spread(ours)} against {spread(theirs)} images/s, {ratios(ours, theirs, 'seconds')} "
        f"times as many ({ratios(ours, theirs, 'cpu_seconds')} by the CPU's time), with {highest(ours):.2f} and "
        f"{highest(theirs):.2f} GB at the peak"
    )


def flags(options: Any) -> list[str]:
    """Returns the flags that a turn is started with, besides its side."""
    given = {name: value for name, value in dataclasses.asdict(options).items() if name != "side"}
    switches = [f"--{name}" for name, value in given.items() if value is True]
    return switches + [f"--{name}={value}" for name, value in given.items() if not isinstance(value, bool | None)]


def ratios(ours: list[dict], theirs: list[dict], what: str) -> str:
    """Formats the ratios of neighbouring turns, the smallest and the largest."""
    quotients = [t[what] / j[what] for j, t in zip(ours, theirs, strict=True)]
    return f"{min(quotients):.2f} to {max(quotients):.2f}"


def spread(turns: list[dict]) -> str:
    rates = [1 / turn["seconds"] for turn in turns]
    return f"{min(rates):.3g}..{max(rates):.3g}"
