"""Reads PyTorch's zip `.pth` files without PyTorch, and without running anything they contain.

A `.pth` is a pickle beside raw arrays. The unpickler below knows the handful of names a
state dict needs; every other global becomes an inert stand-in that keeps its arguments
and runs nothing. So even whole-module pickles, as SlimSAM publishes them, are read as data.
"""

from __future__ import annotations

import collections
import functools
import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from slimsam_jax.errors import InputError, blaming

_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def read(path: Path | str) -> dict[str, np.ndarray]:
    """Reads a `.pth` into {name: array}, in the dtypes of the file.

    Args:
      path: a state dict, one under the key "model" or "state_dict", or a pickled module.

    Raises:
      InputError: the file is none of these.
    """
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{path} is not a PyTorch zip checkpoint, or a damaged one (a file from before PyTorch 1.6 must be saved "
            "anew: torch.save(torch.load(old), new))"
        )
    with blaming(path), zipfile.ZipFile(path) as archive:
        if not any(name.rpartition("/")[2] == "data.pkl" for name in archive.namelist()):
            raise InputError(f"{path} is not a readable PyTorch checkpoint: the archive holds no data.pkl")
        content = _Unpickler(archive).load()
    state = _flatten(content) if isinstance(content, _Inert) else _unwrap(content)
    if not state:
        raise InputError(f"{path} holds neither a state dict nor a module")
    return state


class _Inert:
    """Stands in for any class or function that a pickle names."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile):
        name = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
        super().__init__(io.BytesIO(archive.read(name)))
        self.archive, self.root = archive, name.removesuffix("data.pkl")
        self.storage = functools.cache(self._storage)

    def find_class(self, module: str, name: str) -> Any:
        """The allow-list. Nothing outside it is imported, let alone called."""
        allowed = {
            ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda array, *_: array,
            ("torch._utils", "_rebuild_parameter_with_state"): lambda array, *_: array,
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch", "Size"): tuple,
            ("builtins", "set"): set,
            ("__builtin__", "set"): set,
        }
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return name
        return allowed.get((module, name)) or type(name, (_Inert,), {})

    def persistent_load(self, pid: tuple) -> np.ndarray:
        kind, storage, key, *_ = pid
        if kind != "storage" or storage not in _STORAGES:
            raise pickle.UnpicklingError(f"unknown storage {storage!r}")
        return self.storage(storage, str(key))

    def _storage(self, kind: str, key: str) -> np.ndarray:
        return np.frombuffer(self.archive.read(f"{self.root}data/{key}"), _STORAGES[kind])


def _rebuild_tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
    if not isinstance(storage, np.ndarray) or storage.ndim != 1:
        raise pickle.UnpicklingError("a tensor without a storage")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if math.prod(size) else offset
    if min((offset, *size, *stride)) < 0 or last > len(storage) or (math.prod(size) and last == len(storage)):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    steps = [s * storage.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps).copy()


def _flatten(module: _Inert, prefix: str = "") -> dict[str, np.ndarray]:
    """The state dict of a pickled `nn.Module`, from its parameters, buffers and children."""
    fields = vars(module)
    own = {**fields.get("_parameters", {}), **fields.get("_buffers", {})}
    state = {prefix + name: array for name, array in own.items() if isinstance(array, np.ndarray)}
    for name, child in fields.get("_modules", {}).items():
        if isinstance(child, _Inert):
            state |= _flatten(child, f"{prefix}{name}.")
    return state


def _unwrap(content: Any) -> dict[str, np.ndarray]:
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict | _Inert):
            inner = content[key]
            return _flatten(inner) if isinstance(inner, _Inert) else _unwrap(inner)
    if not isinstance(content, dict):
        return {}
    return {str(name): array for name, array in content.items() if isinstance(array, np.ndarray)}
