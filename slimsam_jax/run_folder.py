"""The folder of a compression run: its log, its results, and what is needed to resume it.

Finished files appear by renaming, so that a file of a final name is a whole one. Work in
progress lives in `checkpoints/`, per stage: `pruned/` (the model that distillation starts
from), `steps/` (orbax), `distilled/` (the stage is done).
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from slimsam_jax import checkpoint, sharding
from slimsam_jax.errors import InputError, blaming
from slimsam_jax.models.sam import Sam
from slimsam_jax.steps import Steps


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
        if sharding.is_main():
            self._create(recorded, origin)
        sharding.barrier("run folder")

    def _create(self, recorded: Path, origin: dict[str, Any]) -> None:
        created = not self.path.exists()
        try:
            self.work.mkdir(parents=True)
            checkpoint.write_json(recorded, origin)
        except OSError:
            if created:
                shutil.rmtree(self.path, ignore_errors=True)
            raise

    def log(self, **entry: Any) -> None:
        """Appends a line to `log.jsonl`."""
        if not sharding.is_main():
            return
        with (self.path / "log.jsonl").open("a+b") as file:
            file.seek(max(0, file.tell() - 1))
            cut_short = file.read() not in (b"", b"\n")  # a killed run may leave half a line
            file.write(b"\n" * cut_short + json.dumps(entry).encode() + b"\n")

    def read_log(self) -> list[dict[str, Any]]:
        path = self.path / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def rewind_log(self, stage: str, step: int) -> dict[int, float]:
        """Drops the lines of a stage's steps after `step`, which a resumed run writes again.

        Returns:
          {step: score} of the stage's validations until then.
        """
        kept = [e for e in self.read_log() if not (e.get("stage") == stage and e.get("step", math.inf) > step)]
        if sharding.is_main():
            with checkpoint.replacing(self.path / "log.jsonl") as temporary:
                temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        sharding.barrier("log read")
        return {e["step"]: e["score"] for e in kept if e.get("stage") == stage and "score" in e}

    def save_model(self, stage: str, part: str, sam: Sam) -> None:
        if sharding.is_main():
            checkpoint.save(sam, self.work / stage / part)
        sharding.barrier(f"{stage}/{part} saved")

    def load_model(self, stage: str, part: str) -> Sam | None:
        """The model of a stage, or None if the run has not come that far."""
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


def _check_same(recorded: dict[str, Any], origin: dict[str, Any], path: Path) -> None:
    before, now = (flatten_dict(json.loads(json.dumps(tree)), sep=" ") for tree in (recorded, origin))
    different = [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in now if before.get(key) != now[key]]
    if different:
        raise InputError(f"{path} was started otherwise ({'; '.join(different)}); resume with what it was started with")
