"""Hostile models: checkpoints whose pickles are sound, model folders of ours, and Hugging Face's. All must be refused.

`states` and `folders` make them of a good model; each folder is {file name: content}, a content bytes, or a function
that is given the path.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from helpers.hostile.archives import archives, of_state, pth
from helpers.hostile.pickles import TENSORS, dump, table, tensor

Content = bytes | Callable[[Path], Any]
TOKENS, POSITIONS = "mask_decoder.mask_tokens.weight", "image_encoder.pos_embed"
BLOCK, LAYER = "image_encoder.blocks.", "mask_decoder.transformer.layers."


def states(good: dict[str, np.ndarray]) -> dict[str, bytes]:
    """{what is wrong: a `.pth`}."""
    first = {name: array for name, array in good.items() if name.startswith(f"{BLOCK}0.")}
    blocks = {name.replace(f"{BLOCK}0.", f"{BLOCK}{i}."): array for i in range(140) for name, array in first.items()}
    first = {name: array for name, array in good.items() if name.startswith(f"{LAYER}0.")}
    layers = {name.replace(f"{LAYER}0.", f"{LAYER}{i}."): array for i in range(40) for name, array in first.items()}
    with_ = lambda **arrays: of_state({**good, **arrays})
    one = np.float32(0)
    check_sum = struct.pack("<I", zlib.crc32(good[POSITIONS].tobytes()))
    return {
        "20,000 blocks": pth(table(**{f"{BLOCK}{i}.norm1.weight": tensor() for i in range(20_000)})),
        "140 blocks": of_state({**good, **blocks}),
        "no blocks": of_state({name: array for name, array in good.items() if BLOCK not in name}),
        "a block that is missing": of_state({n.replace(f"{BLOCK}1.", f"{BLOCK}2."): a for n, a in good.items()}),
        "40 decoder layers": with_(**layers),
        "10^9 masks": of_state(good, **{TOKENS: tensor(size=(10**9, 32), stride=(0, 0))}),
        "half as many masks": with_(**{TOKENS: good[TOKENS][:2]}),
        "33 masks": with_(**{TOKENS: np.zeros((34, 32), np.float32)}),
        "positions of one axis": with_(**{POSITIONS: good[POSITIONS].reshape(-1)}),
        "positions of no axis": with_(**{POSITIONS: one}),
        "positions of size 0": with_(**{POSITIONS: np.zeros((1, 0, 0, 24), np.float32)}),
        "positions of 0 x 2^62": of_state(good, **{POSITIONS: tensor(0, (1, 0, 1 << 31, 1 << 31), (0, 0, 0, 0))}),
        "complex weights": with_(**{POSITIONS: good[POSITIONS].astype(np.complex64)}),
        "whole numbers": with_(**{POSITIONS: np.zeros(good[POSITIONS].shape, np.int64)}),
        "not a number": with_(**{POSITIONS: good[POSITIONS] * np.float32("nan")}),
        "beyond float32": with_(**{POSITIONS: np.full(good[POSITIONS].shape, 1e300)}),
        "a surplus name": with_(extra=one),
        "a name of control characters": with_(**{"\x1b[2J\r\n\x07\u202e": one}),
        "a name of 500,000 letters": with_(**{"w" * 500_000: one}),
        "a name that is no Unicode": with_(**{"\ud800": one}),
        "8,000 surplus names": with_(**{f"w{i}": one for i in range(8_000)}),
        "no dots": of_state({name.replace(".", "/"): array for name, array in good.items()}),
        "two of one name": with_(**{f"module.{POSITIONS}": good[POSITIONS]}),
        "a mean of a million": with_(pixel_mean=np.zeros(1_000_000, np.float32)),
        "a mean that is complex": with_(pixel_mean=np.zeros(3, np.complex64)),
        "a deviation of 0": with_(pixel_std=np.zeros(3, np.float32)),
        "a mean that is no number": with_(pixel_mean=np.full(3, np.nan, np.float32)),
        "qkv of no axis": with_(**{f"{BLOCK}0.attn.qkv.weight": one}),
        "q of nothing": with_(**{f"{BLOCK}0.attn.qkv.weight": np.zeros((0, 24), np.float32)}),
        "heads of no channels": with_(**{f"{BLOCK}0.attn.rel_pos_h": np.zeros((5, 0), np.float32)}),
        "tables of two windows": with_(**{f"{BLOCK}0.attn.rel_pos_h": np.zeros((51, 12), np.float32)}),
        "everything of one number": pth(table(**{name: tensor(0, (1,)) for name in good})),
        "another check sum": of_state(good).replace(check_sum, bytes(4)),
    }  # fmt: skip


def repeated(good: dict[str, np.ndarray]) -> bytes:
    """A checkpoint in which 500 names share one storage of 1 MB."""
    return pth(table(**{f"w{i}": tensor(0, (250_000,)) for i in range(500)}), d0=bytes(1_000_000))


def safetensors(arrays: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    header = json.dumps(arrays).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def array(shape: Any = (1,), offsets: Any = (0, 4), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def one(**changes: Any) -> bytes:
    return safetensors({"w": array(**changes)}, bytes(4))


WEIGHTS = {
    "empty": b"",
    "7 bytes": bytes(7),
    "header of 2^63": safetensors({}, length=1 << 63),
    "header beyond the end": safetensors({}, length=100),
    "header of 2 MB": safetensors({f"w{i}": array((0,), (0, 0)) for i in range(40_000)}),
    "header that is no JSON": struct.pack("<Q", 4) + b"????",
    "header of 100,000 brackets": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "header that is a list": safetensors([1, 2]),
    "an array that is a number": safetensors({"w": 1}),
    "an array without a shape": safetensors({"w": {"dtype": "F32"}}),
    "too short": safetensors({"w": array()}),
    "too long": safetensors({"w": array()}, bytes(8)),
    "overlapping": safetensors({"w": array(), "v": array()}, bytes(4)),
    "twice the file": safetensors({f"w{i}": array((100,), (0, 400)) for i in range(100)}, bytes(400)),
    "three offsets": safetensors({"w": array(offsets=(0, 4, 8))}, bytes(4)),
    "70 axes": safetensors({"w": array((1,) * 70)}, bytes(4)),
    "300,000 axes": safetensors({"w": array((9,) * 300_000)}, bytes(4)),
    "0 x 2^62": safetensors({"w": array((0, 1 << 62), (0, 0))}),
    **{f"dtype {d}": one(dtype=d) for d in ("F4", "object", "", None, 5, ["F32"], "<f4")},
    **{f"size {n}": one(shape=(n,)) for n in (-1, True, 1.0, "1", None, [1], 1 << 62, 10**30)},
    **{f"from {n}": one(offsets=(n, 4)) for n in (-4, False, 0.0, "0", None, 1 << 62)},
    **{f"to {n}": one(offsets=(0, n)) for n in (-4, 4.0, "4", None, 1 << 62, 5)},
}  # fmt: skip
TEXTS = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "100,000 brackets": b"[" * 100_000,
    "nested objects": b'{"a":' * 50_000,
    "5 MB": b'{"a": "' + b"x" * 5_000_000 + b'"}',
    "4 MB of lists": b'{"a": [' + b"[]," * 1_390_000 + b"[]]}",
    "no Unicode": b'{"format": "\xff\xfe"}',
    "half of UTF-16": '{"format": 1}'.encode("utf-16")[:-1],
    "a number of 5,000 digits": b'{"format": ' + b"9" * 5_000 + b"}",
    "another format": b'{"format": "slimsam_jax/99"}',
    "a format that is a list": b'{"format": ["slimsam_jax/1"]}',
    "control characters": b'{"format": "\\u001b[2J\\n\\u0007"}',
}
ODD = (10**9, 10**30, -1, 0, True, 1.5, "8", None, [8], {"a": 8})
KINDS = {
    "a FIFO": os.mkfifo,
    "a folder": os.mkdir,
    "zeros": lambda path: path.symlink_to("/dev/zero"),
    "noise": lambda path: path.symlink_to("/dev/urandom"),
    "a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a loop": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a socket": lambda path: bind(path),
}


def bind(path: Path) -> None:
    """A socket in the file system; its path may have 108 bytes, so it is bound from its folder."""
    before = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.fchdir(before)
        os.close(before)


def described(architecture: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps({"format": "slimsam_jax/1", "architecture": architecture, "provenance": {}} | changes).encode()


def architectures(good: dict[str, Any]) -> dict[str, bytes]:
    """{what is wrong: a `config.json` of ours}."""
    blocks, found = good["blocks"], {}
    fields = [name for name, value in good.items() if type(value) is int]
    for value in ODD:
        for name in fields:
            if (name, value) != ("decoder_heads", "8"):
                found[f"{name} {value}"] = good | {name: value}
        for name in blocks[0]:
            if (name, value) != ("window", 0):
                found[f"{name} of a block {value}"] = good | {"blocks": [blocks[0] | {name: value}, *blocks[1:]]}
        found[f"image_size {value}"] = good | {"image_size": [value, value]}
    for value in (
        None,
        1,
        "abc",
        [1, 2],
        ["a"] * 3,
        [None] * 3,
        [True] * 3,
        [1e400] * 3,
        [float("nan")] * 3,
        [10**400] * 3,
    ):
        found[f"pixel_mean {str(value)[:20]}"] = good | {"pixel_mean": value}
    for value in (None, {}, [], "blocks", [1], [[]], [blocks[0]] * 20_000, [blocks[0]] * 128, [blocks[0] | {"x": 1}]):
        found[f"blocks {str(value)[:20]} {len(value or ())}"] = good | {"blocks": value}
    found |= {
        "surplus field": good | {"depth": 2},
        "missing field": {k: v for k, v in good.items() if k != "embed_dim"},
    }
    found |= {"nothing": {}, "a list": [], "text": "vit_b"}
    return {what: described(architecture) for what, architecture in found.items()}


def provenances(good: dict[str, Any]) -> dict[str, bytes]:
    deep: dict[str, Any] = {}
    for _ in range(300):
        deep = {"teacher": [deep]}
    wrong = {"null": None, "list": [], "text": "x", "number": 5, "300 levels deep": deep}
    return {what: described(good, provenance=value) for what, value in wrong.items()}


def huggingface(good: dict[str, bytes]) -> dict[str, dict[str, Content]]:
    """{what is wrong: a folder of Hugging Face's layout}, `good` being a sound one."""
    found: dict[str, dict[str, Content]] = {}
    config = json.loads(good["config.json"])
    for value in ([], None, {}, "x", *({"num_attention_heads": value} for value in (*ODD, 3, 1 << 20))):
        if value not in ({}, {"num_attention_heads": 8}):
            found[f"decoder {value}"] = good | {
                "config.json": json.dumps(config | {"mask_decoder_config": value}).encode()
            }
    for value in (None, 1, [], "sam2", "\x1b[31m", "x" * 100_000):
        found[f"type {str(value)[:10]!r}"] = good | {"config.json": json.dumps(config | {"model_type": value}).encode()}
    means = [
        None,
        1,
        "abc",
        [1, 2],
        ["a"] * 3,
        [None] * 3,
        [True] * 3,
        [[0] * 300_000] * 3,
        [float("nan")] * 3,
        [1e300] * 3,
    ]
    for value in means:
        found[f"mean {str(value)[:15]}"] = good | {
            "preprocessor_config.json": json.dumps({"image_mean": value}).encode()
        }
    for what, content in TEXTS.items():
        if what in ("empty", "no JSON", "a list", "100,000 brackets", "5 MB"):
            found[f"preprocessor {what}"] = good | {"preprocessor_config.json": content}
    binary = {k: v for k, v in good.items() if k != "model.safetensors"}
    shards = (
        {"a": "../../etc/passwd"},
        {"a": "/dev/zero"},
        {"a": ".."},
        {"a": ""},
        {"a": 5},
        {"a": ["x"]},
        {"a": "absent"},
    )
    for value in (*shards, [], "x", {str(i): f"{i}.safetensors" for i in range(20_000)}, {"a": "config.json"}):
        index = json.dumps({"weight_map": value}).encode()
        found[f"shards {str(value)[:20]}"] = good | {"model.safetensors.index.json": index}
        found[f".bin shards {str(value)[:20]}"] = binary | {"pytorch_model.bin.index.json": index}
    for what in ("empty", "7 bytes", "header of 2^63", "overlapping", "size True"):
        found[f"weights {what}"] = good | {"model.safetensors": WEIGHTS[what]}
    found["no weights"] = binary
    for what in ("pickle a bomb", "storage a bomb", "text"):
        found[f".bin: {what}"] = binary | {"pytorch_model.bin": archives()[what]}
    found[".bin: stride 0"] = binary | {"pytorch_model.bin": pth(table(w=TENSORS["10^9 of stride 0"]))}
    found[".bin: foreign code"] = binary | {
        "pytorch_model.bin": pth(b"cposix\nsystem\n" + dump(("touch PWNED",)) + b"R")
    }
    for file in ("config.json", "preprocessor_config.json", "model.safetensors", "model.safetensors.index.json"):
        for what, make in KINDS.items():
            found[f"{file} is {what}"] = good | {file: make}
    found |= {f".bin is {what}": binary | {"pytorch_model.bin": make} for what, make in KINDS.items()}
    return found


def folders(good: dict[str, bytes], architecture: dict[str, Any]) -> dict[str, dict[str, Content]]:
    """{what is wrong: a model folder of ours}, `good` being a sound one."""
    configs = TEXTS | architectures(architecture)
    configs |= {f"provenance {what}": content for what, content in provenances(architecture).items()}
    found: dict[str, dict[str, Content]] = {what: good | {"config.json": content} for what, content in configs.items()}
    found |= {f"weights {what}": good | {"model.safetensors": content} for what, content in WEIGHTS.items()}
    for file in good:
        found |= {f"{file} is {what}": good | {file: make} for what, make in KINDS.items()}
        found[f"no {file}"] = {k: v for k, v in good.items() if k != file}
    return found | {"nothing in it": {}}


def write(folder: Path, contents: dict[str, Content]) -> Path:
    folder.mkdir()
    for name, content in contents.items():
        if callable(content):
            content(folder / name)
        else:
            (folder / name).write_bytes(content)
    return folder
