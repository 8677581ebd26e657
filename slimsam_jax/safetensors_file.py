"""Maps the arrays of a model folder: which files hold them, and what is in a `.safetensors`, without reading it.

A file is mapped into memory, and the arrays are views of the map. So the header alone costs something, and whoever
compares shapes first refuses a file of any size before a single value is read.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from slimsam_jax.errors import InputError, printable, reading
from slimsam_jax.files import open_regular, read_json

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "C64": np.complex64,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
HEADER_LIMIT = 1 << 20  # SAM-H's has 60 kB
MOST_SHARDS = 100


def files_of(folder: Path) -> list[Path]:
    """Lists the files of a folder that the loaders read: `model.safetensors` or `pytorch_model.bin`, or its shards.

    Raises:
      InputError: the index of the shards cannot be read, or names what is no file of this folder.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if shards := _shards(folder / f"{name}.index.json"):
            return [folder / shard for shard in shards]
        if os.path.lexists(folder / name):
            return [folder / name]
    return []


def _shards(index: Path) -> list[str]:
    """Names of the files that an index names; none where there is no index."""
    if not os.path.lexists(index):
        return []
    with reading(index):
        shards = sorted(set(read_json(index)["weight_map"].values()))
        if len(shards) > MOST_SHARDS or any(Path(shard).name != shard for shard in shards):
            raise InputError(f"{index} must name at most {MOST_SHARDS} files, all beside it")
    return shards


def read(path: Path | str) -> dict[str, np.ndarray]:
    """Maps a `.safetensors` file as {name: array}, read-only, in the dtypes of the file.

    Raises:
      InputError: it is none, or a damaged one.
    """
    with open_regular(path) as file, reading(path):
        start, fields = _header(file, path)
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays = {name: _array(content, start, field) for name, field in fields.items()}
    if sum(array.nbytes for array in arrays.values()) != len(content) - start:
        raise InputError(f"{path} is damaged: its header speaks of other sizes than the file has")
    return arrays


def _header(file: BinaryIO, path: Path | str) -> tuple[int, dict[str, Any]]:
    """Reads the header: where the arrays begin, in bytes, and {name: {"dtype", "shape", "data_offsets"}}."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, HEADER_LIMIT):
        raise InputError(f"{path} cannot be read: it is no safetensors file, or one that was cut off")
    fields = json.loads(file.read(length))
    fields.pop("__metadata__", None)
    return 8 + length, fields


def _array(content: mmap.mmap, start: int, field: dict[str, Any]) -> np.ndarray:
    shape, (begin, end) = field["shape"], field["data_offsets"]
    if field["dtype"] not in DTYPES:
        raise ValueError(f"arrays of {printable(field['dtype'], 20)}")
    dtype = np.dtype(DTYPES[field["dtype"]])
    if len(shape) > 64 or any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
        raise ValueError("an array whose sizes and offsets are no whole numbers, or too many")
    if end - begin != math.prod(shape) * dtype.itemsize or start + end > len(content):
        raise ValueError("an array that is not as long as its shape, or reaches beyond the file")
    return np.ndarray(shape, dtype, content, start + begin)
