"""Images per second and peak memory, ours against the original PyTorch modules, taking turns.

    python -m experiments.bench --what forward --preset vit_b

PyTorch's side is the encoder of `segment_anything` (needs `pip install -e '.[test]'`) in the loops of SlimSAM:
`bench_torch.py`; ours is what `slimsam_jax.compress` runs: `bench_jax.py`. Weights are random, which changes no time.
What is timed, for one image:

- forward: the encoder.
- importance: the disturbed gradient. SlimSAM runs a teacher beside the student; ours needs none.
- embedding-stage: distilling a student of which the embedding alone is narrow;
- bottleneck-stage: distilling the slim model (`--preset`) towards the teacher and the embedding-pruned one;
- evaluation: mIoU by point and by box of 19 annotations (`bench_evaluation.py`);
- everything: all masks of a photograph (`bench_everything.py`), and how many of them both sides find;
- data: no model, but JPEGs decoded, resized and batched (`bench_data.py`).

Every turn is a process of its own, so that peak memory is that of one side; compilation and the first step are not
counted. Both sides take the GPU if there is one, else all cores that this process may use.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from slimsam_jax.compression.steps import Distill
from slimsam_jax.models import config as configs
from slimsam_jax.models.attention import Form
from slimsam_jax.models.config import Config

TEACHERS = {"vit_p50": "vit_b", "vit_p77": "vit_b", "small_p50": "small"}  # of the presets that are slim
STAGES = ("embedding-stage", "bottleneck-stage")


def distillation_of(what: str) -> Distill:
    """Returns the paper's distillation after the cut of that part, at the default's choices."""
    return Distill("bottleneck" if what == "embedding-stage" else "stream+embedding")


class Step(NamedTuple):
    """What one side runs.

    Attributes:
      run: does it once and waits for the end.
      images: that it takes each time.
      peak: the most memory that the device has held so far, in bytes.
      where: the device and the precision.
      outcome: what of a run's result is to be compared with the other side's, as JSON.
    """

    run: Callable[[], object]
    images: int
    peak: Callable[[], int]
    where: str
    outcome: Callable[[Any], Any] = lambda result: None


@dataclasses.dataclass(frozen=True)
class Options:
    """What to time.

    Attributes:
      preset: the architecture, 1024 px; "small" is the embedded teacher's, 256 px. The stages need a slim one.
      images: timed in each turn, at least.
      turns: of each side.
      batch: images per step of distillation, ours; the reference takes one after the other, and updates after four.
        Of data, on both sides.
      attention: how ours computes it (`models/attention.py`).
      cached: the teacher's embeddings come from disk (`--cache`), ours; the reference cannot.
      compile: forward by `torch.compile` in bfloat16, instead of the reference's eager float32.
      photos: of everything: a folder of images, of which the first `images` are taken; ours if not given.
      side: "jax" and "torch" are the turns themselves.
    """

    what: Literal[
        "forward", "importance", "embedding-stage", "bottleneck-stage", "evaluation", "everything", "data"
    ] = "forward"
    preset: Literal["vit_b", "vit_l", "vit_h", "vit_p50", "vit_p77", "small", "small_p50"] = "vit_b"
    images: int = 2
    turns: int = 2
    batch: int = 4
    attention: Form = "auto"
    cached: bool = False
    compile: bool = False
    photos: Path | None = None
    side: Literal["both", "jax", "torch"] = "both"


def architectures(preset: str) -> tuple[Config, Config, Config]:
    """(slim model, the same with only its embedding pruned, teacher) of a preset; three times itself if not slim."""
    slim, teacher = configs.preset(preset), configs.preset(TEACHERS.get(preset, preset))
    return slim, dataclasses.replace(teacher, embed_dim=slim.embed_dim), teacher


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
        from experiments import bench_data

        return bench_data.make_step(options, architectures(options.preset)[0].image_size)
    if options.what == "evaluation":
        from experiments import bench_evaluation

        return bench_evaluation.make_step(options, architectures(options.preset)[0])
    if options.what == "everything":
        from experiments import bench_everything

        return bench_everything.make_step(options)
    # Imported here: PyTorch and JAX in one process would share its threads and its memory.
    if options.side == "jax":
        from experiments import bench_jax as side
    else:
        from experiments import bench_torch as side
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
        from experiments import bench_everything

        print(bench_everything.agreement(ours[0]["outcome"], theirs[0]["outcome"]))


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
