"""Images per second and peak memory, ours against the original PyTorch modules, taking turns.

    python -m experiments.bench --what forward --preset vit_b

PyTorch's side is the encoder of `segment_anything` (needs `pip install -e '.[test]'`) in the loops of SlimSAM:
`original.py`; ours is what `slimsam_jax.compress` runs: `ours.py`. Weights are random, which changes no time.
What is timed, for one image:

- forward: the encoder.
- importance: the disturbed gradient. SlimSAM runs a teacher beside the student; ours needs none.
- embedding-stage: distilling a student of which the embedding alone is narrow;
- bottleneck-stage: distilling the slim model (`--preset`) towards the teacher and the embedding-pruned one;
- evaluation: mIoU by point and by box of 19 annotations (`evaluation.py`);
- everything: all masks of a photograph (`everything.py`), and how many of them both sides find;
- data: no model, but JPEGs decoded, resized and batched (`data.py`).

Every turn is a process of its own, so that peak memory is that of one side; compilation and the first step are not
counted. Both sides take the GPU if there is one, else all cores that this process may use.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from typing import Any

import tyro

from experiments.bench.options import STAGES, Options, Step, architectures


def main(options: Options) -> None:
    slim, _, teacher = architectures(options.preset)
    if options.what in STAGES and slim == teacher:
        sys.exit(f"--preset {options.preset} is no slim model: the stages need vit_p50, vit_p77 or small_p50")
    if options.compile and options.what != "forward":
        sys.exit("--compile is for --what forward alone")
    if options.side == "both":
        compare(options)
    else:
        print(json.dumps(timed(make_step(options), options.images)))


def make_step(options: Options) -> Step:
    if options.what == "data":
        from experiments.bench import data

        return data.make_step(options, architectures(options.preset)[0].image_size)
    if options.what == "evaluation":
        from experiments.bench import evaluation

        return evaluation.make_step(options, architectures(options.preset)[0])
    if options.what == "everything":
        from experiments.bench import everything

        return everything.make_step(options)
    # Imported here: PyTorch and JAX in one process would share its threads and its memory.
    if options.side == "jax":
        from experiments.bench import ours as side
    else:
        from experiments.bench import original as side
    return side.make_step(options, *architectures(options.preset))


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


def compare(options: Options) -> None:
    """Runs the two sides in turn, and prints the ratios of neighbours."""
    turns: dict[str, list[dict]] = {"jax": [], "torch": []}
    for _ in range(options.turns):
        for side, results in turns.items():
            command = [sys.executable, "-m", "experiments.bench", *flags(options), f"--side={side}"]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            results.append(json.loads(output.splitlines()[-1]))
            print(side, {name: value for name, value in results[-1].items() if name != "outcome"}, flush=True)
    ours, theirs = turns["jax"], turns["torch"]
    highest = lambda side: max(turn["peak_gb"] for turn in side)
    print(
        f"{options.what}, {options.preset}, attention {options.attention}; ours on {ours[0]['where']}, PyTorch on "
        f"{theirs[0]['where']}: {spread(ours)} against {spread(theirs)} images/s, {ratios(ours, theirs, 'seconds')} "
        f"times as many ({ratios(ours, theirs, 'cpu_seconds')} by the CPU's time), with {highest(ours):.2f} and "
        f"{highest(theirs):.2f} GB at the peak"
    )
    if options.what == "everything":
        from experiments.bench import everything

        print(everything.agreement(ours[0]["outcome"], theirs[0]["outcome"]))


def flags(options: Options) -> list[str]:
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


if __name__ == "__main__":
    main(tyro.cli(Options))
