"""Only regular files are opened, and only as much of them as was asked for."""

import os
import socket
import tracemalloc
from pathlib import Path

import pytest

from slimsam_jax import files
from slimsam_jax.errors import InputError

IRREGULAR = {
    "folder": lambda path: path.mkdir(),
    "FIFO": lambda path: os.mkfifo(path),
    "socket": lambda path: _socket(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
}


def _socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize("read", [files.regular, files.open_regular, lambda path: files.read_bytes(path, 10)])
def test_nothing_irregular_is_opened(read, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path may have 108 bytes
    IRREGULAR[kind](Path("x"))
    with pytest.raises(InputError, match=kind):
        read("x")


def test_a_file_swapped_for_a_fifo_does_not_hang(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "x")
    monkeypatch.setattr(files, "regular", lambda path: path)
    with pytest.raises(InputError, match="no regular file"):
        files.open_regular(tmp_path / "x")


@pytest.mark.parametrize("name", ["absent", "nul\0in it", "x" * 300])
def test_a_name_that_leads_nowhere(name, tmp_path):
    with pytest.raises(InputError):
        files.regular(tmp_path / name)


def test_no_more_than_the_limit_is_read(tmp_path):
    (tmp_path / "x").write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to("x")
    assert files.read_bytes(tmp_path / "link", 10) == b"0123456789"
    with pytest.raises(InputError, match="10 bytes, and at most 9"):
        files.read_bytes(tmp_path / "x", 9)


def test_no_memory_is_taken_for_what_a_file_has_not(tmp_path):
    """The limit is 4 GiB of a COCO .json, and 256 MiB of each image that a thread reads."""
    (tmp_path / "x").write_bytes(bytes(1000))
    tracemalloc.start()
    try:
        assert files.read_bytes(tmp_path / "x", 2**28) == bytes(1000)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_file_that_says_it_is_empty_is_read_to_its_end():
    assert os.stat("/proc/self/status").st_size == 0
    assert len(files.read_bytes("/proc/self/status", 2**16)) > 100
    with pytest.raises(InputError, match="at most 99 are read"):
        files.read_bytes("/proc/self/status", 99)
