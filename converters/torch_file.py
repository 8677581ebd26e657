"""Reads PyTorch's zip `.pth` files without PyTorch, and without running anything they contain.

A `.pth` is a pickle beside raw arrays. The pickle is read as data (`torch_pickle`): the handful of names that a state
dict needs is known, every other becomes an inert stand-in. So even whole-module pickles, as SlimSAM publishes them, are
read. The arrays are views of the mapped file: none is read before its shape has been looked at.
"""

from __future__ import annotations

import functools
import io
import math
import mmap
import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from converters.torch_pickle import Inert, Maker, Ordered, Unpickler
from slimsam_jax.errors import InputError, printable, reading
from slimsam_jax.files import open_regular

_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# SAM-H's, with those of its optimizer and an average of its weights: 0.34 MB, 0.15 MB, 2400 tensors.
# A training's state may hold a list of its losses besides, nine bytes each.
PICKLE_LIMIT, DIRECTORY_LIMIT = 4_000_000, 2_000_000
MOST_TENSORS = 20_000
LONGEST_NAME = 500
NOTE = "slimsam_jax"  # where `to_torch` notes what shapes do not tell, in a state dict's `_metadata`
SPARE = 64 << 20  # bytes that a file may have besides 16 times its tensors; an optimizer in float32 is 6 times float16


def read(path: Path | str) -> dict[str, np.ndarray]:
    """Reads the arrays of a `.pth`, see `read_with_note`."""
    return read_with_note(path)[0]


def read_with_note(path: Path | str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a `.pth` into {name: array}, mapped and read-only, in the dtypes of the file.

    Args:
      path: a state dict, one under the key "model" or "state_dict", or a pickled module.

    Returns:
      the arrays, and what `to_torch` noted beside them that no shape tells, unchecked: {} in a file of others.

    Raises:
      InputError: the file is none of these.
    """
    with open_regular(path) as file, reading(path):
        archive = _Archive(file, path)
        if archive.root is None:
            raise InputError(f"{path} is not a readable PyTorch checkpoint: the archive holds no data.pkl")
        state, note = _state_dict(_Tensors(archive).load())
    size, whole = sum(array.nbytes for array in state.values()), len(archive.content)
    if state and not size / 2 <= whole <= 16 * size + SPARE:
        raise InputError(f"{path} has {whole} bytes and tensors of {size}: it is damaged, or mostly something else")
    if not state:
        raise InputError(f"{path} holds neither a state dict nor a module")
    if any(name.endswith(".w_interval") for name in state):
        raise InputError(
            f"{path} is a TinySAM whose layers round floats as they run, in blocks and two ranges that no integers "
            "have, in places that its code alone knows: load tinysam_42.3.pth and quantise that (slimsam quantize)"
        )
    return state, note


def check_sums(path: Path | str) -> None:
    """Reads all the arrays of a `.pth` once, and compares them with the archive's check sums.

    Raises:
      InputError: the file is damaged.
    """
    with open_regular(path) as file, reading(path):
        archive = _Archive(file, path)
        for name in archive.members:
            if name.startswith(f"{archive.root}data/"):
                start, size = archive.span(name)
                file.seek(start)
                parts = (file.read(min(size - at, 1 << 20)) for at in range(0, size, 1 << 20))
                if functools.reduce(lambda sum, part: zlib.crc32(part, sum), parts, 0) != archive.members[name].CRC:
                    raise InputError(f"{path} is damaged: {printable(name)} has another check sum")


class _Directory:
    """A file whose zip directory is read by `zipfile`, which takes as many bytes as the file asks it to."""

    def __init__(self, file: BinaryIO):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if size > DIRECTORY_LIMIT:
            raise zipfile.BadZipFile("it lists more than a checkpoint can hold")
        return self.file.read(DIRECTORY_LIMIT if size < 0 else size)


class _Archive:
    """A zip file whose members lie in it as they are, as torch writes them.

    Attributes:
      content: the whole file, mapped.
      members: by name.
      root: what stands before "data.pkl" and "data/0"; None if there is no data.pkl.
    """

    def __init__(self, file: BinaryIO, path: Path | str):
        if not zipfile.is_zipfile(_Directory(file)):
            raise InputError(
                f"{path} is not a PyTorch zip checkpoint, or a damaged one (a file from before PyTorch 1.6 must be "
                "saved anew: torch.save(torch.load(old), new))"
            )
        self.members = {member.filename: member for member in zipfile.ZipFile(_Directory(file)).infolist()}
        self.content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        pickles = (name for name in self.members if name.rpartition("/")[2] == "data.pkl")
        self.root = next((name.removesuffix("data.pkl") for name in pickles), None)

    def span(self, name: str) -> tuple[int, int]:
        """Returns where a member begins and how long it is, in bytes."""
        member = self.members[name]
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise zipfile.BadZipFile(
                f"{name} is packed or encrypted; torch.save(torch.load(old), new) writes it plainly"
            )
        header = self.content[member.header_offset : member.header_offset + 30]
        signature, *lengths = struct.unpack("<4s22x2H", header.ljust(30))
        start = member.header_offset + 30 + sum(lengths)
        if signature != b"PK\3\4" or start + member.file_size > len(self.content):
            raise zipfile.BadZipFile(f"{name} is not where the directory says")
        return start, member.file_size


class _Tensors(Unpickler):
    """Reads an archive's pickle, with an array for every tensor."""

    def __init__(self, archive: _Archive):
        start, size = archive.span(f"{archive.root}data.pkl")
        if size > PICKLE_LIMIT:
            raise pickle.UnpicklingError(
                f"data.pkl has {size} bytes, and at most {PICKLE_LIMIT} are read; save the state dict by itself"
            )
        names = {("torch._utils", f"_rebuild_tensor{version}"): Maker(self._tensor) for version in ("", "_v2")}
        for version in ("", "_with_state"):
            names["torch._utils", f"_rebuild_parameter{version}"] = Maker(lambda arguments: arguments[0])
        names["collections", "OrderedDict"] = Maker(lambda arguments: Ordered())  # filled by what follows
        names["torch", "Size"] = Maker(_size)
        for module in ("torch", "torch.storage"):
            names |= {(module, name): np.dtype(kind) for name, kind in _STORAGES.items()}
        super().__init__(io.BytesIO(archive.content[start : start + size]), names, self._storage)
        self.archive, self.tensors = archive, 0

    def _storage(self, pid: Any) -> np.ndarray:
        kind, dtype, key, *_ = pid if type(pid) is tuple and len(pid) > 2 else (None,) * 3
        if type(kind) is not str or kind != "storage" or not isinstance(dtype, np.dtype) or type(key) is not str:
            raise pickle.UnpicklingError("it holds a storage of a kind that we do not know")
        start, size = self.archive.span(f"{self.archive.root}data/{key}")
        return np.ndarray(size // dtype.itemsize, dtype, self.archive.content, start)

    def _tensor(self, arguments: tuple) -> np.ndarray:
        self.tensors += 1
        if self.tensors > MOST_TENSORS:
            raise pickle.UnpicklingError(f"it holds more than {MOST_TENSORS} tensors")
        if len(arguments) < 4:
            raise pickle.UnpicklingError("a tensor without storage, offset, sizes and strides")
        return rebuild_tensor(*arguments[:4])


def _size(arguments: tuple) -> tuple:
    sizes = arguments[0] if arguments else ()
    if len(sizes) > 64:
        raise pickle.UnpicklingError("a tensor with more axes than PyTorch has")
    return tuple(sizes)


def rebuild_tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple) -> np.ndarray:
    """Makes a view of a storage.

    Raises:
      UnpicklingError: it reaches beyond the storage, has more values, or its numbers are no whole numbers. A 0-d array
        of a narrow type would wrap around in the very sums that keep it in bounds.
    """
    if not isinstance(storage, np.ndarray) or storage.ndim != 1:
        raise pickle.UnpicklingError("a tensor without a storage")
    if type(size) is not tuple or type(stride) is not tuple or not len(size) == len(stride) <= 64:
        raise pickle.UnpicklingError("a tensor without sizes and strides")
    if any(type(number) is not int or not 0 <= number < 1 << 63 for number in (offset, *size, *stride)):
        raise pickle.UnpicklingError("a tensor whose sizes, strides or offset reach beyond any storage")
    count = math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if count else offset - 1
    # NumPy's own limit counts the axes beside an empty one.
    if last >= len(storage) or count > len(storage) or math.prod(n or 1 for n in size) >= 1 << 48:
        raise pickle.UnpicklingError("a tensor reaches beyond its storage, or repeats it")
    steps = [s * storage.itemsize for s in stride] if count else None
    return np.ndarray(size, storage.dtype, storage, offset * storage.itemsize if count else 0, steps)


def _state_dict(content: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns {name: array} and the note of a state dict or module, which may lie under "model" or "state_dict"."""
    for _ in range(4):
        if not isinstance(content, dict):
            break
        inner = [content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict | Inert)]
        if not inner:
            arrays = {name: array for name, array in content.items() if isinstance(array, np.ndarray)}
            return arrays, _note(content)
        content = inner[0]
    return (_flatten(content) if isinstance(content, Inert) else {}), {}


def _note(state: dict[str, Any]) -> dict[str, Any]:
    note = getattr(state, "state", None)
    for key in ("_metadata", NOTE):
        note = note.get(key) if isinstance(note, dict) else None
    return note if isinstance(note, dict) else {}


def _flatten(module: Inert) -> dict[str, np.ndarray]:
    """Collects the state dict of a pickled `nn.Module`, from parameters, buffers and children, each visited once."""
    state, seen, waiting, visits = {}, {id(module)}, [("", module)], 0
    while waiting:
        prefix, module = waiting.pop()
        fields = module.state if isinstance(module.state, dict) else {}
        kinds = [fields.get(kind) for kind in ("_parameters", "_buffers", "_modules")]
        for name, part in [pair for kind in kinds if isinstance(kind, dict) for pair in kind.items()]:
            visits += 1
            if visits > 10 * MOST_TENSORS or len(prefix) + len(name) > LONGEST_NAME:
                raise pickle.UnpicklingError("a module with too many parts, or too long names")
            if isinstance(part, np.ndarray):
                state[prefix + name] = part
            elif isinstance(part, Inert) and id(part) not in seen:
                seen.add(id(part))
                waiting.append((f"{prefix}{name}.", part))
    return state


def unwrapped(state: dict[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """A state dict with names as they are without `DataParallel`'s "module."."""
    renamed = {re.sub(r"(^|\.)module\.", r"\1", name): array for name, array in state.items()}
    if len(renamed) < len(state):
        raise InputError(f"{where} holds arrays that differ in name by 'module.' alone")
    return renamed
