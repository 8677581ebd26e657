"""The result of `find_groups`: which axes of which arrays are the same channels. Data, and a way to run what is cut."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from slimsam_jax.errors import InputError
from slimsam_jax.pruning import structure
from slimsam_jax.pruning.groups import Keep, Tree
from slimsam_jax.pruning.structure import Structure

FORMAT = 1
MOST_PIECES = 10**5  # of an unfolded array; one of many axes that are all sums has any number of them


@dataclasses.dataclass(frozen=True)
class Place:
    """One axis in which channels of a group lie.

    Attributes:
      path: the array's.
      axis: its number.
      structure: of the whole axis: the group's name, or a product or sum in which it stands.
    """

    path: str
    axis: int
    structure: Structure


@dataclasses.dataclass(frozen=True)
class FoundGroup:
    """Channels 0..size-1, each of which can only be cut everywhere at once.

    Attributes:
      name: path and axis of the first array that has them, as "encoder/dense/kernel:1".
      size: number of channels.
      members: the axes in which they lie, in the order of use.
      crossed: names of the reductions that run over them ("reduce_sum" of a norm, "reduce_max" of a softmax), and of
        what else sees a masked channel: a contraction of activations that are not zero there, a division by zero.
        If it is empty, masked and cut are the same function.
      copies: the name of a group that numbers copies which may each keep channels of their own (the heads), or None.
    """

    name: str
    size: int
    members: tuple[Place, ...]
    crossed: tuple[str, ...] = ()
    copies: str | None = None


@dataclasses.dataclass(frozen=True)
class Grouping:
    """The groups of a function, and the function itself with the widths that are left (`run`).

    Attributes:
      groups: in the order of use.
      axes: {path: the structure of each of its axes} of every array that the function reads.
      frozen: {"path:axis": why} of the axes longer than one that cannot be cut.
      unused: paths of the arrays that the function never reads.
      kernels: paths of those that a matrix product or a convolution reads; they vote on the importance of a channel.
      traced: the function, a `rerun.Traced`; None if the grouping was read from JSON.
    """

    groups: tuple[FoundGroup, ...]
    axes: Mapping[str, tuple[Structure, ...]]
    frozen: Mapping[str, str]
    unused: tuple[str, ...] = ()
    kernels: frozenset[str] = frozenset()
    traced: Any = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def widths(self) -> dict[str, int]:
        """{group: its size}."""
        return {group.name: group.size for group in self.groups}

    def run(self, params: Tree, *inputs: Any, keep: Keep | None = None, recount: bool = False) -> Any:
        """The traced function on cut parameters: the same equations with other shapes, so no model class is asked.

        Numbers that the trace holds stay as they are, so that cut and masked agree: the 1/D of a mean (see `recount`),
        the 1/sqrt(d) of an attention. Custom derivatives and rematerialisation are gone. It may be jitted,
        differentiated, exported and traced again.

        Args:
          params: as `pruning.shrink` returns them; the full ones will do.
          inputs: of the shapes that were traced.
          keep: what `shrink` kept. Needed for trees that this very object has not shrunk, where their shapes do not
            tell the widths (an axis of heads · channels tells their product) or a constant of the function is cut.
          recount: a mean over cut channels divides by how many are left, as in a class that is rebuilt at the new
            widths, and as `project` needs it.

        Raises:
          InputError: the shapes are not those of cut parameters or of the inputs; or `keep` is needed.
        """
        if self.traced is None:
            raise InputError("this grouping was read from JSON, without the function: trace it again with find_groups")
        return self.traced.run(self, params, inputs, keep, recount)

    def to_json(self) -> str:
        """Everything but the function. `from_json` reads it."""
        groups = [{k: getattr(group, k) for k in ("name", "size", "crossed", "copies")} for group in self.groups]
        axes = {path: [structure.to_json(axis) for axis in axes] for path, axes in self.axes.items()}
        rest = {"frozen": dict(self.frozen), "unused": self.unused, "kernels": sorted(self.kernels)}
        return json.dumps({"format": FORMAT, "groups": groups, "axes": axes, **rest})

    @classmethod
    def from_json(cls, text: str) -> Grouping:
        """Reads what `to_json` wrote: enough to score, select, mask and shrink, not to run.

        Raises:
          InputError: it is not such a text.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise InputError(f"the grouping has format {data['format']!r}; this version reads {FORMAT}")
            axes = {path: tuple(map(structure.from_json, axes)) for path, axes in data["axes"].items()}
            members = places(axes)
            groups = tuple(
                FoundGroup(
                    group["name"], _size(group), members[group["name"]], tuple(group["crossed"]), group["copies"]
                )
                for group in data["groups"]
            )
            frozen = {str(axis): str(why) for axis, why in data["frozen"].items()}
            return cls(groups, axes, frozen, tuple(data["unused"]), frozenset(data["kernels"]))._checked()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"this is not the JSON of a grouping ({type(error).__name__}: {error})") from None

    def _checked(self) -> Grouping:
        known = self.widths.keys()
        if len(known) < len(self.groups):
            raise InputError("the grouping lists a group twice")
        for path, axes in self.axes.items():
            for name in (name for axis in axes for name in structure.names(axis)):
                if name not in known:
                    raise InputError(f"{path} has channels of a group {name!r} that the grouping does not list")
            if (count := structure.count_pieces(axes)) > MOST_PIECES:
                raise InputError(f"{path} would fall into {count} pieces; at most {MOST_PIECES} are read")
        for group in self.groups:
            if group.copies not in (None, *known - {group.name}):
                raise InputError(
                    f"group {group.name!r} has copies numbered by {group.copies!r}, which is no other group"
                )
        self._check_copies({group.name: group.copies for group in self.groups if group.copies})
        return self

    def _check_copies(self, numbered: Mapping[str, str]) -> None:
        for path, axes in self.axes.items():
            if numbered.keys() & {name for axis in axes for name in structure.names(axis)}:
                for piece in structure.pieces_of(axes):
                    if alone := [name for name in piece if name in numbered and numbered[name] not in piece]:
                        raise InputError(f"{path}: group {alone[0]!r} has no {numbered[alone[0]]!r} beside it")


def _size(group: Mapping[str, Any]) -> int:
    if type(group["size"]) is not int or not 0 < group["size"] < 2**31:
        raise InputError(f"group {group['name']!r} has the size {group['size']!r}, not a number of channels")
    return group["size"]


def places(axes: Mapping[str, Sequence[Structure]]) -> dict[str, tuple[Place, ...]]:
    """{group: where its channels lie}."""
    found: dict[str, list[Place]] = {}
    for path, own in axes.items():
        for i, axis in enumerate(own):
            for name in dict.fromkeys(structure.names(axis)):
                found.setdefault(name, []).append(Place(path, i, axis))
    return {name: tuple(members) for name, members in found.items()}
