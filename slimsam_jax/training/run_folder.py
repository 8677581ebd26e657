"""Keeps the folder of a run: its log, its results, and what is needed to resume it.

Finished files appear by renaming, so that a file of a final name is a whole one. Work in
progress lives in `checkpoints/`, by the name of the step ("stage" in the log): `steps/` (orbax),
`best-STEP/`, `best/` and `last/` of a training, `model/` (the step is done).
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from slimsam_jax import checkpoint, sharding
from slimsam_jax.errors import InputError, reading
from slimsam_jax.files import replacing, write_json
from slimsam_jax.models.sam import Sam
from slimsam_jax.training.checkpoints import Steps
from slimsam_jax.training.folder_lock import PLACE, FolderLock

LATE = {"val"}  # parts of an origin that runs begun by older code have not recorded


class RunFolder:
    """One `--out`, locked until `release`; a context manager, which releases it.

    Raises:
      InputError: there is no run to resume, or its origin (teacher, images, options, versions) was another; or
        another run has the folder.
    """

    def __init__(self, path: Path, origin: dict[str, Any], resume: bool = False):
        self.path, self.work, self.lock = path, path / "checkpoints", None
        self.created = not path.exists()
        recorded = self.work / "origin.json"
        if resume and not recorded.exists():
            raise InputError(f"{path} holds no unfinished run to resume")
        try:
            self._acquire()
            if resume:
                with reading(recorded):
                    _check_same(json.loads(recorded.read_text()), origin, path)
            elif sharding.is_main():
                self._create(recorded, origin)
        except BaseException:
            self.release()
            raise
        sharding.barrier("run folder")

    def _acquire(self) -> None:
        """The main process takes the lock for all; if it is refused, all are."""
        refused = None
        if sharding.is_main():
            try:
                self.work.mkdir(parents=True, exist_ok=True)
                self.lock = FolderLock(self.path)
            except InputError as error:
                refused = str(error)
            except OSError:
                self._remove()
                raise
        if refused := sharding.gather_json(refused)[0]:
            raise InputError(refused)

    def _create(self, recorded: Path, origin: dict[str, Any]) -> None:
        # Since the folder was seen to be empty another run may have come, and gone.
        foreign = {*self.path.iterdir(), *self.work.iterdir()} - {self.work, self.path / PLACE}
        if foreign:
            raise InputError(f"{self.path} is not empty; choose another folder, or remove it first")
        try:
            write_json(recorded, origin)
        except OSError:
            self._remove()
            raise

    def _remove(self) -> None:
        """Removes what was made for a run that could not begin, and nothing else: folders that are empty then."""
        with contextlib.suppress(OSError):
            if self.lock:
                (self.path / PLACE).unlink()
            self.work.rmdir()
            if self.created:
                self.path.rmdir()

    def release(self) -> None:
        """Lets others have the folder."""
        if self.lock:
            self.lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def log(self, **entry: Any) -> None:
        """Appends a line to `log.jsonl`."""
        if not sharding.is_main():
            return
        with (self.path / "log.jsonl").open("a+b") as file:
            file.seek(max(0, file.tell() - 1))
            cut_short = file.read() not in (b"", b"\n")  # a killed run may leave half a line
            file.write(b"\n" * cut_short + json.dumps(entry).encode() + b"\n")

    def read_log(self) -> list[dict[str, Any]]:
        """Reads the entries of the log; lines that are none, as a killed machine leaves them, are passed by."""
        path = self.path / "log.jsonl"
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        return [entry for line in lines if (entry := _entry(line)) is not None]

    def rewind_log(self, stage: str, step: int) -> dict[int, float]:
        """Drops the lines of a training's steps after `step`, which a resumed run writes again.

        Returns:
          {step: score} of its validations until then.
        """
        kept = [e for e in self.read_log() if not (e.get("stage") == stage and e.get("step", math.inf) > step)]
        if sharding.is_main():
            with replacing(self.path / "log.jsonl") as temporary:
                temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        sharding.barrier("log read")
        return {e["step"]: e["score"] for e in kept if e.get("stage") == stage and "score" in e}

    def save_model(self, stage: str, part: str, sam: Sam) -> None:
        if sharding.is_main():
            checkpoint.save(sam, self.work / stage / part)
        sharding.barrier(f"{stage}/{part} saved")

    def load_model(self, stage: str, part: str) -> Sam | None:
        """Loads a part of a step, such as its "model"; None if the run has not come that far."""
        folder = self.work / stage / part
        return checkpoint.load(folder) if (folder / "config.json").exists() else None

    def remove_model(self, stage: str, part: str) -> None:
        if sharding.is_main():
            shutil.rmtree(self.work / stage / part, ignore_errors=True)

    def steps(self, stage: str) -> Steps:
        return Steps(self.work / stage / "steps")

    def finish(self) -> None:
        """Removes what only a resumption needs, all at once."""
        shutil.rmtree(self.work.rename(self.path / ".finished"))


def _entry(line: bytes) -> dict[str, Any] | None:
    """Parses a line of the log; None if it is not one of ours."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):  # of no UTF-8, too
        return None
    if not isinstance(entry, dict):
        return None
    numbers = (entry.get(name, 0) for name in ("step", "score", "loss"))
    return entry if all(type(number) in (int, float) for number in numbers) else None


def _check_same(recorded: dict[str, Any], origin: dict[str, Any], path: Path) -> None:
    before, now = (flatten_dict(json.loads(json.dumps(tree)), sep=" ") for tree in (recorded, origin))
    compared = [key for key in now if key.split()[0] not in LATE - {*recorded}]
    different = [f"{key}: {before.get(key)!r} -> {now[key]!r}" for key in compared if before.get(key) != now[key]]
    if different:
        raise InputError(f"{path} was started otherwise ({'; '.join(different)}); resume with what it was started with")
