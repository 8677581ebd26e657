"""COCO's compressed run-length encoding of masks, which SA-1B annotations use. Vectorised numpy."""

from __future__ import annotations

from typing import Any

import numpy as np


def decode(rle: dict[str, Any]) -> np.ndarray:
    """Decodes a mask.

    Args:
      rle: {"size": [h, w], "counts": compressed string or list of run lengths}; runs
        alternate between 0 and 1 down the columns, starting with 0.

    Returns:
      [h, w] bool.

    Raises:
      ValueError: the runs do not cover the size.
    """
    height, width = rle["size"]
    counts = rle["counts"]
    runs = np.asarray(counts, np.int64) if isinstance(counts, list) else _run_lengths(counts)
    if runs.sum() != height * width or (runs < 0).any():
        raise ValueError(f"run lengths cover {runs.sum()} pixels of {height} x {width}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _run_lengths(counts: str | bytes) -> np.ndarray:
    """Undoes COCO's packing: 5 bits a character, sign-extended, differences to the run before last."""
    codes = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    if len(codes) == 0 or codes[-1] & 0x20:
        raise ValueError("run-length string is empty or cut short")
    ends = np.flatnonzero((codes & 0x20) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    shift = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    values = np.add.reduceat((codes & 0x1F) << shift, starts)
    values = np.where(codes[ends] & 0x10, values - (1 << (5 * lengths)), values)
    # From the third run on, even and odd runs are differences within their own kind.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def encode(mask: np.ndarray) -> dict[str, Any]:
    """[h, w] bool -> {"size": [h, w], "counts": compressed string}, character by character as pycocotools does."""
    return {"size": list(mask.shape), "counts": _pack(_runs(mask))}


def encode_uncompressed(mask: np.ndarray) -> dict[str, Any]:
    """[h, w] bool -> {"size": [h, w], "counts": list of run lengths}."""
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
