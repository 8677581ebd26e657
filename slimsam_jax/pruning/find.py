"""Finds the groups of any JAX function: which axes of its parameters are the same channels."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from slimsam_jax.errors import InputError, printable
from slimsam_jax.pruning.axes import Axes
from slimsam_jax.pruning.copies import copies
from slimsam_jax.pruning.graph import Graph
from slimsam_jax.pruning.grouping import FoundGroup, Grouping, places
from slimsam_jax.pruning.groups import Tree, path_of
from slimsam_jax.pruning.patterns import fits
from slimsam_jax.pruning.rerun import Traced
from slimsam_jax.pruning.rules.call import Nodes, fresh
from slimsam_jax.pruning.silence import Silence
from slimsam_jax.pruning.structure import names
from slimsam_jax.tracing.program import Program, trace


def find_groups(function: Callable, params: Tree, *inputs: Any, keep: Sequence[str] = ()) -> Grouping:
    """Traces a function and finds which axes of its parameters can only be cut together.

    The counterpart of DepGraph (Fang et al., CVPR 2023), from the jaxpr: no module and no
    class is asked, and a primitive without a rule freezes what it touches and is named.

    Args:
      function: (params, *inputs) -> anything, traceable; run on shapes alone.
      params: any tree of arrays, or of `jax.ShapeDtypeStruct`.
      inputs: what else it takes, arrays or structs. Axes of inputs and of outputs cannot be cut.
      keep: what may not be cut: an array "head/kernel", all below "head", one axis "head/kernel:1", or a pattern
        such as "*/norm1/*".

    Returns:
      the groups; the frozen axes with their reasons; what is never read; and the function, to be run when cut.

    Raises:
      InputError: `params` holds something else than arrays, the function cannot be traced, a path to keep is not
        there, or nothing can be cut.
    """
    arrays = _arrays(params)
    arguments = jax.tree.map(_shape, (params, *inputs))
    try:
        values, program, result = trace(function, arguments)
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise InputError(f"the function cannot be traced: {type(error).__name__}: {reason}") from error
    if not program.outputs:
        raise InputError("the function returns no array, so all of it is dead code")
    axes = Axes()
    number = dict(zip(arrays, program.inputs, strict=False))
    nodes = {number[path]: fresh(axes, tuple(array.shape)) for path, array in arrays.items()}
    others = program.inputs[len(arrays) :]
    nodes |= {value: fresh(axes, values.shape(value), "an axis of an input") for value in others}
    for path, axis in _kept(arrays, _patterns(keep)):
        axes.freeze(nodes[number[path]][axis], "kept by request")
    graph = Graph(values, nodes, {value: path for path, value in number.items()}, axes)
    for output in graph.walk(program):
        _freeze(axes, output, "an axis of an output")
    return _grouping(graph, program, {path: nodes[value] for path, value in number.items()}, arguments, result)


def _arrays(params: Tree) -> dict[str, Any]:
    arrays = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = path_of(keys)
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise InputError(f"parameter {path!r} is a {type(leaf).__name__}, not an array")
        if isinstance(leaf.dtype, np.dtype) and leaf.dtype.kind in "OSUMm":  # a key of random numbers has another type
            raise InputError(f"parameter {path!r} holds {leaf.dtype}, not numbers")
        if path in arrays:
            raise InputError(f"two parameters have the path {path!r}")
        arrays[path] = leaf
    if not arrays:
        raise InputError("there are no parameters: the tree has no arrays")
    return arrays


def _patterns(keep: Any) -> Sequence[str]:
    patterns = (keep,) if isinstance(keep, str) else keep
    if not isinstance(patterns, list | tuple | set | frozenset) or not all(isinstance(each, str) for each in patterns):
        raise InputError(f"keep= takes paths or patterns of paths, not {printable(repr(keep), 60)}")
    return patterns


def _shape(leaf: Any) -> Any:
    has_shape = hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if has_shape else leaf


def _kept(arrays: Mapping[str, Any], patterns: Sequence[str]) -> Iterator[tuple[str, int]]:
    """(path, axis) of what is to be kept."""
    every = {f"{path}:{axis}": (path, axis) for path, array in arrays.items() for axis in range(len(array.shape))}
    for pattern in patterns:
        found = [place for name, place in every.items() if fits(name, pattern)]
        if not found:
            nearest = ", ".join(difflib.get_close_matches(pattern, arrays, n=3, cutoff=0))
            raise InputError(f"keep={pattern!r} matches no parameter; the nearest are {nearest}")
        yield from found


def _freeze(axes: Axes, nodes: Nodes, why: str) -> None:
    for node in nodes:
        axes.freeze(node, why)


def _grouping(graph: Graph, program: Program, params: Mapping[str, Nodes], arguments: Any, result: Any) -> Grouping:
    read = {path: value in program.read for path, value in zip(params, program.inputs, strict=False)}
    order = [path for path in dict.fromkeys((*graph.order, *params)) if read[path]]
    named = _names(graph.axes, {path: params[path] for path in order})
    resolve = graph.resolver(named)
    structures = {path: tuple(map(resolve, params[path])) for path in order}
    frozen = _frozen(graph.axes, params, structures)
    if not named:
        first = "; ".join(f"{axis}: {why}" for axis, why in list(frozen.items())[:3])
        raise InputError(f"nothing can be cut ({first or 'no parameter is read, or all axes have length 1'})")
    rows = lambda many: [tuple(map(resolve, nodes)) for nodes in many]
    steps = ({step: rows(nodes) for step, nodes in of.items()} for of in (graph.operands, graph.results))
    outputs = {inner: rows(nodes) for inner, nodes in graph.outputs.items()}
    traced = Traced(graph.values, program, *steps, outputs, jax.tree.structure(arguments), result)
    crossed = _crossed(graph.axes, named, traced, [structures.get(path, ()) for path in params])
    numbered = copies(list(crossed), crossed, rows(graph.rows))
    sizes = {name: graph.axes.size(leaf) for leaf, name in named.items()}
    members = places(structures)
    groups = tuple(FoundGroup(n, sizes[n], members[n], crossed[n], numbered.get(n)) for n in named.values())
    unused = tuple(path for path in params if not read[path])
    return Grouping(groups, structures, frozen, unused, frozenset(graph.kernels), traced)


def _frozen(axes: Axes, params: Mapping[str, Nodes], structures: Mapping[str, tuple]) -> dict[str, str]:
    """{"path:axis": why}"""
    return {
        f"{path}:{i}": axes.why(params[path][i]) or "indexed one by one"
        for path, own in structures.items()
        for i, structure in enumerate(own)
        if not names(structure) and axes.size(params[path][i]) > 1
    }


def _crossed(axes: Axes, named: Mapping[int, str], traced: Traced, params: list[tuple]) -> dict[str, tuple[str, ...]]:
    """{group: names of the reductions over it}, and of the contractions that would count a masked channel."""
    silent = [frozenset(name for axis in own for name in names(axis)) for own in params]
    inputs = [frozenset()] * (len(traced.program.inputs) - len(params))
    read = [Silence(traced.values, traced.operands, traced.results, throughout) for throughout in (True, False)]
    for silence in read:
        silence.walk(traced.program, [*silent, *inputs])
    counted = {name: {*read[0].counted[name], *read[1].counted[name]} for name in named.values()}
    return {name: tuple(sorted({*axes.crossed(leaf), *counted[name]})) for leaf, name in named.items()}


def _names(axes: Axes, params: Mapping[str, Nodes]) -> dict[int, str]:
    """{leaf: name} of all groups: the first axis that is the group, "a/kernel:1"; else the first that has it, with the
    number of the part, "a/kernel:1.0".
    """
    whole, part = {}, {}
    for path, nodes in params.items():
        for i, node in enumerate(nodes):
            leaves = [leaf for leaf in dict.fromkeys(axes.parts(node)) if axes.size(leaf) > 1 and not axes.why(leaf)]
            for k, leaf in enumerate(leaves):
                part.setdefault(leaf, f"{path}:{i}.{k}")
            if leaves and axes.find(node) == leaves[0]:
                whole.setdefault(leaves[0], f"{path}:{i}")
    return {leaf: whole.get(leaf, name) for leaf, name in part.items()}
