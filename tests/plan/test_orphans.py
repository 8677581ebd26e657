"""A process whose parent is ended by a signal ends as well, and takes the parent's folder with it."""

from __future__ import annotations

import signal
import subprocess
import sys

PARENT = """
import multiprocessing, sys, time
from pathlib import Path
from slimsam_jax.plan.orphans import end_with_parent

def child(folder):
    end_with_parent(Path(folder))
    print("begun", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=child, args=sys.argv[1:], daemon=True).start()
    time.sleep(60)
"""


def test_a_child_ends_with_its_parent_and_leaves_no_file(tmp_path):
    script, folder = tmp_path / "parent.py", tmp_path / "dumped"
    script.write_text(PARENT)
    folder.mkdir()
    (folder / "module_0000.txt").touch()
    with subprocess.Popen([sys.executable, script, folder], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "begun\n" and folder.exists()
        parent.send_signal(signal.SIGTERM)
        parent.communicate(timeout=30)  # until nobody holds the output: the child neither
    assert parent.returncode == -signal.SIGTERM and not folder.exists()
