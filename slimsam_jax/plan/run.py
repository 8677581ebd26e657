"""Plans: compiles the programs of a recipe for each hardware and teacher, prints what they need and writes it down."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from slimsam_jax import __version__, sharding
from slimsam_jax.compression.budget import Budget, Target
from slimsam_jax.compression.plan import Planned, check, optimizer_steps, planned
from slimsam_jax.compression.prepare import check_encoders
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.set_option import change
from slimsam_jax.compression.student import resolved
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.files import replacing, write_json
from slimsam_jax.models import config as plain
from slimsam_jax.models.sam import Architecture, Sam
from slimsam_jax.plan import report
from slimsam_jax.plan.early import Programs, measure_early
from slimsam_jax.plan.hardware import Hardware, compiled_elsewhere, named
from slimsam_jax.plan.measure import MOST, Needs, expected, largest, measure
from slimsam_jax.plan.options import Options
from slimsam_jax.plan.programs import How, check_distillations, programs, trains
from slimsam_jax.progress import say
from slimsam_jax.training.setup import batch_size, compute_dtype


def run(options: Options) -> list[dict[str, Any]]:
    """Plans everything that the options name, and returns what is written to their file."""
    options.check()
    configs = {name: architecture(name) for name in options.teacher or ("small",)}
    places = [named(name) for name in options.on]
    for path in filter(None, (options.out, options.table)):
        path.parent.mkdir(parents=True, exist_ok=True)
    written: list[dict[str, Any]] = []
    for hardware in places:
        with sharding.targeting(hardware.devices), compiled_elsewhere(hardware):
            for teacher, config in configs.items():
                for entry in plan_one(options, hardware, teacher, config):
                    save(options, [*written, entry])  # what is known until now
                written.append(entry)
    say("wrote", str(options.out))
    programs = [program for entry in written for program in entry["programs"]]
    if failed := sum(bool(program["problem"]) and program["fits"] is None for program in programs):
        raise RunError(f"{failed} of {len(programs)} programs were not compiled: the compiler failed, as said above")
    return written


def save(options: Options, entries: list[dict[str, Any]]) -> None:
    """Writes the JSON, and the table if there shall be one."""
    write_json(options.out, entries)
    if options.table:
        with replacing(options.table) as temporary:
            temporary.write_text(report.table(entries) + "\n")


def architecture(name: str) -> Architecture:
    """Returns that of a preset or of a SAM, as `compress --teacher` takes it; raises InputError if it is neither."""
    from converters.from_torch import load

    if name in plain.PRESETS:
        return plain.preset(name)
    if not Path(name).exists():
        raise InputError(f"--teacher {name!r:.60} is no model, and no preset: {', '.join(plain.PRESETS)}")
    model = load(name)
    if not isinstance(model, Sam):
        raise InputError(f"--teacher {name!r:.60}: a FastSAM's compression is not planned")
    return model.config


def plan_one(options: Options, hardware: Hardware, teacher: str, config: Architecture) -> Iterator[dict[str, Any]]:
    """Yields what is known of a plan after each of its programs: the last is the whole."""
    steps, target, how = of_options(options, config)
    entry = beginning(options, hardware, teacher, how)
    report.print_heading(entry)
    found: list[Needs] = []
    listed = functools.partial(programs, steps, config, target, how, options.only)
    for needs in measured(listed, hardware, options.early):
        found.append(needs)
        report.print_row(needs, hardware)
        yield entry | {"programs": [described(each) for each in found]}
    whole = entry | {"programs": [described(each) for each in found], **hours(found, len(hardware.devices))}
    if options.largest:
        yield whole
        whole |= largest_batch(hardware, steps, config, target, how, options.early)
    report.print_whole(whole)
    yield whole


def measured(listed: Programs, hardware: Hardware, early: bool) -> Iterator[Needs]:
    """Yields what each program needs; if `early`, and not of a CPU, by as much of compiling as says the memory."""
    early = early and hardware.chip is not None
    for number, program in enumerate(listed()):
        yield measure_early(listed, number, program, hardware) if early else measure(program, hardware)


def of_options(options: Options, config: Architecture) -> tuple[tuple[Planned, ...], Target, How]:
    """The steps, how much is cut, and what the programs depend on besides; raises InputError as `compress` does."""
    if options.per_device:
        options = dataclasses.replace(options, batch=options.per_device * sharding.device_count())
    batch, dtype = batch_size(options), compute_dtype(options)
    named_student = str(options.student) if options.student else None
    recipe = resolved(change(RECIPES[options.recipe], options.set), named_student, config)
    check(recipe)
    check_encoders(recipe, config)
    target = Target(options.channel_ratio(), Budget.parse(options.budget) if options.budget is not None else None)
    steps = planned(recipe, optimizer_steps(recipe, options.limit, batch, options.steps))
    check_distillations(steps, options.only and (*options.only, *["distill"] * options.largest))
    how = (batch, dtype, options.accumulate, options.fsdp, options.attention)
    calibration = min(options.importance_images, options.limit)
    return steps, target, How(*how, calibration, options.cache, options.uniform)


def largest_batch(
    hardware: Hardware,
    steps: tuple[Planned, ...],
    config: Architecture,
    target: Target,
    how: How,
    early: bool = False,
) -> dict[str, Any]:
    """Returns the largest number of images of a step that every distillation fits with, and whether more may.

    None of a CPU, and where nothing is distilled.

    Raises:
      RunError: the compiler failed, and not for want of memory.
    """
    devices = len(hardware.devices) * how.parts
    if hardware.chip is None or not any(map(trains, steps)):
        return {"largest_batch": None, "largest_batch_is_at_least": None}

    peaks: dict[int, int] = {}

    def fits(each: int) -> bool:
        tried = functools.partial(programs, steps, config, target, how._replace(batch=each * devices), ("distill",))
        answer, peaks[each] = True, 0
        for needs in measured(tried, hardware, early):
            answer, peaks[each] = fitted(needs), max(peaks[each], (needs.peak or 0) + needs.resident)
            if not answer:  # what the others need is not asked: each is a compilation
                break
        say("tried", f"{each * devices} images a step: {'fits' if answer else 'does not fit'}")
        return answer

    most = largest(fits, guess=lambda: expected(peaks, hardware.chip.memory))
    return {"largest_batch": devices * most, "largest_batch_is_at_least": most == MOST}


def fitted(needs: Needs) -> bool:
    """Whether a program fits; raises RunError if it was not compiled, which says nothing of its memory."""
    if needs.fits is None:
        raise RunError(f"--largest: {needs.name} was not compiled, so what fits is not known: {needs.problem}")
    return needs.fits


def hours(found: list[Needs], devices: int) -> dict[str, Any]:
    """Returns the hours of the calls that a run makes, if each program's time is known; without loading and scoring.

    "hours_of" names the programs that are summed: with `--only` they are not all of a run's.
    """
    counted = [needs for needs in found if needs.calls]
    if not counted or any(needs.seconds is None for needs in counted):
        return {"hours": None, "device_hours": None, "hours_of": []}
    total = sum(needs.seconds * needs.calls for needs in counted) / 3600
    return {"hours": total, "device_hours": total * devices, "hours_of": [needs.name for needs in counted]}


def described(needs: Needs) -> dict[str, Any]:
    rate = needs.images / needs.seconds if needs.seconds else None
    return {**dataclasses.asdict(needs), "seconds": needs.seconds, "images_per_second": rate}


def beginning(options: Options, hardware: Hardware, teacher: str, how: How) -> dict[str, Any]:
    """What is written of a plan before its programs: where, and all that these depend on."""
    chip = hardware.chip
    return {
        "on": hardware.name,
        "devices": len(hardware.devices),
        "device": hardware.devices[0].device_kind,
        "memory": chip.memory if chip else None,
        "teacher": teacher,
        "recipe": options.recipe,
        "set": list(options.set),
        "student": str(options.student) if options.student else None,
        "uniform": options.uniform,
        "ratio": options.channel_ratio(),
        "budget": options.budget,
        "batch": how.batch,
        "accumulate": how.parts,
        "fsdp": how.fsdp,
        "attention": how.attention,
        "dtype": jnp.dtype(how.dtype).name,
        "cache": how.cached,
        "steps": options.steps,
        "images": options.limit,
        "versions": {"slimsam_jax": __version__, "jax": version("jax")},
    }
