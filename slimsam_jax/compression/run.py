"""What all steps of a compression run share."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.recipes import Recipe
from slimsam_jax.compression.steps import Stage, plan, steps_of
from slimsam_jax.compression.teacher_cache import TeacherCache
from slimsam_jax.compression.validation import Score
from slimsam_jax.data import Sample
from slimsam_jax.models.sam import Sam
from slimsam_jax.training.run_folder import RunFolder

if TYPE_CHECKING:
    from slimsam_jax.compression.options import Options


@dataclasses.dataclass(frozen=True)
class Run:
    """What all stages share."""

    options: Options
    recipe: Recipe
    target: Target
    teacher: Sam
    images: list[Sample]
    val: list[Sample]
    steps: int
    batch: int
    dtype: Any
    cache: TeacherCache | None
    score: Score | None
    folder: RunFolder
    provenance: dict[str, Any]

    @property
    def stages(self) -> tuple[Stage, ...]:
        return plan(self.recipe)

    def steps_of(self, stage: Stage) -> int:
        return steps_of(self.stages, self.steps)[stage.name]

    def steps_before(self, stage: Stage) -> int:
        return sum(map(self.steps_of, self.stages[: self.stages.index(stage)]))
