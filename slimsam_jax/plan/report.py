"""Prints a plan as it comes, a line a program; as a table in Markdown from the JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slimsam_jax.plan.hardware import Hardware
from slimsam_jax.plan.measure import Needs

MIB = 2**20


def print_heading(entry: dict[str, Any]) -> None:
    print(
        f"{entry['teacher']} on {entry['on']} ({entry['devices']} x {entry['device']}), {entry['batch']} images a step,"
        f" {entry['dtype']}, fsdp {entry['fsdp']}, attention {entry['attention']}",
        flush=True,
    )


def print_row(needs: Needs, hardware: Hardware) -> None:
    """One program in three lines: memory, work and messages, time."""
    print(f"  {needs.name}: {memory_of(needs, hardware)}")
    if needs.problem:
        print(f"    the compiler gave up: {needs.problem}", flush=True)
        return
    print(f"    arguments {mib(needs.arguments)}, temporaries {mib(needs.temporaries)}; {work_of(needs)}")
    until = "memory laid out" if needs.early else "compiled"
    print(f"    {time_of(needs)}{until} in {needs.compile_seconds:.0f} s", flush=True)


def memory_of(needs: Needs, hardware: Hardware) -> str:
    chip = hardware.chip
    peak = "peak unknown" if needs.peak is None else f"peak {mib(needs.peak)}"
    models = f" and {mib(needs.resident)} of models" if needs.resident else ""
    if chip is None:
        return f"{peak}{models}"
    fits = {True: "fits", False: "does NOT fit", None: "not known whether it fits"}[needs.fits]
    return f"{peak}{models}, {fits} into {mib(chip.memory)}"


def work_of(needs: Needs) -> str:
    sent = ", ".join(f"{count} {kind} of {mib(size)}" for kind, (count, size) in needs.collectives.items())
    beside = f", {mib(needs.beside)} of it beside computation" if sent else ""
    flash = f", {needs.flash} flash kernels" if needs.flash else ""
    return f"{needs.flops / 1e12:.3g} TFLOP{flash}; messages: {sent or 'none'}{beside}"


def time_of(needs: Needs) -> str:
    if needs.seconds is None:
        return ""
    rate = f"{needs.images / needs.seconds:.3g} images/s"
    roofline = f"roofline {1e3 * needs.roofline_seconds:.3g} ms"
    if needs.compiler_seconds is None:
        return f"{roofline}: at best {rate}; "
    loops = " with loops counted once" if needs.loops else ""
    return f"the compiler's estimate{loops} {1e3 * needs.compiler_seconds:.3g} ms, {roofline}: at best {rate}; "


def print_whole(entry: dict[str, Any]) -> None:
    if entry["hours"] is not None:
        print(
            f"  at best {entry['hours']:.3g} hours, {entry['device_hours']:.3g} device hours, for {entry['images']}"
            f" images: {', '.join(entry['hours_of'])} (reading, validating and measuring come on top)"
        )
    if entry.get("largest_batch") is not None:
        least = "at least " if entry["largest_batch_is_at_least"] else ""
        print(f"  the largest batch that fits: {least}{entry['largest_batch']} images a step")


def mib(size: int) -> str:
    return f"{size / MIB:.0f} MiB"


def table(entries: Sequence[dict[str, Any]]) -> str:
    """Formats entries of the JSON as a table in Markdown, a row a program."""
    rows = [
        "| teacher | on | program | images a device | peak, MiB | with the run's models, MiB | fits | TFLOP a device"
        " | ms, at best | images/s | compiled |",
        "|" + "---|" * 11,
    ]
    for entry in entries:
        rows += [_row(entry, each) for each in entry["programs"]]
    return "\n".join(rows)


def _row(entry: dict[str, Any], program: dict[str, Any]) -> str:
    devices = entry["devices"] if program["kind"] in ("prune", "distill") else 1
    peak, seconds, rate = program["peak"], program["seconds"], program["images_per_second"]
    with_models = None if peak is None else peak + program["resident"]
    number = lambda value, scale=1.0: "?" if value is None else f"{value * scale:.3g}"
    whole = lambda value: "?" if value is None else f"{value / MIB:.0f}"
    fits = {True: "yes", False: "**no**", None: "?"}[program["fits"]]
    on = entry["on"] + (f", `--fsdp {entry['fsdp']}`" if entry["fsdp"] > 1 else "")
    cells = (entry["teacher"], on, program["name"], f"{program['images'] / devices:g}", whole(peak))
    cells += (whole(with_models), fits, number(program["flops"], 1e-12), number(seconds, 1e3), number(rate))
    cells += ("until memory" if program["early"] else "no" if program["problem"] else "whole",)
    return f"| {' | '.join(cells)} |"
