"""What every training step of a recipe has in common: its learning rate, its scores, its student."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from slimsam_jax import sharding
from slimsam_jax.compression.plan import Planned
from slimsam_jax.compression.run import Run
from slimsam_jax.distillation.schedules import learning_rates, plateau_scale
from slimsam_jax.distillation.step import TrainState
from slimsam_jax.errors import RunError
from slimsam_jax.models.sam import Sam
from slimsam_jax.quantization import any_quantized, training
from slimsam_jax.training.loop import ADVICE, Loop, Schedule, Trainer


class StepTraining(Loop):
    """A training that is a step of a run. Subclasses say what is learned, from what.

    Args:
      trainer: of `student`.
      peak: the peak learning rate.
    """

    def __init__(self, run: Run, planned: Planned, student: Sam, trainer: Trainer, peak: float):
        step, self.whole, self.planned, self.student = planned.step, run, planned, student
        self.rates = learning_rates(peak, planned.optimizer_steps, step.optimizer.schedule)
        judged, save_every = step.validation, run.options.save_every
        fields = (
            planned.optimizer_steps,
            run.batch,
            save_every,
            judged.validations,
            judged.keep_checkpoint,
            planned.before,
        )
        super().__init__(run.folder, trainer, Schedule(planned.name, f"the step {planned.name}", *fields))
        if self.validated and any_quantized(student.params):
            self.validated.add(0)  # few steps win back little: what they begin with may be better than what they give

    def label(self) -> str:
        return self.planned.name

    def seed(self) -> int:
        """Returns the seed of the order of images, and of what is drawn of them."""
        return self.whole.options.seed + 1 + self.planned.step.order

    def part(self) -> tuple[int, int]:
        """Returns which of the images this process reads."""
        return jax.process_index(), jax.process_count()

    def score(self, sam: Sam, step: int) -> dict[str, float]:
        judge = self.whole.scores.get(self.planned.step.validation.validate_by)
        before = len(self.whole.unread)
        score = sharding.agree(judge(sam) if judge else 0.0)
        for name, reason in [*self.whole.unread.items()][before:]:
            self.folder.log(stage=self.planned.name, step=step, skipped=name, reason=reason)
            print(f"not measured: {reason}", flush=True)
        if not np.isfinite(score):
            lost = ", or no image to measure on can be read any more" * bool(self.whole.unread)
            raise RunError(f"the student after step {step} gives no finite outputs{lost}; {ADVICE}")
        return {"score": score}

    def learning_rate(self, step: int) -> float:
        """By the schedule, and by the validations until now if that is "plateau"."""
        rate, optimizer = float(self.rates[step - 1]), self.planned.step.optimizer
        if optimizer.schedule != "plateau":
            return rate
        return rate * plateau_scale(list(self.scores.values()), optimizer.patience)

    def sam(self, state: TrainState) -> Sam:
        """The student as it stands, off the mesh."""
        before, new = self.student.params, learned(state)
        nodes = {part: training.nodes_of(before[part]) for part in new}
        if any(nodes.values()):
            new = with_integers(new, nodes)
        return dataclasses.replace(self.student, params={**before, **new})


@jax.jit
def with_integers(new: Mapping[str, Any], nodes: Mapping[str, Any]) -> dict[str, Any]:
    """Each part of a model with its integers. Compiled once, however often a training is validated."""
    return {part: training.joined(own, nodes[part]) for part, own in new.items()}


def learned(state: TrainState) -> dict[str, Any]:
    """The parameters that a state has come to, by part, off the mesh."""
    # Copied on the host, which compiles nothing: the next step is given the state's memory.
    return jax.device_put(jax.tree.map(np.array, sharding.gather(state.average or state.params)))
