"""Writes one TFDS data set by several processes: each its part, which the first one joins."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from slimsam_jax import sharding
from slimsam_jax.data import tfds_writer
from slimsam_jax.data.sample import Sample
from slimsam_jax.data.together import check_same
from slimsam_jax.errors import RunError
from slimsam_jax.files import new_folder, read_json, write_json

INFO, SPLIT = "dataset_info.json", "train"


def prepare_together(samples: Sequence[Sample], out: Path) -> dict[str, str]:
    """`tfds_writer.prepare` by all processes, which see one file system; returns the same in all of them.

    Each writes the records of a run of the samples, so that all lie in the order given.

    Raises:
      InputError: not one can be used, or the processes do not see the same samples.
      RunError: the folder cannot be written. Either in all processes.
    """
    check_same(samples)
    index, count = jax.process_index(), jax.process_count()
    first, stop = (len(samples) * part // count for part in (index, index + 1))
    with _shared_folder(out) as folder:
        skipped, fault = {}, ""
        try:
            skipped = tfds_writer.write(samples[first:stop], folder / f"part-{index}", first)
        except tfds_writer.Unusable as error:  # of this part
            skipped = error.skipped
        except RunError as error:
            fault = str(error)
        parts = sharding.gather_json([skipped, fault])
        for _, fault in parts:
            if fault:
                raise RunError(fault)
        skipped = {name: reason for own, _ in parts for name, reason in own.items()}
        if len(skipped) == len(samples):
            raise tfds_writer.Unusable(skipped)
        if sharding.is_main():
            join([folder / f"part-{part}" for part in range(count)], folder)
    sharding.barrier("prepared")
    return skipped


@contextlib.contextmanager
def _shared_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder, the same in all processes, which becomes `out` when the first one is done."""
    with new_folder(out) if sharding.is_main() else contextlib.nullcontext() as folder:
        yield Path(sharding.gather_json(str(folder))[0])


def join(parts: Sequence[Path], folder: Path) -> None:
    """Makes one data set of several, in their order; those that are empty are not there."""
    versions = [path.parent for part in parts for path in part.glob(f"*/*/{INFO}")]
    target = folder / versions[0].parent.name / versions[0].name
    target.mkdir(parents=True)
    infos = [read_json(version / INFO) for version in versions]
    splits = [next(split for split in info["splits"] if split["name"] == SPLIT) for info in infos]
    shards = [path for version in versions for path in sorted(version.glob(f"*-{SPLIT}.*-of-*"))]
    for number, path in enumerate(shards):
        path.rename(target / f"{path.name.rpartition('-of-')[0][:-5]}{number:05d}-of-{len(shards):05d}")
    lengths = [length for split in splits for length in split["shardLengths"]]
    size = sum(int(split["numBytes"]) for split in splits)
    whole: dict[str, Any] = {**splits[0], "shardLengths": lengths, "numBytes": str(size)}
    shutil.copy(versions[0] / "features.json", target / "features.json")
    write_json(target / INFO, {**infos[0], "splits": [whole]})
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)
