"""What a release check finds in archives; nothing is built here."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile

import pytest

from experiments import release
from slimsam_jax.errors import InputError, RunError

VERSION = release.__version__


@pytest.fixture()
def root(tmp_path, monkeypatch):
    """A repository of two files, one of them of the packages."""
    (tmp_path / "slimsam_jax").mkdir()
    for name in ("LICENSE", "slimsam_jax/a.py"):
        (tmp_path / name).write_text("")
    subprocess.run(["git", "init", "-q", "."], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "LICENSE", "slimsam_jax"], cwd=tmp_path, check=True)
    monkeypatch.setattr(release, "ROOT", tmp_path)
    monkeypatch.setattr(release, "PACKAGES", ("slimsam_jax",))
    monkeypatch.setattr(release, "LICENCES", ("LICENSE",))
    return tmp_path


def sdist(root, *names):
    path = root / f"slimsam_jax-{VERSION}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.add(root / "LICENSE", f"slimsam_jax-{VERSION}/{name}")
    return path


def wheel(root, *names):
    path = root / f"slimsam_jax-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name.replace("INFO", f"slimsam_jax-{VERSION}.dist-info"), "")
    return path


def test_an_sdist_has_what_git_knows(root, monkeypatch):
    whole = ("PKG-INFO", "LICENSE", "slimsam_jax/a.py")
    assert not release.wrong_with_sdist(sdist(root, *whole))
    (lacking,) = release.wrong_with_sdist(sdist(root, *whole[:2]))
    (surplus,) = release.wrong_with_sdist(sdist(root, *whole, "notes.txt"))
    assert lacking.endswith("lacks slimsam_jax/a.py") and surplus.endswith("has notes.txt, which git does not know")
    monkeypatch.setattr(release, "MOST_BYTES", 10)
    assert "more than" in release.wrong_with_sdist(sdist(root, *whole))[0]


def test_a_wheel_has_the_packages_with_their_licences_and_nothing_else(root):
    whole = ("slimsam_jax/a.py", "INFO/licenses/LICENSE", "INFO/METADATA")
    assert not release.wrong_with_wheel(wheel(root, *whole))
    assert release.wrong_with_wheel(wheel(root, whole[0]))[0].endswith("dist-info/licenses/LICENSE")
    assert release.wrong_with_wheel(wheel(root, *whole[1:]))[0].endswith("lacks slimsam_jax/a.py")
    (surplus,) = release.wrong_with_wheel(wheel(root, *whole, "tests/a.py"))
    assert surplus.endswith("has tests/a.py, which is no part of the packages")


def test_the_version_is_the_same_everywhere(tmp_path):
    assert not release.stale(final=False)  # of this checkout
    (tmp_path / "docs").mkdir()
    (tmp_path / "CITATION.cff").write_text(f"title: x\nversion: {VERSION}\n")
    (tmp_path / "docs" / "changelog.md").write_text("## 0.1\n")
    assert release.stale(False, tmp_path) == [f"docs/changelog.md has no heading for {VERSION}"]
    series = ".".join(VERSION.split(".")[:2])
    (tmp_path / "docs" / "changelog.md").write_text(f"## {series}.1\n")  # another version's
    assert release.stale(False, tmp_path) == [f"docs/changelog.md has no heading for {VERSION}"]
    (tmp_path / "docs" / "changelog.md").write_text(f"## {series} (not released)\n")
    (tmp_path / "CITATION.cff").write_text("version: 0.0.1\n")
    assert release.stale(False, tmp_path) == [f"CITATION.cff does not say version: {VERSION}"]


def test_a_version_that_mends_has_a_heading_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(release, "__version__", "0.3.1")
    (tmp_path / "docs").mkdir()
    (tmp_path / "CITATION.cff").write_text("title: x\nversion: 0.3.1\n")
    for headings, lacking in (("## 0.3\n", 1), ("## 0.3.10\n## 0.3\n", 1), ("## 0.3.1\n\n## 0.3\n", 0)):
        (tmp_path / "docs" / "changelog.md").write_text(headings)
        assert len(release.stale(False, tmp_path)) == lacking


def test_a_final_release_is_in_the_list_of_changes_and_committed(root):
    series = ".".join(VERSION.split(".")[:2])
    (root / "docs").mkdir()
    (root / "CITATION.cff").write_text(f"title: x\nversion: {VERSION}\n")
    (root / "docs" / "changelog.md").write_text(f"## {series} (not released)\n")
    assert len(release.stale(True, root)) == 2
    (root / "docs" / "changelog.md").write_text(f"## {series}\n")
    assert release.stale(True, root) == ["there are changes that are not committed"]


def test_a_command_that_fails_is_one_line(tmp_path):
    with pytest.raises(RunError, match=r"failed: at the end \(say so\)"):
        release.said(sys.executable, "-c", "raise SystemExit('first\\nat the end')", hint="say so")
    with pytest.raises(InputError, match="in what was built: one; two"):
        release.check(["one", "two"], "in what was built")
    (tmp_path / "full").write_text("")
    with pytest.raises(InputError, match="is not empty"):
        release.build(tmp_path)
    with pytest.raises(InputError, match="full is no folder"):
        release.build(tmp_path / "full")


def test_only_a_missing_build_is_said_to_be_missing(tmp_path, monkeypatch):
    hints = {}
    monkeypatch.setattr(release, "said", lambda *command, hint="": hints.update({command[3]: hint}))
    with pytest.raises(StopIteration):  # nothing is built
        release.build(tmp_path / "dist")
    assert hints == {"--version": "pip install -e '.[dev]'", "--outdir": ""}


def test_the_command_of_the_last_line():
    assert release.arguments_in("next  slimsam predict --model 'a b'") == ["predict", "--model", "a b"]
    for line in ("", "next", "next  rm slim", "next  slimsam predict 'a"):
        with pytest.raises(RunError, match="no command of ours"):
            release.arguments_in(line)
