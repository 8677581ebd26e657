"""Caches the teacher's embeddings on disk, so that each image is encoded by it once and not once an epoch.

A folder for each teacher, image size and whatever else decides what the teacher gives, a file for each image, named by
the hash of its content: a renamed or copied data set finds its embeddings again, and an interrupted run goes on where
it was.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from slimsam_jax import sharding
from slimsam_jax.compression.stored_embeddings import Layout, Precision
from slimsam_jax.data import Sample
from slimsam_jax.errors import InputError, RunError, reading, writing
from slimsam_jax.files import replacing
from slimsam_jax.inference.decode import encode_image
from slimsam_jax.models.config import Config
from slimsam_jax.models.sam import Architecture, Embedding, Sam, embedding_shapes
from slimsam_jax.progress import track

UNSHOWN = ("pixel_mean", "pixel_std", "decoder_heads")  # what no array of a SAM with a ViT shows


def unshown(config: Architecture) -> str:
    """Hashes what decides embeddings and masks besides the weights; "" where it is as in SAM, "-" and 8 digits else.

    Of a ViT that is `UNSHOWN`, as its arrays show all its sizes; of other families the whole architecture.
    """
    fields = config.to_json()
    if isinstance(config, Config):
        fields = {name: fields[name] for name in UNSHOWN if fields[name] != getattr(Config, name)}
    text = json.dumps(fields, sort_keys=True)
    return f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}" if fields else ""


class TeacherCache:
    """A cache of one teacher's embeddings, [h, w, out_chans]; several maps lie one after the other in a file.

    Half precision adds a relative squared error of about 1e-7, integers of about 1e-5 (docs/distillers.md), below what
    distillation reaches.

    Args:
      folder: that several teachers may share.
      teacher_hash: sha256 of its weights.
      precision: of what is stored; each has a folder of its own.

    Raises:
      InputError: the folder cannot be made.
    """

    def __init__(self, folder: Path, teacher: Sam, teacher_hash: str, precision: Precision = "float16"):
        height, width = teacher.config.image_size
        self.teacher, self.layout = teacher, Layout(embedding_shapes(teacher.config), precision)
        kind = "" if precision == "float16" else f"-{precision}"
        name = f"{teacher_hash[:16]}-{height}x{width}{unshown(teacher.config)}"
        self.common = folder / name  # of what no precision changes, such as masks
        self.folder = self.common.with_name(self.common.name + kind)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--cache {folder} cannot be made a folder: {error.strerror}") from None
        self._files: dict[str, Path] = {}  # so that an image is hashed once

    def file(self, sample: Sample) -> Path:
        """Returns the file of an image's embedding, there or not.

        Raises:
          InputError: the image cannot be read.
        """
        if sample.name not in self._files:
            name = hashlib.sha256(sample.read()).hexdigest()[:32]
            self._files[sample.name] = self.folder / f"{name}.npy"
        return self._files[sample.name]

    def read(self, sample: Sample) -> Embedding:
        """Reads an image's embedding, an array or a dict of maps, float16 however it is stored.

        Raises:
          RunError: there is none, or it is damaged.
        """
        try:
            return self.layout.unpacked(self._read(self.file(sample)))
        except InputError as error:
            raise RunError(f"{error}; continue with --resume, and it is computed again") from None

    def _read(self, file: Path, lazily: bool = False) -> np.ndarray:
        """Reads an array; lazily its header and size alone, as an embedding has two megabytes."""
        with reading(f"the cached embedding {file}"):
            embedding = np.load(file, mmap_mode="r" if lazily else None, allow_pickle=False)
            if embedding.shape != self.layout.shape or embedding.dtype != self.layout.dtype:
                raise ValueError(f"it is {embedding.dtype}{list(embedding.shape)}")
            return embedding

    def fill(self, samples: Sequence[Sample]) -> None:
        """Computes what is missing or damaged; each process takes its share. Says beforehand how much room it takes.

        Images that cannot be read are left out.

        Raises:
          RunError: the disk has no room for it.
        """
        share = samples[jax.process_index() :: jax.process_count()]  # of all, not of what is missing at this moment
        missing = [sample for sample in share if not self._is_there(sample)]
        count = sum(sharding.gather_json(len(missing)))  # by all: a process that misses nothing answers, too
        if not count:
            return
        needed, free = count * self.layout.bytes, shutil.disk_usage(self.folder).free
        if sharding.is_main():
            each = f"{count} images of {self.layout.bytes / 1e6:.3g} MB ({self.layout.precision})"
            print(f"the teacher's embeddings: about {needed / 1e9:.2f} GB in {self.folder}, {each}", flush=True)
        if not sharding.all_agree(free >= needed):  # another process may have seen more room
            raise RunError(f"{self.folder} has {free / 1e9:.2f} GB free; choose another --cache, or none")
        for sample in track(missing, "teacher's embeddings") if missing else ():
            self._compute(sample)

    def _is_there(self, sample: Sample) -> bool:
        """Tells whether there is nothing to compute: a whole embedding, or no image."""
        try:
            file = self.file(sample)
        except InputError:
            return True  # the data stream names it and takes another
        try:
            self._read(file, lazily=True)
        except InputError:
            return False
        return True

    def _compute(self, sample: Sample) -> None:
        try:
            image = sample.image()
        except InputError:
            return
        embedding = self.layout.packed(encode_image(self.teacher, image).embedding)
        file = self.file(sample)
        with writing(file), replacing(file) as temporary, temporary.open("wb") as target:
            np.save(target, embedding)
