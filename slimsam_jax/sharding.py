"""Spreads arrays over devices and processes: the mesh, where arrays lie, and what processes exchange."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from slimsam_jax.errors import InputError


def join_processes(how: str, preemption: bool = True) -> None:
    """Makes this process one of several that JAX runs as one: "auto", or HOST:PORT,PROCESSES,INDEX.

    Args:
      preemption: whether JAX takes SIGTERM from here on, for trainings, which ask it between their steps whether all
        shall stop. A program without a training would not end by the signal.

    Raises:
      InputError: neither; or there is no cluster, or its other processes do not answer.
    """
    jax.config.update("jax_enable_preemption_service", preemption)
    # When one stops by a fault of its own, the others wait for it in vain; so long, instead of five minutes.
    patience = {"shutdown_timeout_seconds": 30}
    try:
        if how == "auto":
            jax.distributed.initialize(**patience)
            return
        match = re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:.]+\]):([0-9]{1,5}),([0-9]{1,6}),([0-9]{1,6})", how, re.ASCII)
        if not match or not 0 < int(match[2]) < 2**16 or not int(match[4]) < int(match[3]):
            raise ValueError("not HOST:PORT,PROCESSES,INDEX")
        jax.distributed.initialize(f"{match[1]}:{match[2]}", int(match[3]), int(match[4]), **patience)
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["no cluster found"])[0]
        raise InputError(f"--distributed {how}: {reason}; give auto, or HOST:PORT,PROCESSES,INDEX") from None


Tree = Any
EVERYWHERE = ("data", "fsdp")
SPLIT_FROM = 2**12  # elements: below that a collective costs more than the memory saved
_target: tuple[jax.Device, ...] | None = None


@contextlib.contextmanager
def targeting(targets: Sequence[jax.Device]) -> Iterator[None]:
    """Makes programs for these devices, which need not be here (`slimsam_jax.plan`), instead of for all of JAX's."""
    global _target
    before, kind = _target, (platform(), device_count())
    _target = tuple(targets)
    # What was traced is kept by shapes, and knows nothing of the devices that it was traced for.
    forget = jax.clear_caches if kind != (platform(), device_count()) else lambda: None
    forget()
    try:
        yield
    finally:
        _target = before
        forget()


def devices() -> Sequence[jax.Device]:
    """Returns the devices that programs are made for: all of JAX's, of all processes, but within `targeting`."""
    return jax.devices() if _target is None else _target


def device_count() -> int:
    return jax.device_count() if _target is None else len(_target)


def platform() -> str:
    """Returns what kind the devices are that programs are made for: "cpu", "gpu" or "tpu"."""
    if _target is None:
        return jax.default_backend()
    return {"cuda": "gpu", "rocm": "gpu"}.get(_target[0].platform, _target[0].platform)


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of [devices / fsdp, fsdp] with the axes "data" and "fsdp", of all devices if none are given.

    Raises:
      ValueError: fsdp does not divide the number of devices.
    """
    if devices is None:
        devices = _target or jax.devices()
    count = len(devices)
    if count % fsdp:
        raise ValueError(f"{count} devices cannot be split in groups of {fsdp}")
    # Auto axes: make_mesh's default since jax 0.10 is Explicit, which asks more of every operation.
    return jax.make_mesh((count // fsdp, fsdp), EVERYWHERE, axis_types=(AxisType.Auto,) * 2, devices=devices)


def partition(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Splits the longest axis that `fsdp` divides; none of a small array, or after an odd pruning."""
    divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not divisible or np.prod(shape) < SPLIT_FROM:
        return PartitionSpec()
    longest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*("fsdp" if axis == longest else None for axis in range(len(shape))))


def shardings(tree: Tree, mesh: Mesh) -> Tree:
    """Returns the shardings of parameters, optimiser states and the like; leaves need a shape only."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, partition(leaf.shape, mesh.shape["fsdp"])), tree)


def place(tree: Tree, mesh: Mesh) -> Tree:
    """Puts parameters and the like onto the mesh; every process gives the same values."""
    return _put(tree, shardings(tree, mesh))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Puts the same values onto every device; every process gives them."""
    return _put(tree, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree))


def is_abstract(tree: Tree) -> bool:
    """Tells whether any leaf is a shape (`jax.ShapeDtypeStruct`), as all are of what is planned and never computed."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def computed(function: Callable[..., Tree], *args: Tree) -> Tree:
    """Calls a jitted function; of shapes it gives shapes."""
    return jax.eval_shape(function, *args) if is_abstract(args) else function(*args)


def cast(tree: Tree, dtype: Any) -> Tree:
    """Returns the tree in another dtype, of shapes as shapes."""
    if is_abstract(tree):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def _put(tree: Tree, places: Tree) -> Tree:
    if is_abstract(tree):
        placed = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        return jax.tree.map(placed, tree, places)
    if jax.process_count() > 1:  # an array of one process's devices cannot be moved to all
        tree = jax.device_get(tree)
    return jax.tree.map(jax.device_put, tree, places)


def constrain(tree: Tree, mesh: Mesh) -> Tree:
    """Keeps a tree where `place` put it, inside `jit`."""
    return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def shard_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Puts this process's rows of a host batch onto its devices; the global batch has all processes' rows.

    Of shapes it is the global batch's that are given.
    """
    sharding = NamedSharding(mesh, PartitionSpec(EVERYWHERE))
    if is_abstract(batch):
        return _put(batch, jax.tree.map(lambda _: sharding, batch))
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def gather(tree: Tree) -> Tree:
    """Gathers whole arrays as numpy, in every process; a collective where they are split over processes."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def is_main() -> bool:
    """Tells whether this process is the one that writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agree(value: float) -> float:
    """Returns the main process's value, in every process."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return float(multihost_utils.broadcast_one_to_all(np.float64(value)))


def all_agree(flag: bool) -> bool:
    """Tells whether a flag is true in every process."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(flag)).all())


PIECE = 2**24  # bytes of a process that are gathered at a time: all of them pass through the devices


def gather_json(value: Any) -> list[Any]:
    """Gathers a value of each process, anything that JSON takes, in every process and in their order."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = json.dumps(value).encode()
    lengths = multihost_utils.process_allgather(np.array(divmod(len(text), PIECE), np.int32))  # 64 bits would be cut
    longest = max(int(pieces) * PIECE + int(rest) for pieces, rest in lengths)
    texts = [b""] * jax.process_count()
    for start in range(0, longest, PIECE):
        piece = text[start : start + PIECE].ljust(min(PIECE, longest - start))
        rows = multihost_utils.process_allgather(np.frombuffer(piece, np.uint8))
        texts = [before + row.tobytes() for before, row in zip(texts, rows, strict=True)]
    return list(map(json.loads, texts))
