"""What all steps of a compression run share, and the run's own plan of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.plan import Planned
from slimsam_jax.compression.teacher_cache import TeacherCache
from slimsam_jax.compression.validation import Score
from slimsam_jax.data import Sample
from slimsam_jax.models.sam import Sam
from slimsam_jax.training.run_folder import RunFolder

if TYPE_CHECKING:
    from slimsam_jax.compression.options import Options


@dataclasses.dataclass(frozen=True)
class Run:
    """What all steps share.

    Attributes:
      scores: how good a student is, by `Validation.validate_by`; only in the process that validates.
      provenance: for the slim model's config.json.
      start: the model whose encoder the student begins with, if --student is a model's path.
      unread: {name: reason} of images to measure on that could be read at the start, and not any more when a student
        was scored.
    """

    options: Options
    plan: tuple[Planned, ...]
    target: Target
    teacher: Sam
    images: Sequence[Sample]
    val: Sequence[Sample]
    batch: int
    dtype: Any
    cache: TeacherCache | None
    scores: dict[str, Score]
    folder: RunFolder
    provenance: dict[str, Any]
    start: Sam | None = None
    unread: dict[str, str] = dataclasses.field(default_factory=dict)

    def is_named_later(self, step: Planned) -> bool:
        """Whether a training follows at once that meets every image, and so logs those that cannot be read."""
        following = self.plan[self.plan.index(step) + 1 :][:1]
        return any(each.optimizer_steps * self.batch >= len(self.images) for each in following)
