"""Saves and restores checkpoints of a training: written in the background, whole or not at all, checked when read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from slimsam_jax import sharding
from slimsam_jax.distillation.step import TrainState
from slimsam_jax.errors import RunError


class Steps:
    """The last two states of a training, in orbax's format; a context manager, which waits for the last write."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self.folder, self.damaged = folder, []

    def save(self, step: int, state: TrainState, notes: Any = None) -> None:
        """Begins to write; the state may be changed or donated as soon as this returns.

        Args:
          notes: anything that JSON takes, to come back with the state.

        Raises:
          RunError: there is no room, or the checkpoint before could not be written.
        """
        self._wait()
        self._check_room(step, state)
        beside = ocp.args.JsonSave({"sums": _checksums(state), "notes": notes})
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), beside=beside)
        while self.damaged:  # only now that there is something better
            self.manager.delete(self.damaged.pop())
        try:
            self.manager.save(step, args=items)
        except Exception as error:
            raise self._failed(step, error) from None

    def check_finite(self, step: int, state: TrainState) -> None:
        """Raises RunError unless the state is finite: what is saved can be gone on with."""
        if not _finite(state):
            raise RunError(f"the state after step {step} is not finite; the checkpoint before it is kept")

    def _check_room(self, step: int, state: TrainState) -> None:
        """Raises RunError if the disk is too full; orbax would fail in many threads, each with its own traceback."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if not sharding.all_agree(free >= needed):  # another process may have seen more room
            raise RunError(
                f"cannot write the checkpoint of step {step}: it takes {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB "
                f"are free at {self.folder}; make room, then continue with --resume"
            )

    def _wait(self) -> None:
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise self._failed(self.manager.latest_step(), error) from None

    def _failed(self, step: int | None, error: Exception) -> RunError:
        for unfinished in self.folder.glob("*.orbax-checkpoint-tmp"):
            shutil.rmtree(unfinished, ignore_errors=True)
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or ["unknown error"])[0]
        return RunError(f"cannot write the checkpoint of step {step}: {reason}")

    def restore(self, like: TrainState) -> tuple[TrainState, Any] | None:
        """Restores the last undamaged state and its notes; None if nothing was ever saved.

        Args:
          like: shapes and shardings. Not arrays, which would take the memory a second time.

        Raises:
          RunError: no checkpoint can be read. Nothing is removed then.
        """
        for step in sorted(self.manager.all_steps(), reverse=True):
            restored, reason = self._read(step, like)
            if restored:
                return restored
            self.damaged.append(step)
            if sharding.is_main():
                print(f"the checkpoint of step {step} is damaged ({reason}); going back to the one before", flush=True)
        if self.damaged:
            raise RunError(f"no checkpoint in {self.folder} can be read ({reason}); remove it to start this step anew")
        return None

    def _read(self, step: int, like: TrainState) -> tuple[tuple[TrainState, Any] | None, str]:
        """Reads a state with its notes, or None, and why not; the same in all processes."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(like), beside=ocp.args.JsonRestore())
        restored, reason = None, "another process cannot read it"
        try:
            restored = self.manager.restore(step, args=items)
        except Exception as error:  # a damaged file can fail in any way
            reason = (str(error).splitlines() or ["unreadable"])[0][:120]
        if not sharding.all_agree(restored is not None):
            return None, reason
        if _checksums(restored.state) != restored.beside["sums"]:
            return None, "its numbers are not those that were saved"
        return (restored.state, restored.beside["notes"]), ""

    def asked_to_stop(self, step: int) -> bool:
        """Tells whether one of several processes is being taken away; the same answer in all of them."""
        return jax.process_count() > 1 and self.manager.reached_preemption(step)

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        try:
            self._wait()
        except RunError:
            if kind is None:  # else the first fault is the one to report
                raise
        finally:
            self.manager.close()


def _checksums(tree: Any) -> list[int]:
    """Computes a checksum per array; orbax notices missing bytes, but not altered ones."""
    leaves = jax.tree.leaves(tree)
    if _on_host():
        return [int(_checksum(np.asarray(leaf), np)) for leaf in leaves]
    return [int(checksum) for checksum in _all_checksums(leaves)]


def _on_host() -> bool:
    """Tells whether arrays lie in this process's memory: numpy then reads them in place, and nothing is compiled."""
    return sharding.platform() == "cpu" and jax.process_count() == 1


@jax.jit
def _all_checksums(leaves: list[jax.Array]) -> list[jax.Array]:
    # One program: compiling one for each shape takes longer, and the collectives of several that run at once lock each
    # other out on CPUs.
    return [_checksum(leaf, jnp) for leaf in leaves]


def _checksum(leaf: Any, xp: Any) -> Any:
    """Sums up a 32-bit array; changes with any bit and with the order of elements. The same by numpy and by JAX."""
    bits = leaf.view(xp.uint32).reshape(-1)
    mixed = bits ^ (xp.arange(bits.size, dtype=xp.uint32) * xp.uint32(0x9E3779B9))  # the place counts, too
    mixed = (mixed ^ (mixed >> 16)) * xp.uint32(0x7FEB352D)
    return xp.sum(mixed ^ (mixed >> 15), dtype=xp.uint32)


def shapes_of(state: TrainState) -> TrainState:
    """Returns the shapes and shardings of a state, as `Steps.restore` needs them."""
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, state)


def _finite(state: TrainState) -> bool:
    leaves = jax.tree.leaves(state)
    return all(np.isfinite(leaf).all() for leaf in leaves) if _on_host() else bool(_all_finite(leaves))


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.array([jnp.isfinite(leaf).all() for leaf in leaves]).all()
