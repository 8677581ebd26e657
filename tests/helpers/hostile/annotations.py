"""Makes hostile annotations: rows and files of SA-1B's and COCO's formats, for an image of 30 x 20 pixels."""

from __future__ import annotations

import json
from typing import Any

HEIGHT, WIDTH = 20, 30
PIXELS = HEIGHT * WIDTH
NAN, INFINITY = float("nan"), float("inf")
DEEP = "[" * 100_000


def row(**changes: Any) -> dict[str, Any]:
    """A sound annotation of SA-1B, but for the changes."""
    mask = {"size": [HEIGHT, WIDTH], "counts": [0, PIXELS]}
    sound = {"id": 1, "bbox": [0, 0, WIDTH, HEIGHT], "point_coords": [[5, 5]], "segmentation": mask}
    return sound | {"image_id": 7, "category_id": 1, "iscrowd": 0} | changes


def masked(counts: Any, size: Any = (HEIGHT, WIDTH)) -> dict[str, Any]:
    return row(segmentation={"size": size, "counts": counts})


MASKS: dict[str, dict[str, Any]] = {  # rows that SA-1B and COCO may have
    "sum wraps": masked([2**62] * 4 + [PIXELS]),
    "sum wraps of a small size": masked([2**62] * 4 + [100], [10, 10]),
    "sum wraps of two": masked([2**63, 2**63, PIXELS]),
    "negative and positive": masked([-1, PIXELS + 1]),
    "huge negative": masked([-(2**62), 2**62, PIXELS]),
    "fractions": masked([300.5, 299.5]),
    "booleans": masked([True] * PIXELS),
    "text runs": masked([str(PIXELS)]),
    "null runs": masked([None]),
    "nested runs": masked([[PIXELS]]),
    "no runs": masked([]),
    "a number of 4000 digits": masked([10**4000]),
    "infinite run": masked([INFINITY]),
    "NaN run": masked([NAN]),
    "null counts": masked(None),
    "counts of an object": masked({}),
    "counts of a number": masked(PIXELS),
    "empty string": masked(""),
    "cut string": masked("o"),
    "long group": masked("o" * 100 + "0"),
    "group of 13": masked("P" * 12 + "0"),
    "group of which bits are lost": masked("0hbPPPPP1"),
    "wrapping group": masked("o" * 12 + "O" + "o" * 12 + "O" + "0"),
    "zeros": masked("0" * 100),
    "long string": masked("0" * 1_000_000),
    "blanks": masked("   "),
    "not ASCII": masked("é€"),
    "half a surrogate": masked("\ud800"),
    "NUL": masked("\0\0"),
    "negative difference": masked("@@@@"),
    "large differences": masked("oooo7" * 40),
    "60000 x 50000": masked([3 * 10**9], [60000, 50000]),
    "60000 x 50000 packed": masked("PRj^i2", [60000, 50000]),
    "2^40 x 2^40": masked([2**80], [2**40, 2**40]),
    "2^32 x 2^32": masked([], [2**32, 2**32]),
    "negative size": masked([PIXELS], [-HEIGHT, -WIDTH]),
    "one side": masked([PIXELS], [PIXELS]),
    "three sides": masked([PIXELS], [HEIGHT, WIDTH, 1]),
    "text sides": masked([PIXELS], ["20", "30"]),
    "fractional sides": masked([PIXELS], [20.5, 30.0]),
    "null size": masked([PIXELS], None),
    "turned": masked([PIXELS], [WIDTH, HEIGHT]),
    "size 0": masked([], [0, 0]),
    "null segmentation": row(segmentation=None),
    "segmentation of a number": row(segmentation=3),
    "segmentation of text": row(segmentation="x"),
    "box far away": row(bbox=[1e300, 0, 5, 5]),
    "box overflows": row(bbox=[1e308, 0, 1e308, 5]),
    "NaN box": row(bbox=[NAN, 0, 5, 5]),
    "negative box": row(bbox=[0, 0, -5, 5]),
    "null box": row(bbox=None),
    "long box": row(bbox=[1] * 100_000),
    "box of an object": row(bbox={}),
    "NaN point": row(point_coords=[[NAN, 1]]),
    "infinite point": row(point_coords=[[INFINITY, 1]]),
    "point far away": row(point_coords=[[1e300, 1]]),
    "no point": row(point_coords=[]),
    "deep point": row(point_coords=json.loads("[" * 70 + "]" * 70)),
    "point of an object": row(point_coords={}),
    "id of 70 bits": row(id=2**70),
    "infinite id": row(id=INFINITY),
    "null id": row(id=None),
    "id of text": row(id="x"),
    "infinite crop_box": row(crop_box=[0, 0, INFINITY, 5]),
}
SA1B_FILES: dict[str, bytes] = {  # whole .json files
    "annotations of an object": b'{"annotations": {"a": 1}}',
    "annotations of a number": b'{"annotations": 3}',
    "annotations of text": b'{"annotations": "abc"}',
    "no annotations": b"{}",
    "a list": b"[]",
    "null row": b'{"annotations": [null]}',
    "deep": DEEP.encode(),
    "deep objects": b'{"annotations":' * 50_000,
    "cut": b'{"annotations": [',
    "empty": b"",
    "binary": bytes(range(256)) * 10,
    "UTF-16": '{"annotations": 3}'.encode("utf-16"),
    "5000 digits": b'{"annotations": [' + b"9" * 5000 + b"]}",
    "two million lists": b'{"annotations": [' + b"[]," * 2_200_000 + b"0]}",
    "too long": b" " * (2**23 + 1),
}


def polygons(*given: Any) -> dict[str, Any]:
    return row(segmentation=list(given))


TRIANGLE = [2, 2, 25, 3, 12, 17]
POLYGONS: dict[str, dict[str, Any]] = {  # rows of COCO
    "huge": polygons([2, 2, 1e300, 3, 12, 17]),
    "beyond 2^31": polygons([2, 2, 2**31, 3, 12, 17]),
    "NaN": polygons([2, 2, NAN, 3, 12, 17]),
    "infinite": polygons([2, 2, INFINITY, 3, 12, 17]),
    "far to the left": polygons([-1e9, 2, 25, 3, 12, 17]),
    "400 digits": polygons([10**400, 2, 25, 3, 12, 17]),
    "text": polygons(["1"] * 6),
    "nested": polygons([[1]] * 6),
    "null": polygons([None] * 6),
    "booleans": polygons([True] * 6),
    "odd": polygons([1, 2, 3, 4, 5, 6, 7]),
    "two points": polygons([1, 2, 3, 4]),
    "two of too few points": polygons([1, 2, 3, 4], []),
    "empty": polygons([]),
    "no polygon": polygons(),
    "numbers": polygons(1, 2, 3, 4, 5, 6),
    "objects": polygons({"size": [20, 30], "counts": [2**62] * 4 + [600]}),
    "no counts": row(segmentation={"size": [20, 30]}),
    "long outline": polygons([-29, 0, 59, 1] * 6000),
    "far, but short": polygons([1e9, 1e9, 1e9 + 1, 1e9, 1e9, 1e9 + 1]),
    "polygons that are long to unite": polygons(*[TRIANGLE] * 15_000),
    "many polygons": polygons(*[TRIANGLE] * 150_000),
    "many points": polygons([5, 5] * 2_200_000),
}


def coco(annotation: Any = None, image: dict[str, Any] | None = None, **changes: Any) -> bytes:
    """A COCO .json of the image x.png and one annotation."""
    images = [{"id": 7, "file_name": "x.png", "width": WIDTH, "height": HEIGHT} | (image or {})]
    annotations = [annotation or polygons(TRIANGLE)]
    categories = [{"id": 1, "name": "x"}]
    return json.dumps({"images": images, "annotations": annotations, "categories": categories} | changes).encode()


COCO_FILES: dict[str, bytes] = {
    "declares 60000 x 50000": coco(image={"width": 50000, "height": 60000}),
    "declares 2^40": coco(image={"width": 2**40, "height": 2**40}),
    "declares 0": coco(image={"width": 0, "height": 0}),
    "declares less than 0": coco(image={"width": -30, "height": -20}),
    "declares infinity": coco(image={"width": INFINITY}),
    "declares text": coco(image={"width": "x"}),
    "declares no size": coco(images=[{"id": 7, "file_name": "x.png"}]),
    "declares another size": coco(image={"width": 31}),
    "id of a list": coco(image={"id": [7]}),
    "infinite id": coco(image={"id": INFINITY}),
    "name with NUL": coco(image={"file_name": "x\0.png"}),
    "name of 100 kB": coco(image={"file_name": "x" * 100_000}),
    "name of half a surrogate": coco(image={"file_name": "\ud800.png"}),
    "name with ESC": coco(image={"file_name": "\x1b[31mx\n\r\x07.png"}),
    "name of a device": coco(image={"file_name": "/dev/zero"}),
    "name of a folder": coco(image={"file_name": "."}),
    "images of an object": coco(images={"a": 1}),
    "null image": coco(images=[None]),
    "no image": coco(images=[]),
    "annotations null": coco(annotations=None),
    "null annotation": coco(annotations=[None]),
    "annotation of no image": coco(row(image_id=None)),
    "annotation of another image": coco(annotations=[row(image_id=[7])]),
    "long outlines together": coco(annotations=[polygons([-29, 0, 59, 1] * 1500)] * 30),
    "deep": DEEP.encode(),
    "not JSON": b"\xff\xfe{",
    "empty": b"",
}


BOXES: dict[str, bytes] = {  # a detector's, in COCO's results format
    "an object": b'{"a": 1}',
    "null": b"null",
    "null box": b"[null]",
    "deep": DEEP.encode(),
    "cut": b"[{",
    **{
        name: json.dumps([row(score=0.5) | changes]).encode()
        for name, changes in {
            "NaN": {"bbox": [NAN, 1, 2, 3]},
            "far away": {"bbox": [1e300, 1, 2, 3]},
            "overflows": {"bbox": [1e308, 1, 1e308, 3]},
            "negative": {"bbox": [1, 1, -2, 3]},
            "infinite score": {"score": INFINITY},
            "infinite category": {"category_id": INFINITY},
            "image of a list": {"image_id": [7]},
        }.items()
    },
    "too many": json.dumps([row(score=0.5)] * 10_001).encode(),
}
TRUTHS: dict[str, bytes] = {  # COCO that pycocotools would be given whole
    "area of text": coco(row(area="x")),
    "infinite area": coco(row(area=INFINITY)),
    "image id of text": coco(row(image_id="7"), {"id": "7"}),
    "fractional image id": coco(row(image_id=7.5), {"id": 7.5}),
    "no such image": coco(row(image_id=8)),
    "category of a list": coco(row(category_id=[1])),
    "no categories": coco(categories=[]),
    "null image": coco(images=[None]),
    "a list": b"[]",
    "deep": DEEP.encode(),
}
