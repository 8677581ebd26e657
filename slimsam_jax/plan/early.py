"""Ends a compilation once memory is laid out: machine code, which a large program waits for, is never made.

A compilation cannot be stopped, so it runs in a process of its own, which can. XLA writes the program and what it has
laid out to files (--xla_dump_to), in the order that they are made in; they are read as the compiled program would be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from slimsam_jax import sharding
from slimsam_jax.errors import RunError
from slimsam_jax.plan.hardware import Hardware, compiled_elsewhere, named
from slimsam_jax.plan.measure import Needs, flops_of, measure, needs_of
from slimsam_jax.plan.orphans import end_with_parent
from slimsam_jax.plan.programs import Program

ALLOCATION = re.compile(r"allocation [0-9]+: (?:0x\w+, )?size ([0-9]+), (.*)")
KINDS = {"parameter": "argument", "preallocated-temp": "temp", "live-out": "output"}  # the first that a line has
MARKS = {"cuda": "_gpu_", "tpu": "."}  # of the names of what is compiled for these
LAST = "after_optimizations-memory-usage-report.txt"  # is written behind what is read
Programs = Callable[[], Iterator[Program]]


class Memory(NamedTuple):
    """Bytes, as `whole` reads them of a compiled program. A result in the place of an argument is no output here."""

    argument_size_in_bytes: int = 0
    temp_size_in_bytes: int = 0
    output_size_in_bytes: int = 0
    alias_size_in_bytes: int = 0


def measure_early(listed: Programs, number: int, program: Program, hardware: Hardware) -> Needs:
    """As `measure`, from what is known once memory is laid out, or from the whole if that is there earlier.

    Args:
      listed: gives the programs again, in another process; it can be pickled.
      number: of the program among them.
      program: the same, of this process.
      hardware: no CPU.

    Raises:
      RunError: the other process ended, and said nothing.
    """
    start, spawn = time.perf_counter(), multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        receiving, sending = spawn.Pipe(duplex=False)
        child = spawn.Process(target=_compile, args=(listed, number, hardware.name, sending, folder), daemon=True)
        with _dumping(Path(folder)):
            child.start()
        sending.close()  # so that its end is seen
        try:
            work = flops_of(program.function.trace(*program.args), program, hardware)  # meanwhile
            while not receiving.poll(1.0):
                if dumped := dumped_of(Path(folder), hardware):
                    needs = needs_of(program, hardware, work, *dumped)
                    return dataclasses.replace(needs, compile_seconds=time.perf_counter() - start, early=True)
            return receiving.recv()
        except EOFError:
            raise RunError(f"{program.name}: the process that compiled it ended without a word") from None
        finally:
            child.kill()
            child.join()


def _compile(listed: Programs, number: int, on: str, said: Connection, folder: str) -> None:
    """What the other process does, until it or the first one ends."""
    end_with_parent(Path(folder))
    hardware = named(on)
    with sharding.targeting(hardware.devices), compiled_elsewhere(hardware):
        said.send(measure(next(itertools.islice(listed(), number, None)), hardware))


@contextlib.contextmanager
def _dumping(folder: Path) -> Iterator[None]:
    """Processes that begin in here write what XLA makes into a folder."""
    before = os.environ.get("XLA_FLAGS")
    own = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
    os.environ["XLA_FLAGS"] = f"{before or ''} {own}".strip()
    try:
        yield
    finally:
        os.environ.pop("XLA_FLAGS")
        os.environ |= {"XLA_FLAGS": before} if before is not None else {}


def dumped_of(folder: Path, hardware: Hardware) -> tuple[str, Memory] | None:
    """The optimised text and the memory of the program compiled last, once both are written whole; else None."""
    if not (last := max(folder.glob(f"*{MARKS[hardware.chip.platform]}{LAST}"), default=None)):
        return None
    stem = last.name.removesuffix("-memory-usage-report.txt")
    with (folder / f"{stem}-buffer-assignment.txt").open() as lines:
        return (folder / f"{stem}.txt").read_text(), laid_out(lines)


def laid_out(lines: Iterable[str]) -> Memory:
    """Sums what XLA's text of a buffer assignment says of a device's large memory, which has no colour there."""
    sizes = dict.fromkeys(KINDS.values(), 0)
    for match in filter(None, map(ALLOCATION.match, lines)):
        kind = next((kind for word, kind in KINDS.items() if word in match[2]), None)
        if kind and not re.search(r"color [1-9]", match[2]):
            sizes[kind] += int(match[1])
    return Memory(**{f"{kind}_size_in_bytes": size for kind, size in sizes.items()})
