"""Which axes are the same channels: union-find over axes that may be products or sums of others.

Every axis of every value is a node. A node is a *leaf* of some size, a *product* of nodes
(a reshape merged them, row-major) or a *sum* of nodes (a concatenation). A leaf that turns
out to equal a product or a sum takes its form, so a kernel's axis of 3·H·D outputs becomes
(3 · H · D) or (H·D + H·D + H·D) by what happens later to the activation that it makes.

What cannot be cut is frozen, leaf by leaf, with the reason.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence

PRODUCT, SUM = "product", "sum"
Form = tuple[str, tuple[int, ...]]


class Mismatch(Exception):
    """Two forms have no common refinement."""


class Axes:
    """The nodes. A node is its number; sizes never change."""

    def __init__(self):
        self._parent: list[int] = []
        self._size: list[int] = []
        self._form: list[Form | None] = []
        self._why: list[str | None] = []  # of leaves: why frozen
        self._crossed: dict[int, set[str]] = defaultdict(set)  # of leaves

    def leaf(self, size: int, why: str | None = None) -> int:
        """A new node without form; frozen if a reason is given."""
        self._parent.append(len(self._parent))
        self._size.append(int(size))
        self._form.append(None)
        self._why.append(why)
        return len(self._parent) - 1

    def find(self, node: int) -> int:
        """The node that stands for all that are equal to this one."""
        root = node
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[node] != root:
            self._parent[node], node = root, self._parent[node]
        return root

    def size(self, node: int) -> int:
        return self._size[node]

    def form(self, node: int) -> Form | None:
        return self._form[self.find(node)]

    def product(self, parts: Sequence[int]) -> int:
        """The axis that a row-major reshape makes of these."""
        parts = [part for part in parts if self._size[part] != 1]
        return self._make(PRODUCT, parts, math.prod(self._size[part] for part in parts))

    def sum(self, parts: Sequence[int]) -> int:
        """The axis that a concatenation makes of these."""
        parts = [part for part in parts if self._size[part] != 0]
        return self._make(SUM, parts, sum(self._size[part] for part in parts))

    def _make(self, kind: str, parts: list[int], size: int) -> int:
        if len(parts) == 1:
            return parts[0]
        reasons = [self._why[self.find(part)] for part in parts]
        if all(reasons):  # frozen axes collect no form: windows and grids would make thousands of nodes
            return self.leaf(size, reasons[0] if reasons else None)
        node = self.leaf(size)
        self._form[node] = (kind, tuple(parts))
        return node

    def parts(self, node: int, kind: str | None = None) -> list[int]:
        """The node taken apart, through all nodes of this kind; with None down to its leaves."""
        result, pending = [], [node]
        while pending:
            node = self.find(pending.pop())
            form = self._form[node]
            if form and kind in (None, form[0]):
                pending.extend(reversed(form[1]))
            else:
                result.append(node)
        return result

    def freeze(self, node: int, why: str) -> None:
        """Forbids to cut any part of the node; a leaf keeps its first reason."""
        for leaf in self.parts(node):
            self._why[leaf] = self._why[leaf] or why

    def why(self, node: int) -> str | None:
        """Why nothing of the node can be cut; None if some of it can."""
        reasons = [self._why[leaf] for leaf in self.parts(node) if self._size[leaf] != 1]
        return reasons[0] if reasons and all(reasons) else None

    def cross(self, node: int, what: str) -> None:
        """Notes that a reduction runs over the node."""
        for leaf in self.parts(node):
            self._crossed[leaf].add(what)

    def crossed(self, leaf: int) -> tuple[str, ...]:
        return tuple(sorted(self._crossed[leaf]))

    def unify(self, a: int, b: int) -> None:
        """Makes two nodes equal. What has no common refinement is frozen, both sides, with that reason."""
        a, b = self.find(a), self.find(b)
        if a == b or self._size[a] == self._size[b] == 1:
            return
        frozen = next((node for node in (a, b) if self._form[node] is None and self._why[node]), None)
        if frozen is not None:
            self._unify_frozen(frozen, b if frozen == a else a)
        elif self._form[a] is None:
            self._become(a, b)
        elif self._form[b] is None:
            self._become(b, a)
        else:
            self._unify_forms(a, b)

    def _unify_frozen(self, frozen: int, other: int) -> None:
        self.freeze(other, self._why[frozen])
        if self._form[other] is None:
            self._become(other, frozen)

    def _become(self, leaf: int, node: int) -> None:
        self._parent[leaf] = node
        self._pass_on(leaf, node)

    def _pass_on(self, leaf: int, node: int) -> None:
        for what in self._crossed.pop(leaf, ()):
            self.cross(node, what)

    def _unify_forms(self, a: int, b: int) -> None:
        try:
            if self._size[a] != self._size[b]:
                raise Mismatch
            if self._form[a][0] == self._form[b][0] == PRODUCT:
                self._match(self.split_product, self.parts(a, PRODUCT), self.parts(b, PRODUCT))
            else:
                self._match(self.split_sum, self._segments(a), self._segments(b))
            self._parent[a] = b
        except Mismatch:
            why = f"{self.show(a)} and {self.show(b)} are the same axis, but have no common parts"
            self.freeze(a, why)
            self.freeze(b, why)

    def _match(self, split, a: Sequence[int], b: Sequence[int]) -> None:
        """Unifies two rows of nodes; the longer of two heads is split at the other's size."""
        a, b = deque(a), deque(b)
        while a and b:
            x, y = a.popleft(), b.popleft()
            if self._size[x] > self._size[y]:
                x, rest = split(x, self._size[y])
                a.appendleft(rest)
            elif self._size[x] < self._size[y]:
                y, rest = split(y, self._size[x])
                b.appendleft(rest)
            self.unify(x, y)

    def split_product(self, node: int, outer: int) -> tuple[int, int]:
        """node = outer · inner, as nodes of these sizes. Raises Mismatch if its parts do not nest so."""
        node = self.find(node)
        if outer in (1, self._size[node]):
            return (self.leaf(1), node) if outer == 1 else (node, self.leaf(1))
        if outer < 1 or self._size[node] % outer:
            raise Mismatch
        form = self._form[node]
        if form is None:
            return self._split_leaf(PRODUCT, node, outer, self._size[node] // outer)
        return self._split_factors(node, outer) if form[0] == PRODUCT else self._split_blocks(node, outer)

    def _split_leaf(self, kind: str, leaf: int, first: int, second: int) -> tuple[int, int]:
        why = self._why[leaf]
        parts = self.leaf(first, why), self.leaf(second, why)
        if not why:
            self._form[leaf] = (kind, parts)
            self._pass_on(leaf, leaf)
        return parts

    def _split_factors(self, node: int, outer: int) -> tuple[int, int]:
        taken, rest = [], deque(self.parts(node, PRODUCT))
        while outer > 1:
            factor = rest.popleft()
            if self._size[factor] > outer:
                factor, inner = self.split_product(factor, outer)
                rest.appendleft(inner)
            if outer % self._size[factor]:
                raise Mismatch
            taken.append(factor)
            outer //= self._size[factor]
        return self.product(taken), self.product(list(rest))

    def _split_blocks(self, node: int, outer: int) -> tuple[int, int]:
        """A sum as blocks of equal length: every segment is a number of blocks."""
        length = self._size[node] // outer
        segments = self._segments(node)
        if any(self._size[segment] % length for segment in segments):
            raise Mismatch
        block = self.leaf(length)
        counts = [self.leaf(self._size[segment] // length) for segment in segments]
        for segment, count in zip(segments, counts, strict=True):
            self.unify(segment, self.product([count, block]))
        return self.sum(counts), block

    def split_sum(self, node: int, first: int) -> tuple[int, int]:
        """node = first + second, as nodes of these sizes. Raises Mismatch if its parts forbid the cut."""
        node = self.find(node)
        if first in (0, self._size[node]):
            return (self.leaf(0), node) if first == 0 else (node, self.leaf(0))
        form = self._form[node]
        if form is None:
            return self._split_leaf(SUM, node, first, self._size[node] - first)
        if form[0] == SUM or len(self._segments(node)) > 1:
            return self._split_segments(node, first)
        outer, *inner = self.parts(node, PRODUCT)
        length = math.prod(self._size[factor] for factor in inner)
        if first % length:
            raise Mismatch
        return tuple(self.product([part, *inner]) for part in self.split_sum(outer, first // length))

    def _split_segments(self, node: int, first: int) -> tuple[int, int]:
        taken, rest = [], deque(self._segments(node))
        while first:
            segment = rest.popleft()
            if self._size[segment] > first:
                segment, remaining = self.split_sum(segment, first)
                rest.appendleft(remaining)
            taken.append(segment)
            first -= self._size[segment]
        return self.sum(taken), self.sum(list(rest))

    def _segments(self, node: int) -> list[int]:
        """The parts of a sum; also of a product whose outermost factor is one."""
        node = self.find(node)
        if self._form[node] is None or self._form[node][0] == SUM:
            return self.parts(node, SUM)
        outer, *inner = self.parts(node, PRODUCT)
        segments = self.parts(outer, SUM)
        return [node] if len(segments) == 1 else [self.product([segment, *inner]) for segment in segments]

    def show(self, node: int) -> str:
        """Sizes and form, for a message: "(3 * 4 * 16)"."""
        node = self.find(node)
        if self._form[node] is None:
            return str(self._size[node])
        kind, parts = self._form[node]
        return "(" + {PRODUCT: " * ", SUM: " + "}[kind].join(map(self.show, parts)) + ")"
