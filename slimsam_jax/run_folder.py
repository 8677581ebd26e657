"""The folder of a compression run: its log, its results, and what is needed to resume it.

Finished files appear by renaming, so that a file of a final name is a whole one. Work in
progress lives in `checkpoints/`, per stage: `pruned/` (the model that distillation starts
from), `steps/` (orbax), `distilled/` (the stage is done).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from slimsam_jax import checkpoint
from slimsam_jax.data import Batches
from slimsam_jax.distill import TrainState
from slimsam_jax.errors import InputError, RunError, blaming, writing
from slimsam_jax.models.sam import Sam


class RunFolder:
    """One `--out`.

    Raises:
      InputError: there is no run to resume, or its origin (teacher, images, options, versions) was another.
    """

    def __init__(self, path: Path, origin: dict[str, Any], resume: bool = False):
        self.path, self.work = path, path / "checkpoints"
        recorded = self.work / "origin.json"
        if resume and not recorded.exists():
            raise InputError(f"{path} holds no unfinished run to resume")
        if resume:
            with blaming(recorded):
                _check_same(json.loads(recorded.read_text()), origin, path)
            return
        created = not path.exists()
        try:
            self.work.mkdir(parents=True)
            checkpoint.write_json(recorded, origin)
        except OSError:
            if created:
                shutil.rmtree(path, ignore_errors=True)
            raise

    def log(self, **entry: Any) -> None:
        """Appends a line to `log.jsonl`."""
        with (self.path / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        path = self.path / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]  # a killed run may leave half a line

    def rewind_log(self, stage: str, step: int) -> None:
        """Drops the lines of a stage's steps after `step`: a resumed run writes them again."""
        kept = [e for e in self.read_log() if not (e.get("stage") == stage and e.get("step", 0) > step)]
        with checkpoint.replacing(self.path / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))

    def save_model(self, stage: str, part: str, sam: Sam) -> None:
        checkpoint.save(sam, self.work / stage / part)

    def load_model(self, stage: str, part: str) -> Sam | None:
        """The model of a stage, or None if the run has not come that far."""
        folder = self.work / stage / part
        return checkpoint.load(folder) if (folder / "config.json").exists() else None

    def steps(self, stage: str) -> ocp.CheckpointManager:
        """Checkpoints within a stage; the last two are kept."""
        # Not in the background: a full disk is then met here, and not in a thread of orbax's.
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, enable_async_checkpointing=False)
        return ocp.CheckpointManager((self.work / stage / "steps").absolute(), options=options)

    def save_step(self, manager: ocp.CheckpointManager, step: int, state: TrainState, batches: Batches) -> None:
        """Saves; the state of the data stream goes with the parameters."""
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(batches.get_state()))
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.path).free
        if free < needed:  # orbax would fail in many threads, each with a traceback of its own
            raise RunError(
                f"cannot write the checkpoint of step {step}: it takes {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB "
                f"are free at {self.path}; make room, then continue with --resume"
            )
        try:
            with writing(f"the checkpoint of step {step}"):
                manager.save(step, args=items)
        except RunError:
            for unfinished in Path(manager.directory).glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def restore_step(self, manager: ocp.CheckpointManager, state: TrainState, batches: Batches) -> TrainState:
        """The last saved state, the data stream set to it; `state` itself if there is none."""
        step = manager.latest_step()
        if step is None:
            return state
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        restored = manager.restore(step, args=items)
        batches.set_state(restored.data)
        return restored.state

    def finish(self) -> None:
        """Removes what only a resumption needs."""
        shutil.rmtree(self.work)


def _check_same(recorded: dict[str, Any], origin: dict[str, Any], path: Path) -> None:
    before, now = (flatten_dict(json.loads(json.dumps(tree)), sep=" ") for tree in (recorded, origin))
    different = [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in now if before.get(key) != now[key]]
    if different:
        raise InputError(f"{path} was started otherwise ({'; '.join(different)}); resume with what it was started with")
