"""Runs a traced function again with narrower groups: its equations with their shapes rewritten."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from slimsam_jax.errors import InputError
from slimsam_jax.pruning.counts import counts
from slimsam_jax.pruning.groups import Keep, Tree, by_path, path_of
from slimsam_jax.pruning.made import Made
from slimsam_jax.pruning.rewriting import REWRITES, Cut
from slimsam_jax.pruning.shrink import shrink
from slimsam_jax.pruning.structure import Structure, Widths, fold, pieces_of, shape_of, unfold
from slimsam_jax.pruning.unfolding import check_paths, check_shapes, groups_of_pieces, has_shapes
from slimsam_jax.pruning.widths import check_keep, own_of, solve_widths, widths_of
from slimsam_jax.tracing.program import Program, Step, Values, bind, scan_operands

if TYPE_CHECKING:
    from slimsam_jax.pruning.grouping import Grouping

Row = tuple[Structure, ...]  # the axes of one value


@dataclasses.dataclass(eq=False)
class Traced:
    """A function, and what the axes of its values are made of.

    Attributes:
      values, program: the equations. Inputs are the leaves of (params, *inputs).
      operands, results: the axes of a step's; `outputs` of a program's.
      arguments, result: tree structures of (params, *inputs) and of what the function returns.
      made: the trees that were cut, so that `run` knows what they keep.
    """

    values: Values
    program: Program
    operands: Mapping[Step, list[Row]]
    results: Mapping[Step, list[Row]]
    outputs: Mapping[Program, list[Row]]
    arguments: Any
    result: Any
    made: Made = dataclasses.field(default_factory=Made)

    def run(self, grouping: Grouping, params: Tree, inputs: tuple, keep: Keep | None, recount: bool) -> Any:
        """See `Grouping.run`."""
        leaves = self.leaves(params, inputs)
        arrays = by_path(params)
        keep, widths = self._widths(grouping, arrays, keep)
        check_shapes(arrays, grouping, widths)
        try:
            outputs = Run(self, grouping, widths, keep, recount)(self.program, leaves)
        except TypeError:  # of lax, whose operands must be of one type
            self._check_types((params, *inputs))
            raise
        return jax.tree.unflatten(self.result, outputs)

    def leaves(self, params: Tree, inputs: tuple) -> list[Any]:
        """The arguments of the program; raises InputError if they are others than were traced, widths apart."""
        leaves, structure = jax.tree.flatten((params, *inputs))
        if structure != self.arguments:
            raise InputError(f"the arguments are {structure}, but {self.arguments} was traced")
        count = len(jax.tree.leaves(params))
        for value, leaf in zip(self.program.inputs[count:], leaves[count:], strict=True):
            if np.shape(leaf) != self.values.shape(value):
                raise InputError(f"an input has shape {np.shape(leaf)}, but {self.values.shape(value)} was traced")
        return leaves

    def _check_types(self, arguments: Any) -> None:
        """Raises InputError if an argument has another type than was traced."""
        leaves = jax.tree_util.tree_leaves_with_path(arguments)
        for (keys, leaf), value in zip(leaves, self.program.inputs, strict=True):
            traced, given = self.values.avals[value].dtype, jax.dtypes.result_type(leaf)
            if given != traced:
                what = f"array {path_of(keys[1:])!r}" if keys[0].idx == 0 else f"input {keys[0].idx}"
                raise InputError(f"{what} is {given}, but the function was traced with {traced}")

    def _widths(self, grouping: Grouping, arrays: Mapping[str, Any], keep: Keep | None) -> tuple[Keep | None, Widths]:
        check_paths(arrays, grouping)
        if keep is None and has_shapes(arrays, grouping, grouping.widths):
            return {}, grouping.widths
        if keep is None and (keep := self.made.keep_of(arrays)) is None:
            return None, solve_widths(grouping, arrays)
        keep = check_keep(grouping, keep)
        return keep, widths_of(grouping, keep)


class Run:
    """One run: the widths, and the constants that it has computed.

    Args:
      recount: means over cut channels divide by how many are left.
    """

    CONTROL: ClassVar = {"scan": "scan", "cond": "cond", "while": "while_"}

    def __init__(self, traced: Traced, grouping: Grouping, widths: Widths, keep: Keep | None, recount: bool = False):
        self._traced, self._grouping, self._widths, self._keep = traced, grouping, widths, keep
        self._full = grouping.widths
        self._whole: dict[int, Any] = {}  # constants at full size; those to be cut are never traced
        self._concrete: dict[int, Any] = {}
        self._counts = counts(traced.values, traced.program, traced.operands, self._full) if recount else {}

    def __call__(self, program: Program, arguments: Sequence[Any]) -> list[Any]:
        """The outputs of a program."""
        arrays = dict(zip(program.inputs, arguments, strict=True))
        for step in program.steps:
            operands = zip(step.inputs, self._traced.operands[step], strict=True)
            results = self._step(step, [self._read(value, row, arrays) for value, row in operands])
            arrays |= dict(zip(step.outputs, results, strict=True))
        outputs = zip(program.outputs, self._traced.outputs[program], strict=True)
        return [self._read(value, row, arrays) for value, row in outputs]

    def _read(self, value: int, row: Row, arrays: Mapping[int, Any]) -> Any:
        values = self._traced.values
        if value not in values.constants:
            return arrays[value]
        if value in self._counts:
            ratio = self._counts[value].ratio(self._full, self._widths)
            return np.asarray(values.number(value) * ratio, values.avals[value].dtype)
        if shape_of(row, self._widths) == values.shape(value):
            return values.evaluate(value, self._whole)
        with jax.ensure_compile_time_eval():
            return self._cut(values.evaluate(value, self._concrete), row)

    def _cut(self, constant: Any, row: Row) -> Any:
        """A constant cut as the parameters were."""
        pieces = unfold(constant, row, self._full)
        if self._keep is None:
            return fold([self._cut_uniform(*each) for each in zip(pieces, pieces_of(row), strict=True)], row)
        groups = groups_of_pieces(self._grouping.groups, {"": row}, (), own_of(self._keep))
        return fold(shrink({"": pieces}, groups, self._keep)[""], row)

    def _cut_uniform(self, piece: Any, axes: Sequence[str | int]) -> Any:
        """Without the indices only a constant that is the same along the cut axes can be cut."""
        for i, name in enumerate(axes):
            if isinstance(name, str) and self._widths[name] != piece.shape[i]:
                if not bool((piece == jnp.take(piece, jnp.array([0]), i)).all()):
                    raise InputError(f"group {name!r} also cuts a constant of the function: pass keep=")
                piece = jnp.take(piece, np.arange(self._widths[name]), i)
        return piece

    def _cut_drawn(self, numbers: Any, row: Row) -> Any:
        """Random numbers of full size cut as the parameters were, so that a mask leaves the same."""
        if shape_of(row, self._widths) == numbers.shape:
            return numbers
        if self._keep is None:
            raise InputError(f"the cut goes through random numbers of shape {numbers.shape}: pass keep=")
        return self._cut(numbers, row)

    def _step(self, step: Step, operands: list[Any]) -> list[Any]:
        if step.inner:
            return getattr(self, self.CONTROL[step.name])(step, operands)
        eqn, rows, results = step.eqn, self._traced.operands[step], self._traced.results[step]
        if step.name == "random_bits":
            return [self._cut_drawn(*bind(eqn, operands, eqn.params), results[0])]
        shapes = [shape_of(row, self._widths) for row in results]
        cut = Cut(eqn, rows, [np.shape(x) for x in operands], shapes, self._full, self._widths)
        params = {**eqn.params, **REWRITES[step.name](cut)} if step.name in REWRITES else eqn.params
        outputs = bind(eqn, operands, params)
        if [np.shape(x) for x in outputs] != shapes:
            raise AssertionError(f"{step.name} gives {[np.shape(x) for x in outputs]}, not {shapes}")
        return outputs

    def scan(self, step: Step, operands: list[Any]) -> list[Any]:
        ((program, _),), params = step.inner, step.eqn.params
        first, last = scan_operands(params)
        rows = self._traced.operands[step][last:] + self._traced.results[step][last - first :]
        length = shape_of(rows[0][:1], self._widths)[0] if rows else params["length"]
        # What no turn reads was never cut, and may be longer.
        own = operands[last:]
        used = [i for i, value in enumerate(program.inputs[last:]) if value in program.read]

        def turn(carry: tuple, xs: tuple) -> tuple[tuple, tuple]:
            given = dict(zip(used, xs, strict=True))
            outputs = self(program, (*operands[:first], *carry, *(given.get(i) for i in range(len(own)))))
            return tuple(outputs[: last - first]), tuple(outputs[last - first :])

        carry, xs = (tuple(map(jnp.asarray, part)) for part in (operands[first:last], [own[i] for i in used]))
        options = {"reverse": params["reverse"], "unroll": params["unroll"]}
        carry, ys = jax.lax.scan(turn, carry, xs, length=length, **options)
        return [*carry, *ys]

    def cond(self, step: Step, operands: list[Any]) -> list[Any]:
        branches = [lambda *own, p=program: tuple(self(p, own)) for program, _ in step.inner]
        return list(jax.lax.switch(operands[0], branches, *operands[1:]))

    def while_(self, step: Step, operands: list[Any]) -> list[Any]:
        (test, _), (body, _) = step.inner
        tests = step.eqn.params["cond_nconsts"]
        first = tests + step.eqn.params["body_nconsts"]
        goes_on = lambda carry: self(test, (*operands[:tests], *carry))[0]
        turn = lambda carry: tuple(self(body, (*operands[tests:first], *carry)))
        return list(jax.lax.while_loop(goes_on, turn, tuple(map(jnp.asarray, operands[first:]))))
