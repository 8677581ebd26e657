"""Makes all results anew, by the code of this commit, in the order of hours; stopped, it goes on where it was.

    python -m experiments.remake --list
    python -m experiments.remake --images bsds_train --val bsds_val
    python -m experiments.remake --only pruning --images ...

A part is done if `results/remade.jsonl` says so, and nothing that its programs import has changed since. Before a part
begins, rows that its commands make again and that other code measured leave its file: git has them. All is of the SAM
that ships; rows of small v1 stay as an archive, but for those of `hiera`, which do not name their teacher. Rows that
are left are known to the part's own program and not measured twice, but for the minutes of `quantization_latency`,
whose last rows count.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import imports, results
from experiments.parts import PARTS, Part
from slimsam_jax import cli, data
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.files import replacing

LEDGER = results.FOLDER / "remade.jsonl"  # its seconds are those of the call that finished a part
CHECKS = results.FOLDER / "spot_checks.jsonl"  # by `experiments.spot_checks`
PHOTOS = data.embedded_images()


@dataclasses.dataclass(frozen=True)
class Options:
    """What to make, and of what.

    Attributes:
      only: of this part alone.
      list: say what there is, its hours, and what is done; measure nothing.
      images: annotated photographs to learn from.
      val: annotated photographs to measure on.
      photos: photographs to look at, and to measure agreement on.
      work: folder for caches and models; outside the checkout, or ignored by git.
    """

    only: str = ""
    list: bool = False
    images: Path = Path("bsds_train")
    val: Path = Path("bsds_val")
    photos: Path = PHOTOS
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
        elif lacking := lacking_of(name):
            print(f"{name}: left out, it needs pip install -e '{lacking}'", flush=True)
        else:
            make(name, options)


def needed(names: list[str]) -> list[str]:
    """Lists the options whose files the commands of parts read."""
    commands = " ".join(command for name in names for command in PARTS[name].commands)
    return [name for name in ("images", "val", "photos") if f"{{{name}}}" in commands]


def lacking_of(name: str) -> str:
    """Names the extra that a part needs and that is not installed, as pip takes it; "" if there is none."""
    extra, module = PARTS[name].needs or ("", "")
    return f".[{extra}]" if extra and importlib.util.find_spec(module) is None else ""


def make(name: str, options: Options) -> None:
    """Runs the commands of a part; what they print goes to the terminal, too.

    Raises:
      InputError: rows of other code would be lost.
      RunError: a command failed. What it has measured stays.
    """
    part = PARTS[name]
    if part.file:
        drop_stale(name, part)
    # A folder for this code alone: a model or a cache of other code would be taken for done.
    work = options.work / (code_of(name, head()) or "")[:12]
    work.mkdir(parents=True, exist_ok=True)
    start, printed = time.time(), {}
    paths = {**vars(options), "work": work, "shipped": data.embedded_teacher()}
    for command in part.commands:
        if not (arguments := arguments_of(command, paths)):
            print(f"{name}: the model of python -m {command.split()[0]} is there", flush=True)
            continue
        print(f"{name}: python -m {' '.join(arguments)}", flush=True)
        printed[command] = run(arguments, name, COLUMNS="200")  # tables of a terminal are cut to its width
    kept = {} if part.file else {"printed": printed}
    results.append(LEDGER, {"part": name, "seconds": round(time.time() - start), **kept})


def arguments_of(command: str, paths: Mapping[str, Any]) -> list[str]:
    """Returns the arguments of `python -m`; none if the command makes a model that is there."""
    # Split before paths are put in: they may hold blanks.
    arguments = [word.format(**paths) for word in shlex.split(command)]
    out = Path(arguments[arguments.index("--out") + 1]) if "--out" in arguments else None
    return [] if out and (out / "config.json").is_file() else arguments


def run(arguments: list[str], name: str, **variables: str) -> str:
    """Returns what a program prints, line by line as it does; `variables` are of its environment.

    Raises:
      RunError: it failed.
    """
    lines = []
    command, env = [sys.executable, "-m", *arguments], os.environ | variables
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise RunError(f"{name}: python -m {arguments[0]} ended with {process.returncode}; the same command goes on")
    return "".join(lines)


def drop_stale(name: str, part: Part) -> None:
    """Takes rows that other code measured out of a part's file, if they are made again; says how many go and stay.

    Raises:
      InputError: git does not have them.
    """
    file, code = results.FOLDER / part.file, code_of(name, head())
    entries = results.read(file)
    others = [entry for entry in entries if not is_of(entry, name, code)]
    stale = [entry for entry in others if any(made.items() <= entry.items() for made in part.rows)]
    if not stale:
        return
    if git("status", "--porcelain", "--", str(file)).stdout.strip():
        raise InputError(f"{file.name}: {len(stale)} rows of other code would go, and it has changes; commit it first")
    stay = f"; {left} that no command makes again stay" if (left := len(others) - len(stale)) else ""
    print(f"{file.name}: {len(stale)} rows of other code go{stay}", flush=True)
    with replacing(file) as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries if entry not in stale))


def is_of(entry: dict[str, Any], name: str, code: str | None) -> bool:
    """Whether a part's code was `code` at the entry's commit; False of a commit that git does not know."""
    commit = entry["machine"]["commit"]
    return code is not None and not commit.endswith("-dirty") and code_of(name, commit) == code


@functools.cache
def code_of(name: str, commit: str) -> str | None:
    """Returns a hash of the code that a part's programs import, as a commit has it; None if git does not know it.

    The files are those of today: who imported another file then was another file itself. Comments and docstrings are
    no code.
    """
    programs = {command.split()[0] for command in PARTS[name].commands}
    paths = sorted(frozenset().union(*map(imports.sources, programs)))
    if (known := blobs(commit)) is None:
        return None
    codes = ((path, path in known and code_of_blob(known[path])) for path in paths)
    return hashlib.sha256("".join(f"{path} {code}\n" for path, code in codes).encode()).hexdigest()


@functools.cache
def code_of_blob(name: str) -> str:
    """Returns a hash of the code in a file that git keeps under this name."""
    return hashlib.sha256(imports.without_words(git("cat-file", "blob", name).stdout).encode()).hexdigest()


@functools.cache
def blobs(commit: str) -> dict[str, str] | None:
    """Returns {path: hash of its content} of the programs of a commit; None if git does not know it."""
    listed = git("ls-tree", "-r", "--format=%(path) %(objectname)", commit)
    lines = (line.rpartition(" ") for line in listed.stdout.splitlines())
    return None if listed.returncode else {path: blob for path, _, blob in lines if path.endswith(".py")}


def head() -> str:
    """Returns the commit that is checked out now: results may be committed while this runs."""
    return git("rev-parse", "HEAD").stdout.strip()


def done(name: str) -> bool:
    code = code_of(name, head())
    return any(is_of(entry, name, code) for entry in results.find(LEDGER, {"part": name}))


def line_of(name: str) -> str:
    """Formats a part as a line of the list."""
    part = PARTS[name]
    entries = results.read(results.FOLDER / part.file) if part.file else []
    code = code_of(name, head())
    fresh = sum(is_of(entry, name, code) for entry in entries)
    rows = f"{fresh} of {len(entries)} rows" if part.file else "what is printed"
    state = "done" if done(name) else "to be run" + (f", needs .[{part.needs[0]}]" if part.needs else "")
    checks = [entry for entry in results.read(CHECKS) if entry["part"].partition(":")[0] == name]
    if held := [all(entry["holds"].values()) for entry in checks if is_of(entry, name, code)]:
        state += f"; checked again, {sum(held)} of {len(held)} rows hold"
    return f"{name:<21} {part.hours:>6g}  {part.file or 'remade.jsonl':<27} {rows:<18} {state}"


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=results.CHECKOUT)


HEAD = f"{'part':<21} {'hours':>6}  {'file':<27} {'of this code':<18}"

if __name__ == "__main__":
    cli.run(Options, main)
