"""The folder of a run: nobody else's meanwhile, and a log that bears whatever a killed machine left in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import train_reference
from helpers.runs import compress_options
from slimsam_jax import sharding
from slimsam_jax.api import compress_with
from slimsam_jax.errors import InputError
from slimsam_jax.training import folder_lock, run_folder
from slimsam_jax.training.folder_lock import FolderLock, check_free, fcntl
from slimsam_jax.training.run_folder import RunFolder

HOLD = """
import sys, time
from pathlib import Path
from slimsam_jax.training.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture
def held(tmp_path):
    """A run's folder whose lock another process has, and that process."""
    RunFolder(tmp_path / "out", {}).release()
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "out"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield tmp_path / "out", process
        finally:
            process.kill()


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_in_use_is_refused_with_the_process_named_until_that_dies(held, material):
    folder, process = held
    before = state_of(folder)
    train = {"images": (str(material / "val"),), "out": folder}
    for attempt in (
        lambda: check_free(folder),
        lambda: RunFolder(folder, {}, resume=True),
        lambda: RunFolder(folder, {}),
        lambda: compress_with(compress_options(material, folder)),
        lambda: compress_with(compress_options(material, folder, resume=True)),
        lambda: train_reference.main(train_reference.Options(**train)),
        lambda: train_reference.main(train_reference.Options(**train, resume=True)),
    ):
        with pytest.raises(InputError, match=rf"out is in use by process {process.pid} on [\w.-]+; wait") as error:
            attempt()
        assert "\n" not in str(error.value) and state_of(folder) == before
    process.send_signal(signal.SIGKILL)
    process.wait()
    check_free(folder)
    RunFolder(folder, {}, resume=True).release()
    assert (folder / "checkpoints" / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_processes_that_look_at_the_same_moment_do_not_refuse_each_other(tmp_path, monkeypatch):
    """As those of `--distributed --resume` do, each before they join."""
    RunFolder(tmp_path / "out", {}).release()
    looked, take = [], folder_lock._take

    def meanwhile(*args):
        take(*args)
        if not looked:
            looked.append(1)
            check_free(tmp_path / "out")  # another process looks, too

    monkeypatch.setattr(folder_lock, "_take", meanwhile)
    check_free(tmp_path / "out")
    assert looked


def test_runs_of_one_process_exclude_each_other_until_they_end(tmp_path):
    with RunFolder(tmp_path / "out", {"a": 1}) as first:
        first.log(step=1)
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} on"):
            RunFolder(tmp_path / "out", {"a": 1}, resume=True)
    with pytest.raises(InputError, match="started otherwise") as kept:  # as a notebook keeps it, but not the lock
        RunFolder(tmp_path / "out", {"a": 2}, resume=True)
    with RunFolder(tmp_path / "out", {"a": 1}, resume=True) as second:
        assert second.read_log() == [{"step": 1}] and kept.traceback
        second.finish()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["log.jsonl"]


def test_a_run_that_came_and_went_in_between_is_not_written_over(tmp_path):
    """Both found the folder empty; the other one was faster."""
    with RunFolder(tmp_path / "out", {}) as other:
        (tmp_path / "out" / "model.safetensors").write_bytes(b"a model")
        other.finish()
    with pytest.raises(InputError, match="is not empty"):
        RunFolder(tmp_path / "out", {})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"a model"
    with RunFolder(tmp_path / "crashed", {"a": 1}):
        pass
    with pytest.raises(InputError, match="is not empty"):
        RunFolder(tmp_path / "crashed", {"a": 2})
    assert json.loads((tmp_path / "crashed" / "checkpoints" / "origin.json").read_text()) == {"a": 1}


def test_what_cannot_begin_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "write_json", full)
    for name in ("new", "empty"):
        with pytest.raises(OSError, match="No space"):
            RunFolder(tmp_path / name, {})
    assert not (tmp_path / "new").exists() and not list((tmp_path / "empty").iterdir())


def test_a_lock_that_somebody_else_wrote_is_quoted_by_nobody(tmp_path):
    RunFolder(tmp_path, {}).release()
    lock = FolderLock(tmp_path)
    for content in (b"\x1b[31m\xff", b"", b"process 1 on a b\n", b"process 12 on x\nand more", b"9" * 10**6):
        (tmp_path / "checkpoints" / "lock").write_bytes(content)
        with pytest.raises(InputError, match="is in use by another process; wait"):
            check_free(tmp_path)
    lock.release()


def test_a_file_system_without_locks_is_told_about(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    RunFolder(tmp_path / "out", {})
    assert "out cannot be locked (Operation not supported): start no other run in it" in capsys.readouterr().out


def test_all_processes_are_refused_what_the_main_one_is(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "is_main", lambda: False)
    monkeypatch.setattr(sharding, "gather_json", lambda own: ["it is in use by process 7", own])
    with pytest.raises(InputError, match="in use by process 7"):
        RunFolder(tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


ENTRY = st.fixed_dictionaries({"stage": st.just("one"), "step": st.integers(0, 9)}, optional={"score": st.floats(0, 1)})
BROKEN = st.one_of(
    st.binary(max_size=30).map(lambda content: content.replace(b"\n", b"")),
    st.sampled_from(
        [b'{"stage": "one", "st', b"\x00" * 50, b"[" * 5000, b"null", b"1", b'"{}"', b"[1]", b"\xff\xfe{}"]
    ),
    st.sampled_from(
        [b'{"step": "x"}', b'{"step": null, "stage": "one"}', b'{"score": [1], "step": 1}', b'{"step": true}']
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ENTRY | BROKEN, max_size=8), st.booleans())
def test_lines_of_the_log_that_are_none_cost_nothing_else(tmp_path_factory, lines, cut):
    with RunFolder(tmp_path_factory.mktemp("run") / "out", {}) as folder:
        whole = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (folder.path / "log.jsonl").write_bytes(b"\n".join(whole) + (b"" if cut else b"\n"))
        folder.log(stage="one", step=10)
        wanted = [line for line in lines if isinstance(line, dict)] + [{"stage": "one", "step": 10}]
        found = folder.read_log()
        assert [entry for entry in found if entry.get("stage") == "one"] == wanted
        scores = folder.rewind_log("one", 5)
        assert scores == {e["step"]: e["score"] for e in wanted if "score" in e and e["step"] <= 5}
        assert [e for e in folder.read_log() if e.get("stage") == "one"] == [e for e in wanted if e["step"] <= 5]
