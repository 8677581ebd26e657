"""COCO's compressed run-length encoding of masks, which SA-1B annotations use. Vectorised numpy."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

MOST_PIXELS = 2**27  # of a mask, and of an image: a phone has 108 million
LONGEST = 6  # characters of a run in COCO's packing: 30 bits, more than `MOST_PIXELS` and a sign need


def decode(rle: dict[str, Any], size: tuple[int, int] | None = None) -> np.ndarray:
    """Decodes a mask to [h, w] bool. Nothing of its size is allocated before its size and runs are checked.

    Args:
      rle: {"size": [h, w], "counts": compressed string or list of run lengths}; runs
        alternate between 0 and 1 down the columns, starting with 0.
      size: (height, width) that the mask must have.

    Returns:
      [h, w] bool.

    Raises:
      ValueError, KeyError, TypeError: it is of another size, of more than `MOST_PIXELS`, or its runs do not cover it.
    """
    runs = run_lengths(rle, size)
    height, width = rle["size"]
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(int(width), int(height)).T


def run_lengths(rle: dict[str, Any], size: tuple[int, int] | None = None) -> np.ndarray:
    """Returns the run lengths of a mask, [runs] int64: none is negative, and together they are its pixels.

    Raises:
      ValueError, KeyError, TypeError: as `decode`.
    """
    height, width = (operator.index(side) for side in rle["size"])
    if size is not None and (height, width) != tuple(size):
        raise ValueError(f"a mask of {width} x {height} pixels, the image has {size[1]} x {size[0]}")
    if min(height, width) < 0 or height * width > MOST_PIXELS:
        raise ValueError(f"a mask of {width} x {height} pixels, which no image has")
    pixels, counts = height * width, rle["counts"]
    runs = _checked(counts, pixels) if isinstance(counts, list) else _unpack(counts, pixels)
    covered = int(runs.sum())  # cannot wrap, as each is at most 2^27
    if covered != pixels:
        raise ValueError(f"run lengths cover {covered} pixels of {height} x {width}")
    return runs


def _checked(counts: list[Any], pixels: int) -> np.ndarray:
    if not all(type(run) is int and 0 <= run <= pixels for run in counts):
        raise ValueError(_impossible(pixels))
    return np.array(counts, np.int64)


def _impossible(pixels: int) -> str:
    return f"a run length that is no integer from 0 to {pixels}, the pixels of the mask"


def _unpack(counts: str | bytes, pixels: int) -> np.ndarray:
    """Undoes COCO's packing: 5 bits a character, sign-extended, differences to the run before last."""
    values = _differences(counts, pixels).astype(np.int64)
    if values.min() < -pixels or values.max() > pixels:  # no difference of two runs is larger than they are
        raise ValueError(_impossible(pixels))
    # From the third run on, even and odd runs are differences within their own kind.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    if values.min() < 0 or values.max() > pixels:
        raise ValueError(_impossible(pixels))
    return values


def _differences(counts: str | bytes, pixels: int) -> np.ndarray:
    """Unpacks the differences of runs, [runs] int32.

    A character stands for 48 to 48 + 63; the sixth bit says that the run goes on.
    """
    raw = counts.encode() if isinstance(counts, str) else counts
    if len(raw) > LONGEST * (pixels + 2):
        raise ValueError(f"a run-length string of {len(raw)} characters for {pixels} pixels")
    codes = np.frombuffer(raw, np.uint8) - np.uint8(48)  # what is below 48 wraps, and is too large then
    if len(codes) == 0 or codes.max() > 0x3F or codes[-1] & 0x20:
        raise ValueError("a run-length string that is empty, cut short or has other characters")
    ends = np.flatnonzero(codes < 0x20).astype(np.int32)
    lengths = np.diff(ends, prepend=np.int32(-1))
    if lengths.max() > LONGEST:  # shifts would wrap
        raise ValueError(f"a run length of {lengths.max()} characters")
    values = np.where(codes[ends] & 0x10, np.int32(-1) << 5 * lengths, np.int32(0))
    values |= codes[ends + 1 - lengths] & 0x1F
    for digit in range(1, lengths.max()):
        longer = np.flatnonzero(lengths > digit)
        values[longer] |= (codes[ends[longer] + 1 - lengths[longer] + digit] & 0x1F).astype(np.int32) << 5 * digit
    return values


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Encodes a mask [h, w] as {"size": [h, w], "counts": compressed string}, to the character as pycocotools does."""
    return {"size": list(mask.shape), "counts": _pack(_runs(mask))}


def encode_uncompressed(mask: np.ndarray) -> dict[str, Any]:
    """Encodes a mask [h, w] bool as {"size": [h, w], "counts": list of run lengths}."""
    return {"size": list(mask.shape), "counts": _runs(mask).tolist()}


def _runs(mask: np.ndarray) -> np.ndarray:
    flat = np.asarray(mask, bool).T.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    start = [0] if flat.size and flat[0] else []  # the first run is of zeros, be it empty
    return np.diff(np.concatenate([[0], start, changes, [flat.size]])).astype(np.int64)


def _pack(runs: np.ndarray) -> str:
    values = runs.copy()
    values[3:] -= runs[1:-2]
    shifted = values[:, None] >> (5 * np.arange(8))  # 35 bits hold any run, one digit more shows where it ends
    digits, rest = shifted[:, :-1] & 0x1F, shifted[:, 1:]
    goes_on = np.where(digits & 0x10, rest != -1, rest != 0)
    used = np.cumsum(~goes_on, axis=1) - ~goes_on == 0  # up to the first digit that does not
    return (digits + 0x20 * goes_on + 48)[used].astype(np.uint8).tobytes().decode()
