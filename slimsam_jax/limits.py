"""Limits numbers that somebody asks for, before anything is allocated or compiled for them.

The limits are far from what anybody needs and from what takes a machine's memory. Imports nothing that takes long.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

from slimsam_jax.errors import InputError, printable

COUNT = 10**9  # of anything that is counted and takes no memory
STEPS = 10**7  # of a training: its learning rates are an array
BATCH = 2**16  # images
PROMPT_POINTS = 1024  # of one prompt: each is a token of the decoder
IMAGE_SIDE = 2**16  # pixels; JPEG has as many


class Range(NamedTuple):
    """The range of a number, both ends included."""

    least: float
    most: float
    whole: bool = False


SEARCH = {  # fields of `SamAutomaticMaskGenerator`
    "points_per_side": Range(1, 256, True),
    "points_per_batch": Range(1, 1024, True),
    "pred_iou_thresh": Range(-COUNT, COUNT),  # a model may predict more than 1
    "stability_score_thresh": Range(0, 1),
    "stability_score_offset": Range(0, COUNT),
    "box_nms_thresh": Range(0, 1),
    "crop_n_layers": Range(0, 5, True),  # of which the last has 1024 crops
    "crop_nms_thresh": Range(0, 1),
    "crop_overlap_ratio": Range(0, 0.95),
    "crop_n_points_downscale_factor": Range(1, 256, True),
    "min_mask_region_area": Range(0, COUNT),
    "covered_thresh": Range(-COUNT, COUNT),
}


def check(name: str, value: Any, allowed: Range) -> None:
    """Raises InputError unless `value` is a number, whole if it must be, and within its range. NaN is in none."""
    kind = numbers.Integral if allowed.whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind):
        raise InputError(f"{name} {quoted(value)} is not a {'whole ' if allowed.whole else ''}number")
    if value < allowed.least:
        raise InputError(f"{name} {quoted(value)} must be at least {allowed.least:g}")
    if not value <= allowed.most:  # of NaN, too
        raise InputError(f"{name} {quoted(value)} must be a number from {allowed.least:g} to {allowed.most:g}")


def check_options(options: Any, allowed: Mapping[str, Range]) -> None:
    """Checks attributes as options of a command line; those that are None are not given."""
    for name, range_ in allowed.items():
        if (value := getattr(options, name)) is not None:
            check(f"--{name.replace('_', '-')}", value, range_)


def quoted(value: Any) -> str:
    """Formats a value as a message can quote it, whatever it is."""
    try:
        return printable(value if isinstance(value, numbers.Number) else repr(value), 60)
    except Exception:  # a number of more digits than Python prints, or a foreign __repr__
        return f"of type {type(value).__name__}"


WEIGHT_BITS = (8, 6, 4, 3)  # of a weight in integers


def check_weight_bits(bits: int, where: str = "") -> None:
    """Raises InputError if no integers of so many bits stand for weights; `where` begins its message."""
    if type(bits) is not int or bits not in WEIGHT_BITS:
        raise InputError(f"{where}weights of {bits!r:.20} bits: there are {', '.join(map(str, WEIGHT_BITS))}")


def check_weight_group(group: int) -> None:
    """Raises InputError if so many weights cannot share a scale."""
    if type(group) is not int or group < 0 or group & (group - 1) or group in (1, 2, 4, 8):
        raise InputError(f"groups of {group!r:.20} weights: give a power of two from 16, or 0 for whole channels")
