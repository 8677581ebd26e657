"""Makes hostile archives, images and file names: small ones, header by header where no library would."""

from __future__ import annotations

import gzip
import io
import os
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def image_bytes(width: int = 30, height: int = 20, kind: str = "PNG", mode: str = "RGB", **kw: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height), 1).save(file, kind, **kw)
    return file.getvalue()


def header(name: str = "x.png", size: bytes = b"", kind: bytes = b"0", **fields: bytes) -> bytes:
    """A tar header whose checksum is right, whatever else is in it."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[156:157] = kind
    block[124:136] = size.ljust(12, b"\0") if size else b"%011o\0" % 0
    for where, value in fields.items():
        start = int(where.removeprefix("at"))
        block[start : start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def base256(number: int) -> bytes:
    """A size as GNU writes large and negative ones."""
    return (bytes([0x80]) if number >= 0 else bytes([0xFF])) + (number % 2**88).to_bytes(11, "big")


def member(name: str, content: bytes, **kw: Any) -> bytes:
    return header(name, b"%011o\0" % len(content), **kw) + content + bytes(-len(content) % 512)


def pax(*records: bytes, size: bytes = b"") -> bytes:
    content = b"".join(records)
    return header("pax", size or b"%011o\0" % len(content), b"x") + content + bytes(-len(content) % 512)


def record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(b"%d" % length) + len(rest) != length:
        length += 1
    return b"%d" % length + rest


GOOD = image_bytes()
FIRST, LAST = member("a.png", GOOD), member("b.png", GOOD)
END = bytes(1024)
TARS: dict[str, bytes] = {
    "text": b"no tar at all" * 100,
    "empty": b"",
    "packed": gzip.compress(FIRST + END),
    "bad checksum": b"\0" + FIRST[1:] + END,
    "negative size": FIRST + header(size=base256(-1024)) + LAST + END,
    "back to the start": FIRST + header(size=base256(-len(FIRST) - 512)) + LAST + END,
    "negative octal size": FIRST + header(size=b"-0000001000") + LAST + END,
    "size of 2^80": FIRST + header(size=base256(2**80)) + LAST + END,
    "size of 2^63": FIRST + header(size=base256(2**63)) + LAST + END,
    "size of 8 GiB": FIRST + header(size=b"77777777777") + LAST + END,
    "size of no number": FIRST + header(size=b"xyz") + LAST + END,
    "PAX size below 0": FIRST + pax(record(b"size", b"-1024")) + LAST + END,
    "PAX size of 5000 digits": FIRST + pax(record(b"size", b"9" * 5000)) + LAST + END,
    "PAX size of 2^70": FIRST + pax(record(b"size", b"%d" % 2**70)) + LAST + END,
    "PAX header of 8 GiB": FIRST + pax(size=b"77777777777") + LAST + END,
    "PAX header of 2^90": FIRST + pax(size=base256(2**80)) + LAST + END,
    "PAX header below 0": FIRST + pax(size=base256(-512)) + LAST + END,
    "PAX record of 0": FIRST + pax(b"0 path=x\n") + LAST + END,
    "PAX record of 2": FIRST + pax(b"6 a=b\n", b"0 \n") + LAST + END,
    "PAX record too long": FIRST + pax(b"999999 path=x\n") + LAST + END,
    "PAX record of no number": FIRST + pax(b"x path=x\n") + LAST + END,
    "PAX record without end": FIRST + pax(b"10 path=xx") + LAST + END,
    "long name of 8 GiB": FIRST + header(size=b"77777777777", kind=b"L") + LAST + END,
    "long name of 2 MiB": FIRST + member("L", b"n" * 2**21, kind=b"L") + LAST + END,
    "long link below 0": FIRST + header(size=base256(-512), kind=b"K") + LAST + END,
    "long name at the end": FIRST + member("L", b"n" * 100, kind=b"L") + END,
    "sparse without end": FIRST + header(kind=b"S", at482=b"\1") + b"\1" * 512,
    "cut in a header": FIRST + LAST[:100],
    "cut in an image": FIRST + LAST[:530],
    "cut between": FIRST,
    "bad checksum later": FIRST + b"\0" + LAST[1:] + END,
    "image of 8 GiB": member("a.png", GOOD) + header("b.png", b"77777777777"),
    "name of 200 kB": pax(record(b"path", b"n" * 200_000 + b".png")) + member("a.png", b"no image") + FIRST + END,
    "name with NUL and ESC": pax(record(b"path", b"\0\x1b[31m\n.png")) + member("a.png", b"no image") + FIRST + END,
    "name of no UTF-8": member("x", b"no image", at0=b"\xff\xfe.png") + FIRST + END,
    "name that climbs": member("../../../x.png", b"no image") + FIRST + END,
    "annotation that is damaged": FIRST + member("a.json", b'{"annotations": [3]}') + END,
    "annotation of 8 GiB": FIRST + header("a.json", b"77777777777"),
}
SOUND_TARS: dict[str, bytes] = {
    "2000 long names": b"".join(member("L", b"n%d.png\0" % i, kind=b"L") for i in range(2000)) + FIRST + END,
    "2000 PAX headers": pax(record(b"path", b"n.png")) * 2000 + FIRST + END,
    "links and devices": b"".join(header(f"{k}.png", kind=b"%d" % k) for k in range(1, 7)) + FIRST + END,
    "links with a size": header("l.png", b"77777777777", b"2") + FIRST + END,
    "a name for all": header("g", b"%011o\0" % 11, b"g") + record(b"path", b"x").ljust(512, b"\0") + FIRST + END,
    "PAX size": pax(record(b"size", b"%d" % len(GOOD))) + FIRST + END,
    "hidden": member(".x.png", b"no image") + FIRST + END,
}


def _socket(path: Path) -> None:
    """Bound by a relative name, as those of sockets are short."""
    before = os.getcwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


Place = Callable[[Path], Any]
NOT_FILES: dict[str, Place] = {  # in the place of a file
    "FIFO": os.mkfifo,
    "socket": _socket,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to a FIFO": lambda path: (os.mkfifo(path.parent / "fifo"), path.symlink_to("fifo")),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "sparse file of a terabyte": lambda path: (path.touch(), os.truncate(path, 2**40)),
}
NAMES: dict[str, bytes] = {
    "no UTF-8": b"\xff\xfe.png",
    "ESC": b"\x1b[31m\x1b]0;x\x07.png",
    "lines": b"a\nb\r\nerror: c.png",
    "right to left": "\u202egnp.png".encode(),
    "C1": "\x9b31m.png".encode(),
    "255 bytes": b"n" * 251 + b".png",
    "formula": rb"$x^{$\frac.png",
    "markup": b"[red]x[nothing].png",
    "blanks": b"  .png",
    "home of nobody": b"~nobody.png",
}
SCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(PWNED) (w) file\n"
SAMPLES = b"\x15\x01\x03\x00\x01\x00\x00\x00"  # per pixel, of a TIFF
IMAGES: dict[str, bytes] = {
    "text": b"no image",
    "empty": b"",
    "PostScript": SCRIPT,
    "declares 60000 x 50000": GOOD[:16] + (60000).to_bytes(4, "big") + (50000).to_bytes(4, "big") + GOOD[24:],
    "of 12000 x 12000": image_bytes(12000, 12000, mode="1"),
    "cut": np.random.default_rng(0).bytes(10) + GOOD,
    "cut JPEG": image_bytes(300, 200, "JPEG")[:700],
    "TIFF of absurd tags": image_bytes(kind="TIFF")[:8] + b"\xff" * 200,
    "TIFF of 2048 samples": image_bytes(kind="TIFF").replace(SAMPLES + b"\x03\x00", SAMPLES + b"\x00\x08"),
    "icon": image_bytes(16, 16, "ICO"),
    "PCX": image_bytes(kind="PCX"),
}
