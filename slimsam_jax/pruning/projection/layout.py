"""Which values are parameters, merely moved, and who adds a bias to what a step makes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

from slimsam_jax.pruning.counts import MOVING
from slimsam_jax.pruning.program import Step
from slimsam_jax.pruning.rerun import Traced
from slimsam_jax.pruning.structure import names

SAME_AXES = ("convert_element_type", "copy", "copy_p", "stop_gradient", "reduce_precision", "sharding_constraint")
WHOLE = MOVING - {"slice", "split", "unstack", "gather", "dynamic_slice", "pad", "tile"}  # all numbers, each once


@dataclasses.dataclass(frozen=True)
class Origin:
    """Attributes:
    path: of the parameter that a value is, whole and at most moved.
    axes: for each axis of the value which axis of the parameter it is; None where that is not plain (a reshape).
    """

    path: str
    axes: tuple[int, ...] | None


class Layout:
    """The top level of a program.

    Attributes:
      paths: {value: path} of the parameters.
      origins: {value: the parameter that it is}.
      readers: {value: [(step, position)]}.
      uses: {path: how many steps take the parameter, moved or not}.
      met: {step: the groups that its operands and results have}.
    """

    def __init__(self, traced: Traced, paths: Mapping[int, str]):
        self.paths, program, values = paths, traced.program, traced.values
        self.met: dict[Step, frozenset[str]] = {}
        self.origins = {value: Origin(path, tuple(range(len(values.shape(value))))) for value, path in paths.items()}
        self.readers: dict[int, list[tuple[Step, int]]] = {}
        self.uses: Counter[str] = Counter()
        for step in program.steps:
            rows = (*traced.operands[step], *traced.results[step])
            self.met[step] = frozenset(name for row in rows for axis in row for name in names(axis))
            for k, value in enumerate(step.inputs):
                self.readers.setdefault(value, []).append((step, k))
            origin = self.origins.get(step.inputs[0]) if step.inputs else None
            if origin and step.name in WHOLE:
                self.origins |= dict.fromkeys(step.outputs, Origin(origin.path, _moved(step, origin.axes)))
            else:
                self.uses.update(self.origins[value].path for value in step.inputs if value in self.origins)

    def bias_of(self, step: Step) -> str | None:
        """The parameter that is added to what a step makes before anything else happens to it, and to nothing else."""
        value = step.outputs[0]
        while len(self.readers.get(value, ())) == 1:
            ((reader, position),) = self.readers[value]
            if reader.name in ("add", "add_any"):
                origin = self.origins.get(reader.inputs[1 - position])
                return origin.path if origin and self.uses[origin.path] == 1 else None
            if reader.name not in WHOLE:
                return None
            value = reader.outputs[0]
        return None


def _moved(step: Step, axes: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if step.name == "transpose" and axes is not None:
        return tuple(axes[i] for i in step.eqn.params["permutation"])
    return axes if step.name in SAME_AXES else None
