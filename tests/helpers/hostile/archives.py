"""Zip archives as `torch.save` writes them, and hostile ones: each is small, and must be refused."""

from __future__ import annotations

import functools
import io
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from helpers.hostile.pickles import name, storage, table, tensor, text

WORD = b"d" * 16  # a storage; as int8 it says 100, and 99 x 100 is -84
BOMB = 300_000_000  # bytes of zeros, which deflate to 0.3 MB


def pth(body: bytes, compression=zipfile.ZIP_STORED, **members: bytes) -> bytes:
    """An archive with this pickle and, unless given as `d0`, one storage of 16 bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + body + b".")
        for key, content in ({"d0": WORD} | members).items():
            archive.writestr(f"x/data/{key[1:]}", content)
    return buffer.getvalue()


def of_state(state: dict[str, np.ndarray], **changed: bytes) -> bytes:
    """A plain checkpoint of float32 arrays; `changed` has the pickled value of some of them."""
    items, members = {}, {}
    for number, (key, given) in enumerate(state.items()):
        array = np.array(given, order="C")
        members[f"d{number}"] = array.tobytes()
        strides = tuple(step // array.itemsize for step in array.strides)
        kind = {"f4": "Float", "f8": "Double", "i8": "Long", "c8": "ComplexFloat"}[array.dtype.str[1:]]
        stored = storage(text(str(number)), name("torch", f"{kind}Storage"))
        items[key] = tensor(0, array.shape, strides, stored)
    return pth(table(**{**items, **changed}), **members)


def patched(content: bytes, start: int, value: bytes) -> bytes:
    return content[:start] + value + content[start + len(value) :]


def in_directory(field: int, value: bytes, content: bytes = pth(table(w=tensor()))) -> bytes:
    """The archive with another value in the directory's entry of its pickle."""
    return patched(content, content.index(b"PK\1\2") + field, value)


def old_format() -> bytes:
    return b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}))


def deflated(**sizes: int) -> bytes:
    """An archive in which members of these sizes are bombs."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, content in (("data.pkl", b"\x80\x02" + table(w=tensor()) + b"."), ("data/0", WORD)):
            kind = zipfile.ZIP_DEFLATED if member in sizes else zipfile.ZIP_STORED
            archive.writestr(f"x/{member}", bytes(sizes[member]) if member in sizes else content, kind)
    return buffer.getvalue()


def many_members(count: int) -> bytes:
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"x"
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count & 0xFFFF, count & 0xFFFF, count * len(entry), 0, 0)
    return entry * count + end


def sparse(path: Path, body: bytes, size: int) -> None:
    """Writes an archive whose one storage is `size` zeros, which take no place on a disk."""
    content, unknown = pth(body, d0=b""), b"\xff" * 4
    at, directory = content.rindex(b"PK\3\4"), content.index(b"PK\1\2")
    entries = content[directory : content.index(b"PK\5\6")]
    second = entries.rindex(b"PK\1\2")
    wide = struct.pack("<2H2Q", 1, 16, size, size)  # where the lengths of long members are said
    last = patched(patched(entries[second:], 20, unknown * 2), 30, struct.pack("<H", len(wide))) + wide
    entries, start = entries[:second] + last, directory + size
    end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, len(entries), start)
    end += struct.pack("<4sIQI", b"PK\6\7", 0, start + len(entries), 1)
    end += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 2, 2, len(entries), 0xFFFFFFFF, 0)
    with path.open("wb") as file:
        file.write(content[:at] + patched(content[at:directory], 18, unknown * 2))
        file.seek(start)
        file.write(entries + end)


GOOD = pth(table(w=tensor()))


@functools.cache
def archives() -> dict[str, bytes]:
    """{what is wrong: the file}. Made where they are asked for: bombs take a second, and every worker imports this."""
    return {
        "empty": b"",
        "text": b"hello",
        "zeros": bytes(4096),
        "before PyTorch 1.6": old_format(),
        "gzip": zlib.compress(GOOD),
        **{f"cut to {share} %": GOOD[: len(GOOD) * share // 100] for share in range(5, 100, 10)},
        "only an end": many_members(0),
        "40,000 members": many_members(40_000),
        "a directory of 5 MB": many_members(100_000),
        **{f"pickle by {method}": pth(table(w=tensor()), method) for method in (8, 12, 14)},
        "pickle a bomb": deflated(**{"data.pkl": BOMB}),
        "storage a bomb": deflated(**{"data/0": BOMB}),
        "encrypted": in_directory(8, b"\1"),
        "longer than the file": in_directory(20, struct.pack("<2I", 1 << 31, 1 << 31)),
        "begins beyond the file": in_directory(42, struct.pack("<I", 1 << 31)),
        "begins elsewhere": in_directory(42, struct.pack("<I", 7)),
        "name longer than the directory": in_directory(28, b"\xff\xff"),
        "another extra field": in_directory(30, b"\xff\xff"),
        "no pickle": many_members(3),
        "pickle too long": pth(b"N" * 1_100_000),
        "storage with another check sum": GOOD.replace(struct.pack("<I", zlib.crc32(WORD)), b"\1\2\3\4"),
    }
