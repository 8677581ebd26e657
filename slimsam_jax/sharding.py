"""Spreads arrays over devices and processes: the mesh, where arrays lie, and what processes exchange."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from slimsam_jax.errors import InputError


def join_processes(how: str) -> None:
    """Makes this process one of several that JAX runs as one: "auto", or HOST:PORT,PROCESSES,INDEX.

    Raises:
      InputError: neither; or there is no cluster, or its other processes do not answer.
    """
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


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of [devices / fsdp, fsdp] with the axes "data" and "fsdp", of all devices if none are given.

    Raises:
      ValueError: fsdp does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
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


def _put(tree: Tree, places: Tree) -> Tree:
    if jax.process_count() > 1:  # an array of one process's devices cannot be moved to all
        tree = jax.device_get(tree)
    return jax.tree.map(jax.device_put, tree, places)


def constrain(tree: Tree, mesh: Mesh) -> Tree:
    """Keeps a tree where `place` put it, inside `jit`."""
    return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def shard_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Puts this process's rows of a host batch onto its devices; the global batch has all processes' rows."""
    sharding = NamedSharding(mesh, PartitionSpec(EVERYWHERE))
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


def gather_json(value: Any) -> list[Any]:
    """Gathers a value of each process, anything that JSON takes, in every process and in their order."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = json.dumps(value).encode()
    longest = int(multihost_utils.process_allgather(np.array(len(text))).max())
    rows = multihost_utils.process_allgather(np.frombuffer(text.ljust(longest), np.uint8))
    return [json.loads(row.tobytes()) for row in rows]
