"""Makes batches of samples, decoded in threads ahead of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from PIL import Image

from slimsam_jax import sharding
from slimsam_jax.data.augment import Augment
from slimsam_jax.data.sample import Sample, check_share
from slimsam_jax.errors import InputError, NothingOfUse, RunError
from slimsam_jax.imaging.frames import Fitted, Frame

Extra = Callable[[Sample, np.ndarray, np.random.Generator], dict[str, np.ndarray]]


class Batches:
    """An endless, shuffled stream of batches, in which every step's images follow from seed and step alone.

    So a run is resumed by its step number, on any number of processes. Iterating gives
    {"image": [b, H, W, 3], "size": [b, 2] int32}, as `sam.preprocess` takes them. In place of an image
    that cannot be decoded, or has nothing of use, comes the next one in the list. The former is noted in `skipped`,
    {name: reason}; when more than their share have been, iteration stops with `RunError`; of several processes none
    does by itself, which would leave the others waiting for it: see `agree_on_skipped`.

    Args:
      batch: images in a step, over all processes.
      start: the step to begin with.
      part: (i, n): only the i-th of n runs of each step's images, for one of n processes; n divides `batch`.
      augment: an image and a random generator -> an image.
      extra: (sample, its [2] size in the model frame, random generator) -> further arrays of an image.
      max_broken: the share of the samples that may be unreadable.
      workers: processes to read in, for samples that take long to draw and cannot be broken: what a worker could not
        read would be in its own `skipped` alone. 0 for threads of this process.
      frame: how images come into the model frame; None for Segment Anything's way. (uint8 is what that gives, and
        stays until on the device.)
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        image_size: tuple[int, int],
        batch: int,
        seed: int,
        start: int = 0,
        part: tuple[int, int] = (0, 1),
        augment: Augment | None = None,
        extra: Extra | None = None,
        max_broken: float = 1.0,
        threads: int = 4,
        workers: int = 0,
        frame: Frame | None = None,
    ):
        self.frame = frame or Fitted(image_size)
        self.samples, self.image_size, self.max_broken = samples, image_size, max_broken
        self.skipped: dict[str, str] = {}
        self.passed: set[str] = set()  # names of images that can be read, and have nothing of use
        self.batch, self.augment, self.extra = batch, augment, extra
        index, self.parts = part
        share = batch // self.parts
        self._order = grain.MapDataset.source(range(len(self.samples))).seed(seed).shuffle().repeat()
        every = self._order.random_map(self._load)[start * batch :]
        source = _Rows(every, batch, range(index * share, (index + 1) * share))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * share + threads)
        if workers:  # each draws whole batches, taking turns, so that batches are the same as without
            flags.FLAGS.mark_as_parsed()  # grain's processes read absl's flags, which this program has none of
            processes = grain.multiprocessing.MultiprocessingOptions(workers)
            stream = source.batch(share).to_iter_dataset(grain.ReadOptions(1, 1)).mp_prefetch(processes)
        else:
            stream = source.to_iter_dataset(options).batch(share, drop_remainder=True)
        self._iterator = iter(stream)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the iterator for workers, which read and do not iterate."""
        return {name: value for name, value in vars(self).items() if name != "_iterator"}

    def samples_of(self, step: int) -> list[Sample]:
        """Returns the samples of a step, in all processes; unreadable ones still among them."""
        return [self.samples[self._order[step * self.batch + i]] for i in range(self.batch)]

    def met(self, steps: int) -> set[str]:
        """Returns the names of what the first steps asked for: their samples, and those in unusable ones' places."""
        unusable, names = {*self.skipped, *self.passed}, set()
        for place in range(steps * self.batch):
            for sample in self._from(self._order[place]):
                names.add(sample.name)
                if sample.name not in unusable:
                    break
        return names

    def _from(self, index: int) -> Iterator[Sample]:
        """Yields all samples, from this one on."""
        for ahead in range(len(self.samples)):
            yield self.samples[(index + ahead) % len(self.samples)]

    def agree_on_skipped(self) -> None:
        """Tells every process what any of them could not read; all call this at the same time.

        Raises:
          RunError: together that is too much; the same in all processes.
        """
        of_processes = sharding.gather_json(dict(self.skipped))
        skipped = {name: reason for own in of_processes for name, reason in own.items()}
        self.skipped.update(skipped)
        check_share(skipped, len(self.samples), self.max_broken)

    def _load(self, index: int, random: np.random.Generator) -> dict[str, np.ndarray]:
        for sample in self._from(index):
            if sample.name in self.skipped or sample.name in self.passed:
                continue
            state = random.bit_generator.state
            try:
                return self._read(sample, random)
            except InputError as error:
                random.bit_generator.state = state  # the next one is read as if this had been known to be unusable
                if isinstance(error, NothingOfUse):
                    self.passed.add(sample.name)
                    continue
                self.skipped[sample.name] = str(error)
                if self.parts == 1:
                    check_share(self.skipped, len(self.samples), self.max_broken)
        last = next(reversed(self.skipped.values()), "it has nothing to learn from")
        raise RunError(f"none of the {len(self.samples)} images can be used; the last: {last}")

    def _read(self, sample: Sample, random: np.random.Generator) -> dict[str, np.ndarray]:
        return self._item(sample, sample.image(), random)

    def _item(self, sample: Sample, image: Image.Image, random: np.random.Generator) -> dict[str, np.ndarray]:
        if self.augment:
            image = self.augment(image, random)
        pixels, size = self.frame.place(image)
        return {"image": pixels, "size": size, **(self.extra(sample, size, random) if self.extra else {})}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def close(self) -> None:
        """Ends threads and workers that read ahead."""
        self._iterator.close()


class _Rows(grain.MapDataset):
    """Of every `batch` items those of one process, which lie behind one another.

    The processes' rows behind one another are then the batch of one process, and devices have the same rows: so that
    the parts of a step (`--accumulate`), over which a relative loss takes a variance, are of the same images, too.

    Args:
      rows: which of a batch they are.
    """

    def __init__(self, parent: grain.MapDataset, batch: int, rows: range):
        super().__init__(parent)
        self._whole, self._rows = batch, rows

    def __len__(self) -> int:
        return len(self.parents[0]) // self._whole * len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return self.slice(place)
        step, row = divmod(place, len(self._rows))
        return self.parents[0][step * self._whole + self._rows[row]]
