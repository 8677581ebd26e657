"""Packages -> a pack: cut-outs and photographs of one size, held-out ones apart, and a table of their licences."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image

from experiments.reference_data.sources import SOURCES, Source
from slimsam_jax.errors import InputError, RunError

CUTOUT, PHOTOGRAPH = 224, 640  # longest sides, pixels
HELD_OUT = 10  # one cut-out or photograph in so many is for validation
PARTS = ("train", "val")


def make(out: Path, downloads: Path) -> dict[str, int]:
    """Writes OUT/{cutouts,photographs}/{train,val}/*.webp and OUT/LICENCES.md, with the versions.

    Which part a file belongs to follows from its content, so that it never changes.

    Args:
      out: a new folder.
      downloads: packages that are there already are not fetched again.

    Returns:
      {"cutouts/train": count, ...}.

    Raises:
      RunError: a registry does not have a package.
    """
    counts = {f"{kind}/{part}": 0 for kind in ("cutouts", "photographs") for part in PARTS}
    rows = []
    for source in SOURCES:
        taken, archive = 0, fetch(source, downloads)
        with tempfile.TemporaryDirectory() as folder:
            unpack(archive, Path(folder))
            for path in files(source, Path(folder)):
                image = cutout(path) if source.kind == "cutouts" else photograph(path)
                if image is None:
                    continue
                content = encoded(image)
                digest = hashlib.sha256(content).hexdigest()
                place = f"{source.kind}/{PARTS[int(digest[:8], 16) % HELD_OUT == 0]}"
                (out / place).mkdir(parents=True, exist_ok=True)
                target = out / place / f"{digest[:16]}.webp"
                counts[place] += not target.exists()  # the same image in two packages
                target.write_bytes(content)
                taken += 1
        rows.append((dataclasses.replace(source, version=version_of(source, archive)), taken))
    (out / "LICENCES.md").write_text(licences(rows))
    return counts


def fetch(source: Source, downloads: Path) -> Path:
    """Fetches the package's archive."""
    downloads.mkdir(parents=True, exist_ok=True)
    stem = source.package.strip("@").replace("/", "-")
    pattern = f"{stem}-{source.version}.tgz" if source.registry == "npm" else f"{stem}_*.deb"
    if not list(downloads.glob(pattern)):
        name = f"{source.package}@{source.version}" if source.registry == "npm" else source.package
        command = ["npm", "pack", name] if source.registry == "npm" else ["apt-get", "download", name]
        call(command, downloads, f"{source.package} cannot be had from the {source.registry} registry")
    return next(downloads.glob(pattern))


def version_of(source: Source, archive: Path) -> str:
    """Returns the version: Debian's archive has one version of a package, and its file's name says which."""
    return source.version if source.registry == "npm" else unquote(archive.name.split("_")[1])


def unpack(archive: Path, folder: Path) -> None:
    command = ["dpkg", "-x", archive, folder] if archive.suffix == ".deb" else ["tar", "-xzf", archive, "-C", folder]
    call(list(map(str, command)), folder, f"{archive} cannot be unpacked")


def call(command: list[str], folder: Path, complaint: str) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        last = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        raise RunError(f"{complaint}: {last}") from None


def files(source: Source, folder: Path) -> Iterator[Path]:
    """Lists the files that the source names, in a fixed order."""
    paths = sorted(path for pattern in source.files for path in folder.glob(pattern))
    return (path for path in paths if not any(part in str(path) for part in source.without))


def cutout(path: Path) -> Image.Image | None:
    """Crops RGBA to what is opaque; None if it is not one object with an outline to learn."""
    from scipy.ndimage import label

    try:
        image = Image.open(path).convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    if not (box := image.getchannel("A").point(lambda a: 255 * (a > 127)).getbbox()):
        return None
    image = shrunk(image.crop(box), CUTOUT)
    opaque = np.asarray(image.getchannel("A")) > 127
    pieces, count = label(opaque)
    largest = np.bincount(pieces.ravel())[1:].max() / opaque.sum() if count else 0
    good = max(image.size) >= 96 and min(image.size) >= 32 and 0.15 < opaque.mean() < 0.97 and largest > 0.8
    return image if good else None


def photograph(path: Path) -> Image.Image:
    return shrunk(Image.open(path).convert("RGB"), PHOTOGRAPH)


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """Shrinks to a longest side of at most `side`."""
    factor = side / max(image.size)
    size = tuple(max(1, round(s * factor)) for s in image.size)
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3) if factor < 1 else image


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, alpha_quality=90, method=4)
    return buffer.getvalue()


def licences(rows: list[tuple[Source, int]]) -> str:
    head = "| package | version | files taken | kind | licence | where it stands |\n|---|---|---|---|---|---|\n"
    line = "| {registry}: {package} | {version} | {taken} | {kind} | {licence} | {statement} |\n"
    return head + "".join(line.format(taken=taken, **dataclasses.asdict(source)) for source, taken in rows)


def listed(pack: Path, kind: str, part: str) -> list[Path]:
    """Lists the files of a part of a pack.

    Raises:
      InputError: it has none.
    """
    paths = sorted((pack / kind / part).glob("*.webp"))
    if not paths:
        raise InputError(f"{pack} holds no {kind}/{part}; `python -m experiments.reference_data pack` makes a pack")
    return paths
