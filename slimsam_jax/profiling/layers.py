"""Parameters, multiply-accumulates and output shapes of any JAX function, layer by layer. Nothing is computed.

A layer is an array of the parameters and the products that read it, be it reshaped, cast, cut
or scaled by other parameters on the way. Products of activations alone stand as "(products)" in
the folder of the module in which they happen if its scope names one (as Flax's do), else under
the scope (`jax.named_scope`); and so do those with a kernel that is itself made by a product.
`macs.count` of the same function is the sum of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, Literal

from slimsam_jax.profiling.macs import Macs, inner_jaxprs, product
from slimsam_jax.pruning.groups import by_path
from slimsam_jax.tracing.program import scan_operands

PRODUCTS = "(products)"
Shape = tuple[int, ...]
Origin = tuple[str, ...] | None  # the arrays of which alone a value is made; None of an activation


class Layer(NamedTuple):
    """A row.

    Attributes:
      name: path of an array, or of a folder or scope and "(products)"; of a layer the folder or scope.
      parameters: scalars in it; an array that is used twice counts once.
      macs: of all its uses in one call.
      output: shape of what is first computed with it, None if it is never read. Layers have that of their last array.
    """

    name: str
    parameters: int
    macs: Macs
    output: Shape | None


def arrays(function: Callable, params: Any, *inputs: Any) -> tuple[Layer, ...]:
    """Counts each array of the parameters by itself, in the order of use, and each scope that has products of its own.

    Args:
      function: (params, *inputs) -> anything; traced once. `grouping.run` with cut parameters will do.
      params: any tree of arrays or of shapes.
      inputs: what else it takes; the counts are of one call with these, so take a batch of one.

    Returns:
      rows, of which those of arrays that the function never reads come last. What a loop does counts as often as it
      turns, if its length is known (scan), else once; of the branches of a condition the dearer one counts.
    """
    traced = jax.make_jaxpr(function)(params, *inputs).jaxpr
    leaves = by_path(params)
    rows = _Rows({path: tuple(leaf.shape) for path, leaf in leaves.items()})
    others = [None] * (len(traced.invars) - len(leaves))
    _walk(traced, [*((path,) for path in leaves), *others], rows, 1, "")
    unread = {path: None for path in leaves if path not in rows.outputs}
    return tuple(rows.layer(name) for name in {**rows.outputs, **unread})


def layers(rows: Sequence[Layer], depth: int | None = None) -> tuple[Layer, ...]:
    """Adds up the arrays of a layer: those that lie in one folder of the tree, or below one of the first `depth`."""
    grouped: dict[str, Layer] = {}
    for row in rows:
        name = "/".join(row.name.split("/")[:-1][:depth]) or row.name
        before = grouped.get(name, Layer(name, 0, Macs(0, 0), None))
        macs = Macs(*(a + b for a, b in zip(before.macs, row.macs, strict=True)))
        grouped[name] = Layer(name, before.parameters + row.parameters, macs, row.output or before.output)
    return tuple(grouped.values())


def total(rows: Sequence[Layer]) -> Layer:
    """The sum of all rows, without a shape."""
    macs = Macs(*(sum(row.macs[i] for row in rows) for i in range(2)))
    return Layer("total", sum(row.parameters for row in rows), macs, None)


def table(rows: Sequence[Layer]) -> str:
    """Formats rows and their total as text, a line each; ends without a line break."""
    lines = [("layer", "parameters", "output", "linear MACs", "attention MACs")]
    for row in (*rows, total(rows)):
        shape = "" if row.output is None else " x ".join(map(str, row.output)) or "scalar"
        lines.append((row.name, _short(row.parameters), shape, *map(_short, row.macs)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    justify = (str.ljust, str.rjust, str.rjust, str.rjust, str.rjust)
    cells = [[put(*each) for put, *each in zip(justify, line, widths, strict=True)] for line in lines]
    rule = "-+-".join("-" * width for width in widths)
    head, *body, last = (" | ".join(line).rstrip() for line in cells)
    return "\n".join((head, rule, *body, rule, last))


def _short(number: int) -> str:
    """Four digits and a unit; nothing for nothing."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return str(number or "")


class _Rows:
    """What was counted so far, by the name of the row."""

    def __init__(self, shapes: Mapping[str, Shape]):
        self.shapes, self.outputs = shapes, {}  # in the order of use
        self.folders = {"/".join(path.split("/")[:i]) for path in shapes for i in range(1, path.count("/") + 1)}
        self.macs: dict[str, Macs] = {}

    def layer(self, name: str) -> Layer:
        size = math.prod(self.shapes[name]) if name in self.shapes else 0
        return Layer(name, size, self.macs.get(name, Macs(0, 0)), self.outputs.get(name))

    def read(self, origin: Sequence[str], output: Shape) -> None:
        for path in origin:
            self.outputs.setdefault(path, output)

    def add(self, name: str, macs: Macs) -> None:
        self.macs[name] = Macs(*(a + b for a, b in zip(self.macs.get(name, Macs(0, 0)), macs, strict=True)))

    def multiply(self, kernel: Sequence[str], macs: Macs) -> None:
        """Divides a product among the arrays of its kernel by their sizes: of the highest rank, as scales are none."""
        rank = max(len(self.shapes[path]) for path in kernel)
        sizes = {path: math.prod(self.shapes[path]) for path in kernel if len(self.shapes[path]) == rank}
        whole, done, before = max(sum(sizes.values()), 1), Macs(0, 0), 0
        for path, size in sizes.items():
            before += size
            until = Macs(*(number * before // whole for number in macs))
            self.add(path, Macs(*(a - b for a, b in zip(until, done, strict=True))))
            done = until

    def place(self, scope: str) -> str:
        """The row for products of activations. The first part of a scope may be the name of the whole model."""
        parts = scope.split("/") if scope else []
        for end in range(len(parts), 0, -1):
            for start in (0, 1):
                inner = "/".join(parts[start:end])
                folders = [f for f in self.folders if inner and f"/{f}".endswith(f"/{inner}")]
                if folders:
                    return f"{min(folders, key=lambda f: (len(f), f))}/{PRODUCTS}"
        return "/".join([*parts, PRODUCTS])

    def join(self, other: _Rows) -> None:
        for name, output in other.outputs.items():
            self.outputs.setdefault(name, output)
        for name, macs in other.macs.items():
            self.add(name, macs)


def _walk(jaxpr: Jaxpr, origins: Sequence[Origin], rows: _Rows, times: int, scope: str) -> list[Origin]:
    """Counts the equations of a jaxpr that runs so many times; returns the origins of its outputs."""
    known = {**dict.fromkeys(jaxpr.constvars, ()), **dict(zip(jaxpr.invars, origins, strict=True))}
    read = lambda atom: () if isinstance(atom, Literal) else known[atom]
    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        where = "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
        inner = list(inner_jaxprs(equation))
        results = (
            _call(equation, inner, operands, rows, times, where)
            if inner
            else [_equation(equation, operands, rows, times, where)] * len(equation.outvars)
        )
        known |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(equation: Any, operands: Sequence[Origin], rows: _Rows, times: int, where: str) -> Origin:
    """Counts one equation; returns the origin of its results."""
    output = tuple(getattr(equation.outvars[0].aval, "shape", ())) if equation.outvars else ()
    macs = product(equation)
    if macs is None and None not in operands:
        return tuple(dict.fromkeys(path for origin in operands for path in origin))
    for origin in operands:
        rows.read(origin or (), output)
    if macs is not None:
        macs = Macs(*(times * number for number in macs))
        kernel = next((origin for origin in operands[1::-1] if origin), None)  # x @ kernel: the right one first
        if kernel:
            rows.multiply(kernel, macs)
        else:
            rows.read([name := rows.place(where)], output)
            rows.add(name, macs)
    return None


def _call(
    equation: Any, inner: Sequence[Jaxpr], operands: Sequence[Origin], rows: _Rows, times: int, where: str
) -> list[Origin]:
    name, none = equation.primitive.name, [None] * len(equation.outvars)
    if name == "cond":
        branches = [_Rows(rows.shapes) for _ in inner]
        for branch, own in zip(inner, branches, strict=True):
            _walk(branch, operands[1:], own, times, where)
        rows.join(max(branches, key=lambda own: sum(macs.total for macs in own.macs.values())))
        return none
    if name == "scan":
        first, last = scan_operands(equation.params)
        carried = [None] * (last - first)
        length = equation.params["length"]
        _walk(inner[0], [*operands[:first], *carried, *operands[last:]], rows, times * length, where)
        return none
    if name == "while":
        tests, bodies = equation.params["cond_nconsts"], equation.params["body_nconsts"]
        carried = [None] * (len(operands) - tests - bodies)
        for each, constants in zip(inner, (operands[:tests], operands[tests : tests + bodies]), strict=True):
            _walk(each, [*constants, *carried], rows, times, where)
        return none
    results = none
    for each in inner:
        fits = len(each.invars) == len(operands)
        outputs = _walk(each, operands if fits else [None] * len(each.invars), rows, times, where)
        results = outputs if len(inner) == 1 and len(outputs) == len(none) else none
    return results
