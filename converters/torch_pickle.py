"""Reads a pickle as data: what a checkpoint needs is made, and nothing foreign is imported, called or hashed.

The unpickler in C reserves memory for any memo index, hashes tuples nested millions deep until the stack ends, and
copies whatever a pickle asks for, as often as it asks. This is the standard library's in Python with the opcodes that
`torch.save` writes, each of which costs no more than about its own length in the file.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

_OPCODES = b"".join(
    (
        pickle.PROTO + pickle.FRAME + pickle.STOP + pickle.MARK + pickle.POP + pickle.POP_MARK,
        pickle.NONE + pickle.NEWTRUE + pickle.NEWFALSE + pickle.BININT + pickle.BININT1 + pickle.BININT2,
        pickle.LONG1 + pickle.LONG4 + pickle.BINFLOAT + pickle.BINBYTES + pickle.SHORT_BINBYTES + pickle.BINBYTES8,
        pickle.BINUNICODE + pickle.SHORT_BINUNICODE + pickle.BINUNICODE8 + pickle.BINSTRING + pickle.SHORT_BINSTRING,
        pickle.EMPTY_TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3 + pickle.TUPLE,
        pickle.EMPTY_LIST + pickle.EMPTY_DICT + pickle.GLOBAL + pickle.STACK_GLOBAL + pickle.BINPERSID,
        pickle.BINGET + pickle.LONG_BINGET + pickle.BINPUT + pickle.LONG_BINPUT + pickle.MEMOIZE,
    )
)


MOST_OPCODES = 250_000  # half a second on a slow core; SAM-H's pickle, with those of its optimizer, has 0.1 million


class _Metered(dict):
    """Opcodes' handlers, of which so many are given out in all: a byte of a pickle may be an opcode."""

    def __init__(self, handlers: Mapping[int, Callable[[Any], None]], most: int):
        super().__init__(handlers)
        self.left = most

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError(f"its pickle has more than {MOST_OPCODES} steps; save the state dict alone")
        return super().__getitem__(code)


class Inert:
    """Stands in for any class, function or object; keeps the state that a pickle gives it, unread."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: Any = None


class Ordered(dict):
    """An `OrderedDict`; `state` is what a pickle sets beside its items, unread, such as a state dict's `_metadata`."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None


class Maker:
    """A function that a pickle may call: `make` is given the arguments as one tuple."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[[tuple], Any]) -> None:
        self.make = make


class Unpickler(pickle._Unpickler):
    """Reads one pickle into dicts with strings as keys, lists, tuples, scalars, `Inert`s and what `names` stand for.

    Args:
      file: the pickle; how long it may be is the caller's affair.
      names: (module, name) -> what stands for it; a `Maker` is called by REDUCE. Any other name is an `Inert`.
      storage: what becomes of a persistent id.
    """

    dispatch = {code: pickle._Unpickler.dispatch[code] for code in _OPCODES}  # noqa: RUF012 (as the library has it)

    def __init__(self, file: BinaryIO, names: Mapping[tuple[str, str], Any], storage: Callable[[Any], Any]):
        super().__init__(file)
        self.names, self.persistent_load = names, storage
        self.dispatch = _Metered(self.dispatch, MOST_OPCODES)

    def load(self) -> Any:
        """The object.

        Raises:
          UnpicklingError: it is damaged, or holds what `torch.save` does not write.
        """
        try:
            return super().load()
        except (LookupError, EOFError, struct.error):
            raise pickle.UnpicklingError("its pickle is damaged, or holds what torch.save does not write") from None

    def find_class(self, module: str, name: str) -> Any:
        self.dispatch.left -= 4  # a name takes five times as long as most
        known = self.names.get((module, name))
        return Inert() if known is None else known

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        called = self.stack[-1]
        if type(arguments) is not tuple:
            raise pickle.UnpicklingError("it calls something without a tuple of arguments")
        self.stack[-1] = called.make(arguments) if type(called) is Maker else Inert()

    def _build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) in (Inert, Ordered):
            self.stack[-1].state = state

    def _new(self, arguments: int) -> None:
        """An object of a class, which is given 1 or 2 arguments."""
        del self.stack[-1 - arguments :]
        self.stack.append(Inert())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(items)

    def _update(self, items: list[Any]) -> None:
        """What has no string as a key is left out: no parameter has one, and hashing a tuple may take for ever."""
        if isinstance(self.stack[-1], dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            self.stack[-1].update((key, value) for key, value in pairs if type(key) is str)

    def _pop_pair(self) -> list[Any]:
        value = self.stack.pop()
        return [self.stack.pop(), value]

    dispatch |= {
        pickle.REDUCE[0]: _reduce,
        pickle.BUILD[0]: _build,
        pickle.NEWOBJ[0]: lambda self: self._new(1),
        pickle.NEWOBJ_EX[0]: lambda self: self._new(2),
        pickle.APPEND[0]: lambda self: self._extend([self.stack.pop()]),
        pickle.APPENDS[0]: lambda self: self._extend(self.pop_mark()),
        pickle.SETITEM[0]: lambda self: self._update(self._pop_pair()),
        pickle.SETITEMS[0]: lambda self: self._update(self.pop_mark()),
        # A set is left out, and None in its place.
        pickle.EMPTY_SET[0]: lambda self: self.stack.append(None),
        pickle.ADDITEMS[0]: lambda self: self.pop_mark(),
        pickle.FROZENSET[0]: lambda self: (self.pop_mark(), self.stack.append(None)),
    }
