"""The options of `slimsam plan`: those of `compress` that its programs depend on, and the hardware."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from slimsam_jax import limits
from slimsam_jax.cli.checks import check_files
from slimsam_jax.compression.options import CutOptions
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.set_option import settled
from slimsam_jax.errors import InputError
from slimsam_jax.limits import Range

COUNTED = {
    "steps": Range(0, limits.STEPS, True),
    "batch": Range(1, limits.BATCH, True),
    "per_device": Range(1, limits.BATCH, True),
    "limit": Range(1, limits.COUNT, True),
    "importance_images": Range(1, limits.COUNT, True),
    "accumulate": Range(1, limits.BATCH, True),
    "fsdp": Range(1, limits.BATCH, True),
}


@dataclasses.dataclass(frozen=True)
class Options(CutOptions):
    """Compile a compression for hardware that is not here, and say what it needs there.

    The programs are those of `slimsam compress` with the same options: statistics or importance, each distillation,
    and the encoders in float32 (as validation runs them) and in --dtype. No weights are made or read, nothing runs.
    For each program: the peak memory of a device and whether it fits, arguments and temporaries, messages between
    devices, operations, and an estimate of the time; for the whole the hours.
    """

    teacher: tuple[str, ...] = ()
    """Architectures: vit_b, vit_l, vit_h, vit_p50, vit_p77 (or other presets of SAM's ViT), or SAMs of any family, as
    `compress` takes them. Default: the small SAM in the package."""
    on: tuple[str, ...] = ("h100",)
    """The hardware: h100, h200 or a100, with x8 for eight in one machine; v5e-16 for so many chips of a TPU slice (v5e,
    v5p, v6e; 1 to 256); cpu."""
    batch: int | None = None
    """Images per step, over all devices. Default: as of compress."""
    per_device: int | None = None
    """Images per step on each device, in place of --batch: the same for hardware of any size."""
    accumulate: int = 1
    """Parts that a step's images are taken in, one after the other."""
    fsdp: int = 1
    """Devices that parameters and optimiser state are split over."""
    attention: Literal["auto", "plain", "rows", "folded"] = "auto"
    """How the encoders compute it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation while distilling. "auto" is bfloat16 on GPU and TPU."""
    cache: bool = False
    """The teacher's embeddings come from a cache (`compress --cache`)."""
    limit: int = 10000
    """Images to learn from, for the number of steps and the hours; the paper has so many."""
    only: tuple[Literal["prune", "distill", "evaluate", "encode"], ...] = ()
    """Kinds of programs, if not all: each takes a compilation of a minute or more. "evaluate" are encoders in float32,
    "encode" in --dtype."""
    largest: bool = False
    """Look for the largest batch that fits, too: some more compilations of each distillation."""
    early: bool = False
    """End each compilation once memory is laid out, and wait for no machine code: of ViT-H on a TPU minutes in place of
    an hour or more. Leaves out the TPU compiler's estimate of the time, and takes up to 1 GB for temporary files. With
    --on cpu all is compiled, as ever."""
    out: Path = Path("plan.json")
    """The numbers, as JSON. A file of this name is replaced, and written anew after each program."""
    table: Path | None = None
    """Also write a table in Markdown, a row a program."""

    def check(self) -> None:
        """Raises InputError for what is wrong without looking at files."""
        if self.ratio is not None and self.budget is not None:
            raise InputError("--ratio and --budget both say how much to cut; give one of them")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise InputError(f"--ratio {self.ratio:g} is not the share of channels to remove: 0 < ratio < 1")
        if self.batch is not None and self.per_device is not None:
            raise InputError("--batch and --per-device both say how many images a step has; give one of them")
        check_files([path for path in (self.out, self.table) if path])
        if self.budget is not None and self.budget.strip().startswith("latency"):
            raise InputError("--budget latency is measured where it runs, so it cannot be planned; give --ratio")
        limits.check_options(self, COUNTED)
        settled(RECIPES[self.recipe], self.set)
