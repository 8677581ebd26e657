"""The folder of compiled programs: whose it is, what it may hold, and that a bad one never breaks a command."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import zstandard

from slimsam_jax.cli import compilation

COMPILE = """
from slimsam_jax.cli import compilation
compilation.prepare()
import jax, jax.numpy as jnp
print(float(jax.jit(lambda x: jnp.sin(x) + 1)(0.0)), jax.config.jax_compilation_cache_dir)
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def compiled(**variables: str) -> tuple[str, str, str]:
    """What a new process computed, the folder that it kept programs in, and what it complained about."""
    environment = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **variables}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True)
    value, folder = done.stdout.split(maxsplit=1)
    return value, folder.strip(), done.stderr


def test_a_damaged_program_is_compiled_again_and_replaced(home):
    value, folder, complaint = compiled()
    assert (value, complaint) == ("1.0", "") and Path(folder).is_relative_to(home)
    programs = sorted(Path(folder).glob("*-cache"))
    assert programs
    for path in programs:
        path.write_bytes(path.read_bytes()[:-9])
    assert compiled() == ("1.0", folder, "")
    assert all(zstandard.ZstdDecompressor().decompress(path.read_bytes()) for path in programs)


@pytest.mark.parametrize("compress", [zlib.compress, zstandard.ZstdCompressor().compress], ids=["zlib", "zstandard"])
def test_files_are_whole_or_not(tmp_path, compress):
    """JAX takes what is installed; the folder may hold both."""
    for name, cut in (("whole", None), ("short", -9)):
        (tmp_path / f"{name}-cache").write_bytes(compress(bytes(range(200)) * 3)[:cut])
    compilation.tidy(tmp_path, 2**20)
    assert [path.name for path in tmp_path.glob("*-cache")] == ["whole-cache"]


def test_what_is_damaged_while_it_runs_is_passed_by(home, monkeypatch):
    """JAX's own check finds it, and its warning is not the user's business."""
    _, folder, _ = compiled()
    for path in Path(folder).glob("*-cache"):
        path.write_bytes(b"no program")
        os.utime(path, (1, 1))  # as if it had been looked at already
    assert compiled() == ("1.0", folder, "")


def test_a_folder_that_cannot_be_made_is_done_without(home):
    (home / "slimsam_jax").write_text("a file")
    assert compiled() == ("1.0", "None", "")


@pytest.mark.parametrize("hostile", ["open", "fifo", "link"])
def test_a_folder_that_others_could_change_is_not_used(home, capsys, hostile):
    folder = compilation.cache_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    if hostile == "open":
        folder.chmod(0o777)
    elif hostile == "fifo":
        os.mkfifo(folder / "jit_f-cache")
    else:
        (folder / "jit_f-cache").symlink_to("/dev/zero")
    assert compilation.cache_folder() is None
    assert "others could change" in capsys.readouterr().err


def test_the_user_may_say_otherwise(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(home / "home"))
    assert compilation.cache_folder().is_relative_to(home / "home" / ".cache")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    monkeypatch.setattr(compilation, "cache_folder", lambda: pytest.fail("asked for"))
    compilation.prepare()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"


def test_the_oldest_go_when_there_is_no_room(tmp_path):
    for age in range(4):
        path = tmp_path / f"{age}-cache"
        path.write_bytes(zlib.compress(bytes(100)))
        os.utime(path, (1000 - age, 1000 - age))
    compilation.tidy(tmp_path, 2 * path.stat().st_size)
    assert sorted(path.name for path in tmp_path.glob("*-cache")) == ["0-cache", "1-cache"]
