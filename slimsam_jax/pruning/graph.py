"""Walks a program and learns which axes are the same channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from slimsam_jax.pruning.axes import PRODUCT, Axes, Mismatch
from slimsam_jax.pruning.rules import RULES, Call, Nodes, unknown
from slimsam_jax.pruning.rules.call import fresh, unify_all
from slimsam_jax.pruning.rules.pointwise import ELEMENTWISE
from slimsam_jax.pruning.structure import Product, Structure, Sum
from slimsam_jax.tracing.program import Program, Step, Values, scan_operands

# What a kernel may pass through and still be that kernel where a matrix product reads it.
PASSING = frozenset(
    ("transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "split", "unstack", "slice", "rev")
)
READERS = frozenset(("dot_general", "conv_general_dilated"))
ARITHMETIC = frozenset(ELEMENTWISE.split())


class Graph:
    """A traced function with a node for each axis of each value, tied by the rules.

    Attributes:
      axes: the nodes of all values.
      nodes: of each value that is no constant; a constant has nodes of its own wherever it is used.
      operands, results: nodes of a step's, by step; `outputs` of a program's.
      rows: the nodes of everything that was met, for `copies`.
      order: paths of the parameters that are read, in the order of their first use.
      kernels: paths of the parameters that a matrix product or a convolution reads.
    """

    def __init__(self, values: Values, inputs: Mapping[int, Nodes], paths: Mapping[int, str], axes: Axes):
        self.values, self.axes, self.nodes = values, axes, dict(inputs)
        self.operands: dict[Step, list[Nodes]] = {}
        self.results: dict[Step, list[Nodes]] = {}
        self.outputs: dict[Program, list[Nodes]] = {}
        self.rows: list[Nodes] = list(inputs.values())
        self.order: dict[str, None] = {}
        self.kernels: set[str] = set()
        self._origins = {value: frozenset((path,)) for value, path in paths.items()}
        self._mapped: Nodes = []  # axes that the loops around the present step run along, each turn by itself

    def walk(self, program: Program) -> list[Nodes]:
        """Takes all steps of a program whose inputs have nodes; returns the nodes of its outputs."""
        for step in program.steps:
            operands = [self._use(value) for value in step.inputs]
            results = self._apply(step, operands)
            self.operands[step], self.results[step] = operands, results
            self.nodes |= dict(zip(step.outputs, results, strict=True))
            self.rows += [self._mapped + nodes for nodes in results]
            self._follow(step)
        self.outputs[program] = [self._use(value) for value in program.outputs]
        return self.outputs[program]

    def _use(self, value: int) -> Nodes:
        if value not in self.values.constants:
            return self.nodes[value]
        self.rows.append(fresh(self.axes, self.values.shape(value)))
        return self.rows[-1]

    def _apply(self, step: Step, operands: list[Nodes]) -> list[Nodes]:
        if step.inner:
            return CONTROL[step.name](self, step, operands)
        shapes = [self.values.shape(value) for value in step.inputs]
        call = Call(step.name, step.eqn.params, operands, shapes, [self.values.shape(v) for v in step.outputs])
        try:
            results = RULES.get(step.name, unknown)(self.axes, call)
        except Mismatch:
            results = unknown(self.axes, call, f"primitive {step.name} cuts across it")
        sizes = [tuple(self.axes.size(node) for node in nodes) for nodes in results]
        if sizes != call.results:
            raise AssertionError(f"the rule of {step.name} gives {sizes}, not {call.results}")
        return results

    def call(self, program: Program, inputs: Sequence[Nodes], step: Step, fed: Iterable[int]) -> list[Nodes]:
        """Walks an inner program of a step, called with these nodes."""
        for value, nodes, k in zip(program.inputs, inputs, fed, strict=True):
            self.nodes[value] = nodes
            if (origin := self._origins.get(step.inputs[k])) is not None:
                self._origins[value] = origin
        return self.walk(program)

    def call_mapped(self, lead: int, program: Program, inputs: Sequence[Nodes], step: Step) -> list[Nodes]:
        """The same for a loop whose turns do not meet: `lead` is an axis of all that happens inside."""
        self._mapped = [*self._mapped, lead]
        results = self.call(program, inputs, step, range(len(inputs)))
        self._mapped = self._mapped[:-1]
        return results

    def _follow(self, step: Step) -> None:
        """Notes which parameters a step reads, and whether as kernels."""
        origins = [self._origins.get(value) for value in step.inputs]
        shaped = [o for o, value in zip(origins, step.inputs, strict=True) if self.values.shape(value)]
        passes = step.name in PASSING or (step.name in ARITHMETIC and shaped and all(shaped))
        if passes and origins and any(shaped):
            together = frozenset().union(*(o for o in origins if o))
            self._origins |= dict.fromkeys(step.outputs, together)
        else:
            self.order |= dict.fromkeys(path for origin in origins if origin for path in sorted(origin))
        if step.name in READERS:
            self.kernels |= {path for origin in origins if origin for path in origin}

    def resolver(self, named: Mapping[int, str]) -> Callable[[int], Structure]:
        """A function from a node to its structure as data, with the names of those leaves that are groups."""
        known: dict[int, Structure] = {}

        def resolve(node: int) -> Structure:
            node = self.axes.find(node)
            if node not in known:
                form = self.axes.form(node)
                known[node] = _joined(form[0], map(resolve, form[1])) if form else named.get(node, self.axes.size(node))
            return known[node]

        return resolve


def _joined(kind: str, structures: Iterable[Structure]) -> Structure:
    """The product or sum of structures: flat, and with neighbouring numbers as one."""
    made, join = (Product, int.__mul__) if kind == PRODUCT else (Sum, int.__add__)
    flat: list[Structure] = []
    for structure in structures:
        for part in structure.parts if isinstance(structure, made) else (structure,):
            if flat and isinstance(part, int) and isinstance(flat[-1], int):
                flat[-1] = join(flat[-1], part)
            else:
                flat.append(part)
    return flat[0] if len(flat) == 1 else made(tuple(flat))


def _scan(graph: Graph, step: Step, operands: list[Nodes]) -> list[Nodes]:
    """Constants and carries pass; the scanned axis is one for all; layers under a scan keep the same channels."""
    axes, params, ((program, fed),) = graph.axes, step.eqn.params, step.inner
    first, last = scan_operands(params)
    free = first == last < len(operands)
    lead = axes.leaf(params["length"], None if free else "scanned with a carry")
    for nodes in operands[last:]:
        axes.unify(lead, nodes[0])
    inputs = [*operands[:last], *(nodes[1:] for nodes in operands[last:])]
    results = graph.call_mapped(lead, program, inputs, step) if free else graph.call(program, inputs, step, fed)
    for state, after in zip(operands[first:last], results, strict=False):
        unify_all(axes, state, after)
    carried = last - first
    return [*(list(state) for state in operands[first:last]), *([lead, *nodes] for nodes in results[carried:])]


def _cond(graph: Graph, step: Step, operands: list[Nodes]) -> list[Nodes]:
    branches = [graph.call(program, [operands[k] for k in fed], step, fed) for program, fed in step.inner]
    for other in branches[1:]:
        for a, b in zip(branches[0], other, strict=True):
            unify_all(graph.axes, a, b)
    return [list(nodes) for nodes in branches[0]]


def _while(graph: Graph, step: Step, operands: list[Nodes]) -> list[Nodes]:
    *_, results = [graph.call(program, [operands[k] for k in fed], step, fed) for program, fed in step.inner]
    carried = operands[len(operands) - len(results) :]
    for state, after in zip(carried, results, strict=True):
        unify_all(graph.axes, state, after)
    return [list(state) for state in carried]


CONTROL = {"scan": _scan, "cond": _cond, "while": _while}
