"""The options that every training has: its images, its folder, its devices."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """What to learn from, and what to measure on."""

    images: tuple[str, ...] = ()
    """What to learn from, no labels needed: folders, searched recursively, of images and .tar shards; .tar shards
    themselves; a COCO .json; tfds:DIR. Default: the photographs in the package."""
    val: tuple[str, ...] = ()
    """What to measure on, of the same kinds. Annotations (an SA-1B .json of the same name beside an image) make it
    count for mIoU. Default: an eighth of --images, at most 50, held out."""
    limit: int | None = None
    """Learn from so many of --images only, drawn by --seed: 10000 of SA-1B's 11 million are the paper's."""
    cache: Path | None = None
    """A folder for the teacher's embeddings of --images (2 MB each at 1024 px, of SAM 2 8 MB): each is computed once,
    not once an epoch. For this teacher only, but any number of runs."""
    cache_as: Literal["float16", "int8"] = "float16"
    """How --cache holds them: int8 takes half the room, with a range for each channel of an image (its error is
    measured in docs/distillers.md)."""
    max_broken: float = 0.1
    """The share of --images that may be unreadable; more stops the run. The others are named and skipped. Of --val,
    too, but more of those are refused before the run, or do not stop it: the exit code is 1 in the end."""
    strict: bool = False
    """As --max-broken 0: stop at the first of --images that cannot be read."""

    def broken_share(self) -> float:
        """Returns the share of images that may be unreadable."""
        return 0.0 if self.strict else self.max_broken


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The folder of a run, and how it goes on."""

    out: Path = Path("slim")
    """The folder to write. Must not exist or be empty, unless --resume is given."""
    resume: bool = False
    """Continue the unfinished run in --out, with the same options."""
    save_every: int = 100
    """Steps between two checkpoints for --resume. SIGTERM makes one, too, and ends the run."""
    seed: int = 0
    """Of noise and order; on one CPU machine the same seed gives the same model."""


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """How a step is computed, and where."""

    batch: int | None = None
    """Images per step, a multiple of the number of devices. Default: 4, or as many more as that takes."""
    accumulate: int = 1
    """Parts that a step's images are taken in, one after the other: less memory for nearly the same gradient (the
    relative loss divides by each part's own variance)."""
    fsdp: int = 1
    """Devices that parameters and optimiser state are split over; 1 keeps them whole on each. Images are always
    split over all devices."""
    attention: Literal["auto", "plain", "rows", "folded"] = "auto"
    """How the encoders compute it while distilling: "plain" keeps all logits, "rows" some at a time, "folded" runs
    flash attention on GPUs and TPUs that can; "auto" does so where it can, and else bounds memory."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation while distilling; parameters stay float32. "auto" is bfloat16 on GPU and TPU."""
    distributed: str | None = None
    """For several processes, each with the same arguments and a shared file system: "auto" on TPU pods and under
    SLURM or MPI; or HOST:PORT,PROCESSES,INDEX, where HOST:PORT is a free port of process 0."""
