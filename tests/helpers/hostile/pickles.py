"""An assembler for pickles, and hostile ones made with it: each is small, and a checkpoint of it must be refused.

`PICKLES` and `MODULES` are whole bodies, `TENSORS` are values of a state dict. `hostile_archives.pth` makes files.
"""

from __future__ import annotations

import pickle
import struct

LONG_BINPUT, LONG_BINGET, BINGET = b"r", b"j", b"h"
ENDLESS = 3_990_000  # bytes of a pickle that is just not too long


def dump(value) -> bytes:
    """Any plain value, as part of a pickle."""
    return pickle.dumps(value, 2)[2:-1]


def text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def table(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def storage(key: bytes = text("0"), kind: bytes = name("torch", "FloatStorage"), word: str = "storage") -> bytes:
    return b"(" + text(word) + kind + key + text("cpu") + dump(4) + b"tQ"


def tensor(offset=0, size=(4,), stride=(1,), stored: bytes = storage(), version="_v2") -> bytes:
    """A call of torch's; each number may be the bytes of any part of a pickle instead."""
    parts = [part if isinstance(part, bytes) else dump(part) for part in (offset, size, stride)]
    return call(name("torch._utils", f"_rebuild_tensor{version}"), stored, *parts, dump(False), b"}")


def parameter(value: bytes) -> bytes:
    return call(name("torch._utils", "_rebuild_parameter"), value, dump(False), b"}")


def module(children: bytes = b"}", parameters: bytes = b"}") -> bytes:
    return call(name("torch.nn", "Module")) + table(_parameters=parameters, _buffers=b"}", _modules=children) + b"b"


def put(index: int) -> bytes:
    return LONG_BINPUT + struct.pack("<I", index)


def get(index: int) -> bytes:
    return LONG_BINGET + struct.pack("<I", index)


def doubled(levels: int) -> bytes:
    """A tuple of twice the same tuple of twice the same ...: short to write, long to walk."""
    return b")" + b"".join(put(i) + b"0" + get(i) + get(i) + b"\x86" for i in range(levels))


EVIL = {
    "os.system": call(name("posix", "system"), text("touch PWNED")),
    "eval": call(name("builtins", "eval"), text("open('PWNED', 'w')")),
    "getattr": call(name("builtins", "getattr"), name("os", "system"), text("__call__")),
    "Popen": name("subprocess", "Popen") + b"(" + text("touch PWNED") + b"t\x81",
    "STACK_GLOBAL": call(text("posix") + text("system") + b"\x93", text("touch PWNED")),
    "INST": b"(" + text("touch PWNED") + b"iposix\nsystem\n",
    "OBJ": b"(" + name("posix", "system") + text("touch PWNED") + b"o",
    "EXT": b"\x82\x01",
    "state of a function": name("torch._utils", "_rebuild_tensor") + b"N" + dump({"__defaults__": (1,)}) + b"\x86b",
    "state of a class": name("collections", "OrderedDict") + dump({"__setitem__": 1}) + b"b",
    "NEWOBJ_EX": name("os", "system") + b")}\x92",
    "module with a file's name": name("../../x", "y"),
}
PICKLES = {
    "nothing": b"",
    "no end": b"}" * 10 + b"\x95" + b"\xff" * 8,
    **{f"{word} alone": b"}" + code + b"0" for word, code in EVIL.items()},
    **{
        f"opcode {code} alone": bytes([code])
        for code in (*b"0125abdehjloqrstuQRST()]}\x81\x85\x86\x87\x90\x91\x92\x93\x94",)
    },
    "memo index 2^31": b"}" + put(1 << 31),
    "memo index 2^32-1": b"}" + put((1 << 32) - 1),
    "memo of nothing": b"}" + get(7),
    "three million tuples as a key": b"})" + b"\x85" * 3_000_000 + b"Ns",
    "tuples without end as a key": b"})" + b"\x85" * ENDLESS + b"Ns",
    "tuples without end in a set": b"})" + b"\x85" * ENDLESS + b"\x91",
    "lists without end": b"]" * ENDLESS + b"a" * 10,
    "lists in lists": b"]" * (ENDLESS // 2) + b"a" * (ENDLESS // 2 - 1),
    "dicts without end": b"}" * ENDLESS,
    "sets without end": b"\x8f" * ENDLESS,
    "marks without end": b"(" * ENDLESS,
    "memos without end": b"}" + b"\x94" * ENDLESS,
    "lists, each in the memo": b"]\x94" * (ENDLESS // 2),
    "names of classes": b"ca\nb\n" * (ENDLESS // 5),
    "ordered dicts": name("collections", "OrderedDict") + b"q\0" + b")Rh\0" * (ENDLESS // 4),
    "objects": name("a", "b") + b"q\0" + b")\x81h\0" * (ENDLESS // 4),
    "doubled tuples as a key": b"}" + doubled(60) + b"Ns",
    "doubled tuples in a frozen set": b"}(" + doubled(60) + b"\x91",
    "text of 2^62 bytes": b"\x8d" + struct.pack("<Q", 1 << 62),
    "bytes of 2^40 bytes": b"\x8e" + struct.pack("<Q", 1 << 40),
    "an array of 2^40 bytes": b"\x96" + struct.pack("<Q", 1 << 40),
    "a negative length": b"\x8b" + struct.pack("<i", -5),
    "a number of 900,000 bytes": b"\x8b" + struct.pack("<i", 900_000) + b"\x7f" * 900_000,
    "digits": b"I" + b"9" * 900_000 + b"\n",
    "a frame of 2^62 bytes": b"\x95" + struct.pack("<Q", 1 << 62),
    "protocol 255": b"\x80\xff}",
    "a list": b"]",
    "an empty state": b"}",
    "400,000 arguments, often": b"(" + b"N" * 400_000 + b"tq\0ca\nb\nq\1" + b"h\1h\0R" * 100_000,
    "the sizes of a long list, often": b"(" + b"N" * 400_000 + b"tq\0ctorch\nSize\nq\1" + b"h\1h\0\x85R" * 70_000,
    "the state of many": table(**{str(i): b"N" for i in range(40_000)}) + put(0) + b"ca\nb\n)Rh\0b" * 50_000,
}

TINY = tensor(0, (), (), storage(kind=name("torch", "CharStorage")))  # a 0-d int8, as a size
WRONG = {
    "bool": b"\x88",
    "0-d array": TINY,
    "negative": dump(-1),
    "2^31": dump(1 << 31),
    "2^63": dump(1 << 63),
    "10^30": dump(10**30),
    "fraction": dump(1.5),
    "nan": dump(float("nan")),
    "None": b"N",
    "text": text("1"),
    "list": b"]",
}
TENSORS = {
    **{f"size {word}": tensor(size=value + b"\x85") for word, value in WRONG.items()},
    **{f"stride {word}": tensor(stride=value + b"\x85") for word, value in WRONG.items()},
    **{f"offset {word}": tensor(offset=value) for word, value in WRONG.items()},
    "10^9 of stride 0": tensor(size=(10**9,), stride=(0,)),
    "5 of stride 0": tensor(size=(5,), stride=(0,)),
    "2^32 x 2^32": tensor(size=(1 << 32, 1 << 32), stride=(0, 0)),
    "narrow numbers that wrap": tensor(size=TINY + b"\x85", stride=TINY + b"\x85"),
    "one too far": tensor(offset=1),
    "fewer strides": tensor(size=(2, 2)),
    "sizes that are a list": tensor(size=[4], stride=[1]),
    "sizes that are a tensor": tensor(size=tensor()),
    "sizes that are text": tensor(size=text("4"), stride=text("1")),
    "70 axes": tensor(size=(1,) * 70, stride=(1,) * 70),
    "200,000 axes": tensor(size=(1,) * 200_000, stride=(1,) * 200_000),
    "doubled sizes": tensor(size=doubled(60), stride=doubled(60)),
    "no arguments": call(name("torch._utils", "_rebuild_tensor")),
    "a list as arguments": name("torch._utils", "_rebuild_tensor") + b"]R",
    "no storage": tensor(stored=b"N"),
    "text as a storage": tensor(stored=text("0")),
    "a tensor as a storage": tensor(stored=tensor(size=(2, 2), stride=(2, 1))),
    "a missing storage": tensor(stored=storage(text("7"))),
    "a storage elsewhere": tensor(stored=storage(text("../../../../etc/passwd"))),
    "a number as a key": tensor(stored=storage(dump(0))),
    "doubled tuples as a storage's key": tensor(stored=storage(doubled(60))),
    "a storage of an unknown kind": tensor(stored=storage(kind=name("torch", "QInt8Storage"))),
    "a kind that is text": tensor(stored=storage(kind=text("FloatStorage"))),
    "a kind that is a tuple": tensor(stored=storage(kind=doubled(60))),
    "a persistent id of something else": tensor(stored=storage(word="module")),
    "a persistent id of two": tensor(stored=b"NN\x86Q"),
    "a persistent id that is text": tensor(stored=text("storage") + b"Q"),
    "a tensor beyond, as a parameter": parameter(tensor(size=(5,))),
    "version 3": tensor(version="_v3"),
    "tensors without end": tensor()
    + b"0"
    + tensor(version="")[:-2]
    + b"tR"
    + b"0"
    + b"".join(
        [
            name("torch._utils", "_rebuild_tensor"),
            put(1),
            storage(),
            put(2),
            b"00",
            (get(1) + b"(" + get(2) + b"K\0K\4\x85K\1\x85tR0") * 40_000,
        ]
    ),
}


def nested(levels: int) -> bytes:
    """A module whose two children are one, and so on down."""
    body = module(parameters=table(w=tensor())) + put(0)
    for level in range(levels):
        body += b"0" + module(table(a=get(level), b=get(level))) + put(level + 1)
    return body


def chain(levels: int) -> bytes:
    """Modules in modules, each with a parameter of its own."""
    start = tensor() + put(0) + b"0" + module() + put(1)
    link = b"0" + module(table(m=get(1)), table(w=get(0))) + put(1)
    return start + link * levels


MODULES = {
    "modules shared 28 levels deep": nested(28),
    "modules shared 2,000 levels deep": nested(2_000),
    "modules 5,000 deep": chain(5_000),
    "a module in itself": call(name("a", "b")) + put(0) + table(_modules=table(a=get(0), b=get(0))) + b"b",
    "a state dict in itself": b"}" + put(0) + text("model") + get(0) + b"s",
    "state dicts 20,000 deep": b"}" + (put(0) + b"0}" + text("model") + get(0) + b"s") * 20_000,
    "modules with the same 50,000 parts": table(**{str(i): b"N" for i in range(50_000)}) + put(0)
    + b"0(" + (module(parameters=get(0))) * 3_000 + b"t0" + module(parameters=get(0)),
    "a name of 900,000 letters": module(parameters=table(**{"w" * 900_000: tensor()})),
    "parts that are a list": call(name("a", "b")) + table(_parameters=b"]", _modules=b"]") + b"b",
    "a state that is a tuple": call(name("a", "b")) + b"NN\x86b",
    "a module without parameters": module(),
}  # fmt: skip
