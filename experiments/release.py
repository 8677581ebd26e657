"""Checks a release: builds sdist and wheel, looks into both, installs the wheel somewhere new and runs it.

    pip install -e '.[dev]'
    python -m experiments.release

The wheel is built from the sdist. What is installed comes from the wheel, its dependencies from the package index (or,
with `--shared`, from this environment). Then the default command runs in an empty folder, and the command that it
prints last.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

from slimsam_jax import __version__, cli
from slimsam_jax.errors import InputError, RunError

ROOT = Path(__file__).parents[1]
MOST_BYTES = 25 * 10**6
PACKAGES = ("slimsam_jax", "converters")
# The code's licence, whose photographs these are, and what holds for the weights.
LICENCES = (
    "LICENSE",
    "slimsam_jax/assets/photos/SOURCES.md",
    "slimsam_jax/assets/sam_small_v2/TERMS.md",
)
MADE = {"PKG-INFO"}  # by the build, in an sdist
LONGEST = 3600  # seconds, of any one command: on a busy machine the default one takes a while


def main(out: Path | None = None, shared: bool = False, final: bool = False) -> None:
    """Build, look inside, install, run.

    Args:
      out: where sdist and wheel go; nowhere by default, as they are made to be looked at.
      shared: take dependencies from this environment: quicker, and no proof that pyproject.toml names them all.
      final: the version must be a released one in the list of changes, and everything committed.
    """
    with tempfile.TemporaryDirectory() as folder:
        check(stale(final), "before anything is built")
        sdist, wheel = build(out or Path(folder) / "dist")
        check(wrong_with_sdist(sdist) + wrong_with_wheel(wheel), "in what was built")
        for path in (sdist, wheel):
            print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB of {MOST_BYTES / 1e6:.0f}", flush=True)
        binaries = install(wheel, Path(folder) / "environment", shared)
        try_out(binaries, Path(folder) / "empty")
    print(f"slimsam_jax {__version__} can be released" if final else "nothing is wrong")


def check(problems: list[str], where: str) -> None:
    """Raises InputError if there are any."""
    if problems:
        raise InputError(f"{where}: " + "; ".join(problems))


def stale(final: bool, root: Path = ROOT) -> list[str]:
    """Lists what does not name this version, and for a `final` release what is not committed."""
    problems = []
    if f"\nversion: {__version__}\n" not in (root / "CITATION.cff").read_text():
        problems.append(f"CITATION.cff does not say version: {__version__}")
    version = re.escape(__version__.removesuffix(".0"))  # 0.3.0 may be called 0.3, and 0.3.1 nothing else
    heading = re.search(rf"(?m)^## {version}(\.0)?(?![\w.]).*$", (root / "docs" / "changelog.md").read_text())
    if not heading:
        problems.append(f"docs/changelog.md has no heading for {__version__}")
    if final and heading and "not released" in heading[0]:
        problems.append(f'docs/changelog.md says "{heading[0]}"')
    if final and said("git", "status", "--porcelain", cwd=root).strip():
        problems.append("there are changes that are not committed")
    return problems


def build(out: Path) -> tuple[Path, Path]:
    """Returns sdist and wheel; the second is made of the first.

    Raises:
      InputError: `out` is a file, or has other files.
      RunError: the package `build` is missing, or fails.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is no folder: give --out a new one")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty: give --out a new folder")
    said(sys.executable, "-m", "build", "--version", hint="pip install -e '.[dev]'")
    said(sys.executable, "-m", "build", "--outdir", str(out), str(ROOT))
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def wrong_with_sdist(path: Path) -> list[str]:
    """Lists what an sdist has too much or too little of, against the files that git knows."""
    with tarfile.open(path) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    tracked = set(said("git", "ls-files", "-z", cwd=ROOT).split("\0")) - {""}
    return [
        *oversized(path),
        *(f"{path.name} lacks {name}" for name in sorted(tracked - inside)),
        *(f"{path.name} has {name}, which git does not know" for name in sorted(inside - tracked - MADE)),
    ]


def wrong_with_wheel(path: Path) -> list[str]:
    """Lists what a wheel lacks of the packages and their licences, and what else it has."""
    with zipfile.ZipFile(path) as archive:
        inside = set(archive.namelist())
    notes = f"{'-'.join(path.name.split('-')[:2])}.dist-info"
    tracked = set(said("git", "ls-files", "-z", *PACKAGES, cwd=ROOT).split("\0")) - {""}
    wanted = tracked | {f"{notes}/licenses/{name}" for name in LICENCES}
    foreign = {name for name in inside - wanted if not name.startswith(f"{notes}/")}
    return [
        *oversized(path),
        *(f"{path.name} lacks {name}" for name in sorted(wanted - inside)),
        *(f"{path.name} has {name}, which is no part of the packages" for name in sorted(foreign)),
    ]


def oversized(path: Path) -> list[str]:
    size = path.stat().st_size
    return [f"{path.name} has {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f}"] if size > MOST_BYTES else []


def install(wheel: Path, environment: Path, shared: bool) -> Path:
    """Returns the folder of programs of a new environment that holds the wheel."""
    venv.create(environment, with_pip=True)
    binaries = environment / "bin"
    pip = [str(binaries / "python"), "-m", "pip", "install", "--quiet", str(wheel)]
    said(*pip, *(["--no-deps"] if shared else []))
    if shared:  # a folder in a .pth comes after the environment's own, and its own .pth files are not read
        own = Path(
            said(str(binaries / "python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        )
        folders = [path for path in sys.path if path.endswith("-packages")]
        (own / "shared.pth").write_text("\n".join(folders) + "\n")
    return binaries


def try_out(binaries: Path, empty: Path) -> None:
    """Runs what a newcomer runs first, in a folder that holds nothing, with caches of its own.

    Raises:
      RunError: a command failed, or something came from elsewhere than the wheel.
    """
    empty.mkdir()
    run = functools.partial(said, cwd=empty, XDG_CACHE_HOME=str(empty.with_name("cache")))
    where = run(str(binaries / "python"), "-c", "import slimsam_jax; print(slimsam_jax.__file__)").strip()
    if not Path(where).is_relative_to(binaries.parent):
        raise RunError(f"slimsam_jax is imported from {where}, not from the wheel")
    run(str(binaries / "slimsam"), "--help")
    last = run(str(binaries / "slimsam"), "compress").strip().rpartition("\n")[2]
    run(str(binaries / "slimsam"), *arguments_in(last))
    if not (empty / "mask.png").exists():
        raise RunError(f"{last} has drawn no mask.png")
    print("slimsam compress, then slimsam predict: done", flush=True)


def arguments_in(line: str) -> list[str]:
    """Returns what stands behind "next  slimsam", the last line of `slimsam compress`.

    Raises:
      RunError: there is no such command.
    """
    try:
        following, program, *arguments = shlex.split(line)
    except ValueError:  # fewer words, or an open quote
        following = program = ""
    if (following, program) != ("next", "slimsam"):
        raise RunError(f"the last line of slimsam compress is no command of ours: {line!r}")
    return arguments


def said(*command: str, cwd: Path | None = None, hint: str = "", **variables: str) -> str:
    """Returns what a command prints. Nothing of this checkout is in its environment, which has `variables` besides.

    Raises:
      RunError: it failed, or took too long; the message has its last line.
    """
    away = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "JAX_COMPILATION_CACHE_DIR"}
    environment = {name: value for name, value in os.environ.items() if name not in away} | variables
    line = " ".join(command)
    try:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        raise RunError(f"{line} took more than {LONGEST} s") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no word"]
        raise RunError(f"{line} failed: {lines[-1]}" + (f" ({hint})" if hint else ""))
    return done.stdout


if __name__ == "__main__":
    cli.run(main)
