"""Trains a SAM from masks: from nothing, or from a checkpoint on masks of your own.

    python -m experiments.train_reference --images bsds_train --val bsds_val --out reference
    python -m experiments.train_reference --init sam_vit_b_01ec64.pth --images mine --val mine_val --out mine_b

The interactive training of Segment Anything (Kirillov et al. 2023, appendix A); what differs from the paper is said
in experiments/reference_teacher.md.
"""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any, Literal

from slimsam_jax import cli, limits
from slimsam_jax.cli.checks import check_seed, check_share
from slimsam_jax.errors import InputError
from slimsam_jax.limits import Range
from slimsam_jax.training.folder_lock import check_run_folder

Part = Literal["image_encoder", "prompt_encoder", "mask_decoder"]
COUNTED = {
    "embed_dim": Range(1, 2**13, True),
    "depth": Range(1, 128, True),
    "heads": Range(1, 2**10, True),
    "mlp_dim": Range(1, 2**16, True),
    "image_size": Range(1, 2**12, True),
    "window": Range(1, 2**8, True),
    "steps": Range(1, limits.STEPS, True),
    "batch": Range(1, limits.BATCH, True),
    "prompts": Range(1, limits.PROMPT_POINTS, True),
    "corrections": Range(0, 64, True),  # each is compiled by itself
    "validations": Range(1, 10**5, True),
    "val_images": Range(1, limits.COUNT, True),
    "save_every": Range(1, limits.COUNT, True),
    "accumulate": Range(1, limits.BATCH, True),
    "fsdp": Range(1, limits.BATCH, True),
    "workers": Range(0, 256, True),
}
SIZES = ("embed_dim", "depth", "heads", "mlp_dim", "image_size", "window")


@dataclasses.dataclass(frozen=True)
class Options:
    """Train a SAM from annotated images.

    The output folder is a model folder (model.safetensors, config.json) that `slimsam_jax.compress --teacher` and
    `converters.to_torch` take; log.jsonl and curve.png show how the training went.
    """

    images: tuple[str, ...] = ()
    """Annotated images to learn from: folders in SA-1B layout, .tar shards, a COCO .json, tfds:DIR."""
    composites: Path | None = None
    """Instead of --images: a pack from `experiments.reference_data`, of which images are drawn anew for each step."""
    val: tuple[str, ...] = ()
    """Annotated images to measure on. Default: an eighth of --images, at most 50, held out."""
    out: Path = Path("reference")
    """The folder to write. Must not exist or be empty, unless --resume is given."""
    init: Path | None = None
    """A checkpoint to start from, of any kind that `converters.from_torch` reads. Default: random weights."""
    decoder: Path | None = None
    """A checkpoint whose prompt encoder and mask decoder to start from, with random weights in the image encoder."""
    preset: Literal["small", "vit_b", "vit_l", "vit_h", "vit_p50", "vit_p77"] | None = None
    """An architecture for random weights. Default: "small", that of the SAM in the package (256 px)."""
    embed_dim: int | None = None
    """Instead of the preset's: width of the image encoder; its MLPs get four times as much."""
    depth: int | None = None
    """Instead of the preset's: blocks, the last of each quarter with global attention."""
    heads: int | None = None
    """Instead of the preset's."""
    mlp_dim: int | None = None
    """Instead of four times the width."""
    image_size: int | None = None
    """Instead of the preset's, pixels."""
    window: int | None = None
    """Instead of the preset's: side of the attention windows in tokens."""
    steps: int = 4000
    """Optimiser steps."""
    batch: int = 8
    """Images per step, a multiple of the number of devices (times --accumulate)."""
    prompts: int = 4
    """Masks of each image in a step."""
    corrections: int = 1
    """Clicks that correct the first prompt's mask; the paper has 8, and 2 turns without a click."""
    objective: Literal["short", "sam"] = "short"
    """"sam" is the paper's: 20 focal + dice + IoU, of the best of three masks after the first prompt, of the single
    mask later. "short" is 2 focal + 2 cross-entropy + dice + IoU of both after each prompt: for short trainings, and
    for single masks of single clicks, which the paper does not train."""
    learning_rate: float | None = None
    """Peak, after a warm-up. Default: 5e-4, with --init 5e-5."""
    schedule: Literal["cosine", "warm"] = "cosine"
    """"cosine": a warm-up of 5 % of the steps, then a cosine to zero. "warm": a warm-up of 500 steps, then the peak for
    good: for a training of unknown length, which a later run with --init takes to its end by a cosine."""
    weight_decay: float = 0.1
    """AdamW's, of kernels."""
    clip: float = 1.0
    """The largest norm of all gradients; 0 for no limit."""
    ema: float = 0.0
    """Share that a moving average of the weights keeps at each step; the average is validated and kept then."""
    flip: bool = True
    """Mirror half of the images, with their masks."""
    crop: float = 0.5
    """Random crops with sides of at least this share of the image's; 1 for none."""
    freeze: tuple[Part, ...] = ()
    """Parts that stay as they are."""
    validations: int = 10
    """Of the training, evenly spaced; each gives point and box mIoU."""
    val_images: int = 50
    """Images of --val that a validation takes, the first."""
    keep: Literal["best", "last"] = "best"
    """Which model is the result: the best by the mean of both mIoUs, or the last."""
    seed: int = 0
    """Of weights, order, crops and prompts; on one CPU machine the same seed gives the same model."""
    resume: bool = False
    """Continue the unfinished run in --out, with the same options."""
    save_every: int = 100
    """Steps between two checkpoints for --resume. SIGTERM makes one, too, and ends the run."""
    accumulate: int = 1
    """Parts that a step's images are taken in, one after the other: less memory."""
    fsdp: int = 1
    """Devices that parameters and optimiser state are split over."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the image encoder's computation; parameters stay float32. "auto" is bfloat16 on GPU and TPU."""
    max_broken: float = 0.1
    """The share of --images that may be unusable; more stops the run."""
    workers: int = 0
    """Processes that draw --composites, where a GPU is faster than a process's threads; 0 for threads."""
    distributed: str | None = None
    """For several processes, as in `slimsam_jax.compress`."""

    def check(self) -> None:
        """Raises InputError for what is wrong without looking at files."""
        limits.check_options(self, COUNTED)
        if bool(self.images) == bool(self.composites):
            raise InputError("give annotated images by --images, or a pack by --composites")
        if self.composites and not self.val:
            raise InputError("--composites needs --val, a folder that `experiments.reference_data draw` makes")
        if self.workers and not self.composites:
            raise InputError("--workers draw --composites; --images are read in threads")
        if self.init and self.preset:
            raise InputError(f"--init brings its own architecture; leave out --preset {self.preset}")
        if self.init and self.decoder:
            raise InputError("--init brings its own decoder; leave out --decoder")
        if set(self.freeze) == set(typing.get_args(Part)):
            raise InputError("--freeze of every part leaves nothing to train")
        limits.check_options(self, {"weight_decay": Range(0, 100), "clip": Range(0, 1e9)})
        if not 0.01 <= self.crop <= 1:
            raise InputError(f"--crop {self.crop:g} is not a share of the image's sides, 0.01 <= crop <= 1")
        if not 0 <= self.ema < 1:
            raise InputError(f"--ema {self.ema:g} is not the share that an average keeps, 0 <= ema < 1")
        if self.learning_rate is not None and not 0 < self.learning_rate <= 10:
            raise InputError(f"--learning-rate {self.learning_rate} must be positive, and at most 10")
        check_share(self.max_broken)
        check_seed(self.seed)
        check_run_folder(self.out, self.resume)

    def sizes(self) -> dict[str, int]:
        """Those that are asked for, instead of the preset's."""
        return {name: getattr(self, name) for name in SIZES if getattr(self, name) is not None}

    def fixing_the_result(self) -> dict[str, Any]:
        """What a resumed run must share with the run it continues."""
        fields = dataclasses.asdict(self)
        for name in ("out", "resume", "save_every", "fsdp", "distributed", "max_broken", "workers"):
            del fields[name]
        paths = {name: fields[name] and str(fields[name]) for name in ("init", "decoder", "composites")}
        return fields | paths | {"images": list(self.images), "val": list(self.val)}


def main(options: Options) -> dict[str, Any]:
    """Trains, and writes the model folder, as `reference_run.py` describes it.

    Returns:
      The validation of the model that is kept, and its step.

    Raises:
      InputError: bad options or files; nothing has been written then.
      RunError, OSError: a fault while running; the folder can be resumed.
    """
    options.check()
    if options.distributed:
        from slimsam_jax.sharding import join_processes

        join_processes(options.distributed)
    from experiments.reference_run import run  # here, so that --help need not wait for JAX

    return run(options)


if __name__ == "__main__":
    cli.run(Options, main)
