"""A compilation in a process of its own: ended once memory is laid out, or heard when it ends before."""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from slimsam_jax.errors import RunError
from slimsam_jax.plan.early import dumped_of, laid_out, measure_early
from slimsam_jax.plan.hardware import CHIPS, Hardware
from slimsam_jax.plan.measure import measure
from slimsam_jax.plan.programs import Program

# What is compiled here, and read as a TPU's.
HERE = Hardware("cpu", CHIPS["v5e"], jax.devices("cpu")[:1])
# As XLA writes it: arguments, one of them a result too; a result; temporaries; and what is in small memories.
LAID = """BufferAssignment:
allocation 0: size 16, thread-local:
allocation 1: size 800, parameter 0, shape |f32[10,20]| at ShapeIndex {0}:
allocation 2: size 1600, parameter 1, maybe-live-out, shape |f32[20,20]| at ShapeIndex {}:
 value: <12 add @0> (size=800,offset=0): f32[10,20]
allocation 3: 0x5566, size 400, maybe-live-out:
allocation 4: size 32, constant:
allocation 5: size 3000, preallocated-temp:
allocation 6: size 200, color 2, preallocated-temp:
"""
TEXT = """HloModule jit_step

ENTRY main {
  p = f32[10,20] parameter(0)
  ROOT add.1 = f32[10,20] add(%p, %p)
}
"""


def program():
    function = jax.jit(lambda a, b: jnp.tanh(a @ b))
    args = (jax.ShapeDtypeStruct((10, 20), jnp.float32), jax.ShapeDtypeStruct((20, 20), jnp.float32))
    return Program("distill", "distill", function, args, 1, 7, 500)


def other():
    return program()._replace(name="another")


def both():
    yield other()
    yield program()


def never_ends():
    """What a compiler does of whose machine code nobody sees the end."""
    folder = Path(re.search(r"--xla_dump_to=(\S+)", os.environ["XLA_FLAGS"])[1])
    assert f"removes {folder} after the parent" in [thread.name for thread in threading.enumerate()]
    for name, text in (("", TEXT), ("-buffer-assignment", LAID), ("-memory-usage-report", "")):
        (folder / f"module_0000.jit_step.cl_1.after_optimizations{name}.txt").write_text(text)
    while True:
        time.sleep(1)


def dies():
    os._exit(3)


def test_bytes_are_those_of_the_large_memory_each_once():
    assert laid_out(LAID.splitlines()) == (2400, 3000, 400, 0)


@pytest.mark.parametrize(("chip", "mark"), [("h100", ".sm_9.0a_gpu_"), ("v5e", ".cl_9.")])
def test_what_was_compiled_last_is_read_once_it_is_whole(chip, mark, tmp_path):
    hardware = Hardware(chip, CHIPS[chip], ())
    for number, text in ((3, "first"), (12, "second")):
        name = f"module_{number:04}.jit_step{mark}after_optimizations"
        (tmp_path / f"{name}.txt").write_text(text)
        (tmp_path / f"{name}-buffer-assignment.txt").write_text(LAID)
    assert dumped_of(tmp_path, hardware) is None
    for number in (3, 12):
        (tmp_path / f"module_{number:04}.jit_step{mark}after_optimizations-memory-usage-report.txt").touch()
    assert dumped_of(tmp_path, hardware) == ("second", (2400, 3000, 400, 0))


def test_a_compilation_is_ended_when_memory_is_laid_out(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    needs = measure_early(never_ends, 0, program(), HERE)
    assert (needs.arguments, needs.temporaries, needs.peak, needs.moved) == (2400, 3000, 5800, 1600 + 800)
    assert (needs.name, needs.calls, needs.resident, needs.flops) == ("distill", 7, 500, 2 * 10 * 20 * 20)
    assert needs.early and needs.compiler_seconds is None and not needs.problem
    assert not multiprocessing.active_children() and os.environ["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false"


def test_what_is_compiled_before_is_heard_whole(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    whole, needs = measure(program(), HERE), measure_early(both, 1, program(), HERE)
    assert not needs.early and "XLA_FLAGS" not in os.environ
    for field in ("name", "arguments", "temporaries", "peak", "flops", "moved"):
        assert getattr(needs, field) == getattr(whole, field)


def test_a_process_that_dies_is_an_error():
    with pytest.raises(RunError, match="distill: the process that compiled it ended without a word"):
        measure_early(functools.partial(dies), 0, program(), HERE)
