"""Makes all results anew, by the code of this commit, in the order of hours; stopped, it goes on where it was.

    python -m experiments.remake --list
    python -m experiments.remake --teacher sam_small_256.pth --images bsds_train --val bsds_val --photos photos
    python -m experiments.remake --only pruning --teacher ...

A part is done if `results/remade.jsonl` says so for code that has not changed since. Before a part begins, rows that
other code measured leave its file: git has them. What is left is found by the part's own program and not done twice.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from experiments import results
from slimsam_jax import cli
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.files import replacing

LEDGER = results.FOLDER / "remade.jsonl"
CODE = ("slimsam_jax/*.py", "converters/*.py", "experiments/*.py", ":(exclude)experiments/remake.py")
WORK = "--teacher {teacher} --images {images} --val {val}"


class Part(NamedTuple):
    """What is run together.

    Attributes:
      hours: that it took, or would by counting, on two cores with little else to do.
      file: of results, which the commands add to; "" keeps what they print in `remade.jsonl`.
      commands: arguments of `python -m`, with options of this program in braces.
    """

    hours: float
    file: str
    commands: tuple[str, ...]


# Hours: of slimming and pruning the sum that their rows say, as if every row were there; of distillers 73 CPU seconds
# for 40 steps, times its steps; of reference the minutes of its rows; of the others what a first part of them took.
PARTS = {
    "teacher_cache": Part(0.05, "", ("experiments.teacher_cache {teacher} {val} --limit 20",)),
    "how_it_works": Part(
        0.1,
        "how_it_works.jsonl",
        (
            "experiments.how_it_works --recipes taylor --steps 60",
            "experiments.how_it_works --recipes default --steps 48",
        ),
    ),
    "thresholds": Part(0.2, "", ("experiments.thresholds --images {images}",)),
    "hierarchical": Part(
        0.2,
        "hierarchical.jsonl",
        ("experiments.hierarchical run --teacher {teacher} --images {photos} {val}", "experiments.hierarchical table"),
    ),
    "families": Part(
        0.3, "families.jsonl", ("experiments.families run --folder {work}/stand_ins", "experiments.families table")
    ),
    "speed": Part(
        0.7,
        "",
        (
            "experiments.bench --what forward --preset vit_b --images 3 --turns 2",
            "experiments.bench --what forward --preset vit_p77 --images 3 --turns 2",
            "experiments.bench --what embedding-stage --preset vit_p77 --images 1 --batch 1 --turns 2",
            "experiments.bench --what bottleneck-stage --preset vit_p77 --images 1 --batch 1 --turns 2",
            "experiments.bench --what embedding-stage --preset small_p50 --images 40 --turns 2",
            "experiments.bench --what bottleneck-stage --preset small_p50 --images 40 --turns 2",
            "experiments.bench --what bottleneck-stage --preset small_p50 --images 40 --turns 2 --cached",
            "experiments.bench --what evaluation --preset small --images 30 --turns 3",
            "experiments.bench --what everything --preset small --images 3 --turns 2",
            "experiments.bench --what data --images 100 --turns 2",
            "experiments.bench.families --preset vit_t --images 4 --turns 3",
            "experiments.bench.families --preset rep_vit_m1 --images 4 --turns 3",
            "experiments.bench.families --preset efficient_sam_ti --images 2 --turns 3",
        ),
    ),
    "estimators": Part(1.0, "estimators.jsonl", (f"experiments.estimators run {WORK}", "experiments.estimators table")),
    "quantization": Part(
        2.0,
        "quantization.jsonl",
        (
            "experiments.quantization run {teacher} --calibration {images} --images {val} --limit 12 --seeds 0 1 2",
            "experiments.quantization table",
        ),
    ),
    "quantization_latency": Part(
        0.2,
        "quantization_latency.jsonl",
        (
            "experiments.quantization_latency run {teacher} --calibration {images}",
            "experiments.quantization_latency table",
        ),
    ),
    "hiera": Part(
        1.0,
        "hiera.jsonl",
        (
            "experiments.hiera_end_to_end make --teacher {teacher} --images {images} --out {work}/hiera_small",
            "experiments.hiera_end_to_end slim --teacher {work}/hiera_small --images {images} --val {val}",
            "experiments.hiera_end_to_end table",
        ),
    ),
    "reference": Part(
        2.5,
        "reference.jsonl",
        (
            "experiments.train_reference --images {images} --val {val} --decoder {teacher} --embed-dim 64 --heads 4 "
            "--corrections 0 --prompts 2 --steps 6000 --validations 6 --val-images 30 --resume --out {work}/narrow",
            "experiments.reference_results record --name narrow --folder {work}/narrow",
            "experiments.reference_results table",
        ),
    ),
    "pruning": Part(14, "pruning.jsonl", (f"experiments.pruning run {WORK}", "experiments.pruning table")),
    "slimming": Part(
        20,
        "slimming.jsonl",
        (
            f"experiments.slimming run {WORK} --cache {{work}}/cache",
            "experiments.slimming run --only narrow --teacher {work}/narrow --images {images} --val {val} "
            "--cache {work}/cache",
            "experiments.slimming table",
        ),
    ),
    "distillers": Part(
        110,
        "distillers.jsonl",
        (
            f"experiments.distillers run {WORK} --cache {{work}}/cache",
            f"experiments.distillers run --table weights {WORK} --cache {{work}}/cache",
            "experiments.distillers table",
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What to make, and of what.

    Attributes:
      only: of this part alone.
      list: say what there is, its hours, and what is done; measure nothing.
      teacher: the small SAM, as a file or folder.
      images: annotated photographs to learn from.
      val: annotated photographs to measure on.
      photos: photographs to look at, some of everything mode's.
      work: folder for caches, models and training runs; outside the checkout, or ignored by git.
    """

    only: str = ""
    list: bool = False
    teacher: Path = Path("sam_small_256.pth")
    images: Path = Path("bsds_train")
    val: Path = Path("bsds_val")
    photos: Path = Path("photos")
    work: Path = Path("cache")


def main(options: Options) -> None:
    if options.only not in ("", *PARTS):
        raise InputError(f"--only {options.only} is no part; there are {', '.join(PARTS)}")
    names = [options.only] if options.only else sorted(PARTS, key=lambda name: PARTS[name].hours)
    if options.list:
        return print("\n".join([HEAD, *map(line_of, names)]))
    results.check_committed()
    if missing := [name for name in needed(names) if not getattr(options, name).exists()]:
        said = (f"--{name} {getattr(options, name)}" for name in missing)
        raise InputError(f"there is no {' and no '.join(said)}")
    for name in names:
        if done(name):
            print(f"{name}: done by this code", flush=True)
        else:
            make(name, options)


def needed(names: list[str]) -> list[str]:
    """Lists the options whose files the commands of parts read."""
    commands = " ".join(command for name in names for command in PARTS[name].commands)
    return [name for name in ("teacher", "images", "val", "photos") if f"{{{name}}}" in commands]


def make(name: str, options: Options) -> None:
    """Runs the commands of a part; what they print goes to the terminal, too.

    Raises:
      InputError: rows of other code would be lost.
      RunError: a command failed. What it has measured stays.
    """
    part = PARTS[name]
    if part.file:
        drop_stale(results.FOLDER / part.file)
    # A folder for this code alone: a training or a cache of other code would be taken for done.
    work = options.work / git("rev-parse", "--short", "HEAD:slimsam_jax").stdout.strip()
    work.mkdir(parents=True, exist_ok=True)
    start, printed, paths = time.time(), [], {**vars(options), "work": work}
    for command in part.commands:
        # Split before paths are put in: they may hold blanks.
        arguments = [word.format(**paths) for word in command.split()]
        print(f"{name}: python -m {' '.join(arguments)}", flush=True)
        printed.append(run(arguments, name))
    kept = {} if part.file else {"printed": dict(zip(part.commands, printed, strict=True))}
    results.append(LEDGER, {"part": name, "seconds": round(time.time() - start), **kept})


def run(arguments: list[str], name: str) -> str:
    """Returns what a program prints, line by line as it does.

    Raises:
      RunError: it failed.
    """
    lines = []
    with subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise RunError(f"{name}: python -m {arguments[0]} ended with {process.returncode}; the same command goes on")
    return "".join(lines)


def drop_stale(file: Path) -> None:
    """Takes rows that other code measured out of a file.

    Raises:
      InputError: git does not have them.
    """
    entries = results.read(file)
    fresh = [entry for entry in entries if of_this_code(entry)]
    if len(fresh) == len(entries):
        return
    if git("status", "--porcelain", "--", str(file)).stdout.strip():
        stale = len(entries) - len(fresh)
        raise InputError(f"{file.name}: {stale} rows of other code would go, and it has changes; commit it first")
    with replacing(file) as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in fresh))


def of_this_code(entry: dict[str, Any]) -> bool:
    """Whether no program that measures has changed since the entry's commit; False of one that git does not know."""
    commit = entry["machine"]["commit"]
    return not commit.endswith("-dirty") and git("diff", "--quiet", commit, "HEAD", "--", *CODE).returncode == 0


def done(name: str) -> bool:
    return any(map(of_this_code, results.find(LEDGER, {"part": name})))


def line_of(name: str) -> str:
    """Formats a part as a line of the list."""
    part = PARTS[name]
    entries = results.read(results.FOLDER / part.file) if part.file else []
    fresh = sum(map(of_this_code, entries))
    rows = f"{fresh} of {len(entries)} rows" if part.file else "what is printed"
    state = "done" if done(name) else "to be run"
    return f"{name:<14} {part.hours:>6g}  {part.file or 'remade.jsonl':<20} {rows:<18} {state}"


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=results.FOLDER.parents[1])


HEAD = f"{'part':<14} {'hours':>6}  {'file':<20} {'of this code':<18}"

if __name__ == "__main__":
    cli.run(Options, main)
