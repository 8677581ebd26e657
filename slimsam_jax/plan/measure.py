"""Compiles a program, and reads from what the compiler made of it what it needs: memory, arithmetic, messages, time."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

from slimsam_jax.plan.compiled_text import Traffic, traffic
from slimsam_jax.plan.hardware import Hardware
from slimsam_jax.plan.operations import flops
from slimsam_jax.plan.programs import Program

MOST = 4096  # the largest number that `largest` tries
FLASH = ("__cudnn$fmha", "tpu_custom_call")
UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a program needs, of one device but for `images`.

    Attributes:
      name, kind, images, calls: the program's.
      peak: bytes at most, arguments and results included; None if the compiler gave up and did not say.
      fits: whether that and `resident` go into the device's memory; None of a CPU, or if the compiler failed.
      resident: bytes besides that, see `Program`.
      arguments, temporaries: bytes.
      collectives: {kind: [how often, bytes of the results]}.
      beside: bytes of these that travel while something else is computed.
      flops: of products, loops and what is computed twice included.
      moved: bytes read and written, an estimate.
      compile_seconds: of this machine, by the clock.
      early: the compilation was ended where memory is laid out (`early`); nothing is known of `compiler_seconds`.
      compiler_seconds: of a call, the TPU compiler's estimate; it counts a loop once. None where there are kernels of
        flash attention, of which it knows nothing.
      roofline_seconds: of a call, at the chip's peak of arithmetic or of memory. What a cache keeps from one operation
        to the next is counted as read from memory, so a call whose arrays are small may be faster.
      loops: whether there are any, so that `compiler_seconds` is too little.
      flash: kernels of flash attention.
      problem: why the compiler gave up, for want of memory or by a fault of its own; "" if it did not.
    """

    name: str
    kind: str
    images: int
    calls: int
    peak: int | None
    fits: bool | None
    resident: int = 0
    arguments: int = 0
    temporaries: int = 0
    collectives: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    beside: int = 0
    flops: float = 0.0
    moved: int = 0
    compile_seconds: float = 0.0
    early: bool = False
    compiler_seconds: float | None = None
    roofline_seconds: float | None = None
    loops: bool = False
    flash: int = 0
    problem: str = ""

    @property
    def seconds(self) -> float | None:
        """Of a call: the compiler's estimate where it counts everything, and never less than the roofline."""
        if self.roofline_seconds is None:
            return None
        return max(self.compiler_seconds or 0.0, self.roofline_seconds)


def measure(program: Program, hardware: Hardware) -> Needs:
    """Compiles a program for the hardware that is targeted; one that it has no memory for is no error."""
    import jax

    start = time.perf_counter()
    traced = program.function.trace(*program.args)
    work = flops_of(traced, program, hardware)
    try:
        compiled = _compiled(traced.lower(), hardware)
    except jax.errors.JaxRuntimeError as error:
        fits = False if "RESOURCE_EXHAUSTED" in str(error) else None
        seconds = time.perf_counter() - start
        found = {"flops": work, "compile_seconds": seconds, "problem": why(error)}
        return Needs(**named(program), peak=used(str(error)), fits=fits, **found)
    seconds, text, memory = time.perf_counter() - start, compiled.as_text(), compiled.memory_analysis()
    needs = needs_of(program, hardware, work, text, memory)
    estimate = None if needs.flash else _by_compiler(compiled, hardware)
    return dataclasses.replace(needs, compile_seconds=seconds, compiler_seconds=estimate)


def named(program: Program) -> dict[str, Any]:
    """What a program's needs say of itself."""
    return {name: getattr(program, name) for name in ("name", "kind", "images", "calls", "resident")}


def flops_of(traced: Any, program: Program, hardware: Hardware) -> float:
    """Of one device: those that cut and train split their work over all."""
    return flops(traced.jaxpr.jaxpr) / (len(hardware.devices) if program.kind in ("prune", "distill") else 1)


def needs_of(program: Program, hardware: Hardware, work: float, text: str, memory: Any) -> Needs:
    """Reads what a compiler made.

    Args:
      work: see `flops_of`.
      text: of the optimised program.
      memory: what `jax.stages.Compiled.memory_analysis` gives, or the same by another way.
    """
    chip, met, peak = hardware.chip, traffic(text), whole(memory)
    return Needs(
        **named(program),
        peak=peak,
        fits=peak + program.resident <= chip.memory if chip else None,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        collectives=met.collectives,
        beside=met.beside,
        flops=work,
        moved=met.moved,
        roofline_seconds=_roofline(program, hardware, work, met),
        loops=" while(" in text,
        flash=sum(text.count(f'custom_call_target="{name}') for name in FLASH),
    )


def _compiled(lowered: Any, hardware: Hardware) -> Any:
    """Compiles; for a GPU once more with cuBLAS alone where Triton's tiles do not go, which it cannot try out here."""
    import jax

    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        triton = "tile sizes" in str(error) and hardware.chip and hardware.chip.platform == "cuda"
        if not triton:
            raise
    return lowered.compile({"xla_gpu_enable_triton_gemm": False})


def whole(memory: Any) -> int:
    """Bytes of everything at once: temporaries are one piece, which is there from the beginning of a call to its end.

    `peak_memory_in_bytes` is the same to a part in a thousand on a GPU, and leaves temporaries out on a CPU (jax 0.10).
    """
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + results


def used(message: str) -> int | None:
    """Bytes that a program would have needed, by the TPU compiler's message; None if it does not say."""
    match = re.search(r"[Uu]sed ([0-9.]+)([KMG]?) of [0-9.]+[KMG]? hbm", message)
    return int(float(match[1]) * UNITS[match[2]]) if match else None


def why(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _by_compiler(compiled: Any, hardware: Hardware) -> float | None:
    if not hardware.chip or hardware.chip.platform != "tpu":
        return None
    seconds = (compiled.cost_analysis() or {}).get("optimal_seconds")
    return seconds if seconds and seconds > 0 else None


def _roofline(program: Program, hardware: Hardware, work: float, met: Traffic) -> float | None:
    chip = hardware.chip
    if chip is None:
        return None
    return max(work / chip.peak(program.precision), met.moved / chip.bandwidth)


def largest(fits: Callable[[int], bool], most: int = MOST, guess: Callable[[], int | None] = lambda: None) -> int:
    """Returns the largest number that fits, 0 if not even 1 does; by doubling and bisection.

    Args:
      fits: asked as little as can be: each answer takes compilations. It falls in its argument, but for a place where
        blocks begin to be computed again (`models.sam.REMAT_ABOVE`): so where one does not fit, its double may.
      guess: asked once 1 and 2 fit; a good one saves most of the others, a bad one costs three.
    """
    reached = lambda number: next((each for each in (number, 2 * number) if each <= most and fits(each)), 0)
    low = reached(1)
    if low == 1:
        low = reached(2) or 1
    if low < 2:
        return low
    high = 2 * low
    if (middle := min(guess() or 0, most)) > low:
        if not (further := reached(middle)):
            near = max(low, middle - max(1, middle // 16))
            return _between(fits, near, middle) if near == low or fits(near) else _between(fits, low, near)
        low, high = further, further + 1
    while further := reached(high):
        low, high = further, further + 2 * (further - low)
    return _between(fits, low, min(high, most + 1))


def _between(fits: Callable[[int], bool], low: int, high: int) -> int:
    """Of a number that fits and one that does not the largest that fits."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def expected(peaks: dict[int, int], room: int) -> int | None:
    """The largest number that should fit, if each more takes what the second took; None if that says nothing.

    Args:
      peaks: {1: bytes, 2: bytes} at most.
      room: bytes.
    """
    if not {1, 2} <= set(peaks) or peaks[2] <= peaks[1]:
        return None
    return 1 + (room - peaks[1]) // (peaks[2] - peaks[1])
