"""Calls of predictor and generator that ask for nonsense: an error that says so, before anything is computed."""

from __future__ import annotations

import dataclasses
import functools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.models import SQUARE, random_sam
from slimsam_jax import limits
from slimsam_jax.compression import dispatch
from slimsam_jax.compression.mask_steps import MaskLosses
from slimsam_jax.compression.steps import Augment, Distill, DistillMasks, Losses, Optimizer, Prune
from slimsam_jax.data.sample import eight_bits
from slimsam_jax.errors import InputError
from slimsam_jax.inference import engine, mixed_prompts, predictor
from slimsam_jax.inference.automatic_mask_generator import SamAutomaticMaskGenerator
from slimsam_jax.inference.decode import Encoded
from slimsam_jax.inference.predictor import Prompt, SamPredictor


@functools.cache
def model():
    return random_sam(SQUARE)


@pytest.fixture
def ours(monkeypatch):
    """A predictor with an image of 30 x 20 pixels set, which computes nothing."""

    def computes(*_, **__):
        pytest.fail("it was not refused before it was computed")

    monkeypatch.setattr(engine, "encode", computes)
    monkeypatch.setattr(mixed_prompts, "decode", computes)
    found = SamPredictor(model())
    found.encoded = Encoded(np.zeros((4, 4, 32), np.float32), (43, 64), (20, 30))
    return found


class Liar:
    """Says that it is an array, and is none."""

    def __array__(self, *_, **__):
        raise RuntimeError("no")

    def __repr__(self):
        raise RuntimeError("no")


SPREAD = np.broadcast_to(np.float64(1), (10**9, 2))  # takes no memory until it is copied
POINT, BOX, IMAGE = [[3.0, 4.0]], [4.0, 3.0, 22.0, 17.0], np.zeros((20, 30, 3), np.uint8)
MASK = np.zeros((16, 16), np.float32)
holed = lambda value: np.where(np.eye(16, dtype=bool), value, 0).astype(np.float32)
floats = lambda value: Image.fromarray(np.full((20, 30), value, np.float32))
wide = lambda *shape: np.broadcast_to(np.uint8(0), shape)
POINTS = (
    *([[np.nan, 1]], [[np.inf, 1]], [[1, -np.inf]], [], [[]], [[1]], [[1, 2, 3]], [1, 2], 5, "12", [["a", "b"]], b"12"),
    *(
        ["1", "2"],
        [["1", "2"]],
        [[1 + 2j, 3]],
        [[1, 2], [3]],
        [[None, 1]],
        [[1e300, 1]],
        [[1e30, 1e30]],
        [[-31, 2]],
        {},
    ),
    *([[2, 41]], {1: 2}, [[10**400, 1]], object(), [[[1, 2]]], np.zeros((0, 2)), np.ones((1, 2), bool), True, Liar()),
    *(np.ones((1025, 2)), SPREAD, np.array([["2020-01-01", "2020-01-02"]], "datetime64[D]")),
)
LABELS = ([7], [2], [-2], [0.5], [np.nan], [], [1, 0], 1, "1", ["1"], [None], [1j], [[1]], {}, [10**400], Liar())
BOXES = (
    *(
        [9, 9, 1, 1],
        [1, 9, 9, 1],
        [9, 1, 1, 9],
        [3, 3, 3, 9],
        [3, 3, 9, 3],
        [0] * 4,
        [np.nan, 0, 1, 1],
        [0, 0, np.inf, 1],
    ),
    *([1, 2, 3], [1, 2, 3, 4, 5], [[1, 2, 3, 4]] * 2, "abcd", [["a"]], [[1], [2, 3]], [1j, 2, 3, 4], 7, {}, [None] * 4),
    *([0, 0, 1e300, 1e300], [500, 500, 900, 900], [True] * 4, ["1", "2", "3", "4"], Liar()),
)
MASKS = (
    *(holed(np.nan), holed(np.inf), holed(-np.inf), holed(1e30), np.zeros((1, 7, 7)), MASK > 0, "mask", {}, Liar()),
    *(MASK.astype(np.uint8), MASK.astype(complex), np.float32(1), [[1.0], [2.0, 3.0]], np.zeros((2, 16, 16))),
    *(np.broadcast_to(np.float32(0), (10**5, 10**6)), [["a"] * 16] * 16, np.full((16, 16), None)),
)
# Of one image.
BATCHES = (
    *(
        (None, "must be a list"),
        ("x", "must be a list"),
        ([], "1 images and 0 lists"),
        ({0: [[Prompt(POINT)]]}, "a list"),
    ),
    *(
        ([[Prompt(POINT)]] * 2, "1 images and 2"),
        (Prompt(POINT), "must be a list"),
        ([Prompt(POINT)], "must be a list"),
    ),
    *(
        ([[POINT]], "not a list"),
        ([None], "prompts of an image"),
        ([["x"]], "not a str"),
        ([[{"box": BOX}]], "not a dict"),
    ),
    *(([[None]], "not a NoneType"), ([[(POINT, None, None, None)]], "not a tuple"), ([[Prompt()]], "a prompt needs")),
    *(([[Prompt(POINT), Prompt(box=BOX[::-1])]], "box"), ([[Prompt(POINT, [3])]], "point_labels")),
    ([[Prompt(mask_input=holed(np.nan))]], "mask_input"),
)
IMAGES = (
    *((value, "from 0 to 255") for value in map(floats, (np.nan, 300, -1, 0.5, np.inf))),
    *((np.full((20, 30, 3), value), "floats must be brought to 0 to 255") for value in (0.5, np.nan)),
    *((array, "an image is uint8") for array in (wide(20, 30, 4), wide(20, 30), wide(0, 30, 3), 5, [], [[1, 2]])),
    *((IMAGE.astype(kind), "an image") for kind in (np.uint16, bool, complex, object, "S3")),
    *((value, "an image is a path") for value in (None, {}, b"x", Liar())),
    *(("", "is a folder"), ("nowhere", "does not exist"), ("a\0b", "a.*b"), ("x" * 5000, "xxx")),
    *((value, "sides of at most") for value in (wide(10**5, 10**5, 3), wide(1, 10**6, 3), Image.new("1", (10**5, 1)))),
)
CALLS = [
    *((lambda p, v=v: p.predict(v), "point_coords") for v in POINTS),
    *((lambda p, v=v: p.predict(POINT, v), "point_labels") for v in LABELS),
    *((lambda p, v=v: p.predict(box=v), "box") for v in BOXES),
    *((lambda p, v=v: p.predict(mask_input=v), "mask_input") for v in MASKS),
    *((lambda p, v=v: p.predict_batch([IMAGE], v), line) for v, line in BATCHES),
    *((lambda p, v=v: p.predict_batch(v, [[Prompt(POINT)]]), "images must be") for v in ("x", None, IMAGE, 5, b"x")),
    *((lambda p, v=v: p.set_image(v), line) for v, line in IMAGES),
    *((lambda p, v=v: p.set_image(IMAGE, v), "image_format") for v in ("RGBA", None, 1, ["RGB"], np.zeros(2))),
    *((lambda p, v=v: p.predict(POINT, multimask_output=v), "multimask") for v in ("no", None, 2, [True], np.zeros(2))),
    (lambda p: p.predict(POINT, return_logits="no"), "return_logits"),
    (lambda p: p.predict_batch([], [], multimask_output="x"), "multimask_output"),
    (lambda p: p.predict(point_labels=[1]), "without point_coords"),
    (lambda p: p.predict(), "a prompt needs"),
    *((lambda p, v=v: SamPredictor(v), "a model must be given") for v in ("slim", None, {}, SQUARE)),
]


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(("call", "line"), CALLS, ids=range(len(CALLS)))
def test_a_hostile_call_is_an_error_that_says_what_is_wrong(ours, call, line):
    start = time.process_time()
    with pytest.raises(InputError, match=line) as error:
        call(ours)
    assert time.process_time() - start < 1 and str(error.value).isprintable() and len(str(error.value)) < 4100


@pytest.mark.parametrize("how", ({"point_coords": [[-1, 21]]}, {"box": [[-3, -3, 31.5, 20.5]]}, {"mask_input": MASK}))
def test_what_is_only_a_little_unusual_is_computed(ours, monkeypatch, how):
    asked = []
    outputs = np.zeros((1, 4, 16, 16), np.float32), np.zeros((1, 4), np.float32)
    monkeypatch.setattr(mixed_prompts, "decode", lambda *arguments: asked.append(arguments) or outputs)
    assert ours.predict(**how).masks.shape == (3, 20, 30)
    assert len(asked) == 1 and np.isfinite(asked[0][3]).all()


NOT_NUMBERS = (None, "1", True, [1], np.array([1, 2]), 1j, np.nan, np.inf, -np.inf, 10**5000, -(10**5000), Liar())
OPTIONAL = {field.name for field in dataclasses.fields(SamAutomaticMaskGenerator) if field.default is None}
FIELDS = [
    *(
        (name, value)
        for name in limits.SEARCH
        for value in NOT_NUMBERS
        if value is not None or name not in {*OPTIONAL, "points_per_side"}
    ),
    *((name, 1.5) for name, allowed in limits.SEARCH.items() if allowed.whole),
    *(("points_per_side", value) for value in (0, -1, 10**6)),
    *(("crop_n_layers", value) for value in (-1, 6, 30)),
    *(("output_mode", value) for value in ("png", None, ["coco_rle"], 5)),
    *(("hierarchical", value) for value in ("no", None, 2)),
    *(("model", value) for value in (None, "slim", 5)),
]
GRIDS = (
    *(5, "x", [], [[]], [None], [[[1]]], [[[0.5, np.nan]]], [[[0.5, 1.5]]], [[[-0.1, 0]]], [np.zeros((0, 2))], [["a"]]),
    *([np.zeros(2)], np.zeros((1, 2)), np.zeros((0, 1, 2))),
    *([SPREAD], [np.zeros((1, 3))], [[[1j, 0]]], [Liar()], {0: np.zeros((1, 2))}),
)


@pytest.mark.parametrize(("name", "value"), FIELDS, ids=lambda value: f"{type(value).__name__}"[:20])
def test_a_hostile_field_of_the_generator_is_refused(name, value):
    with pytest.raises(InputError, match=f"{name} |a model must be given"):
        SamAutomaticMaskGenerator(**{"model": model(), name: value})


@pytest.mark.parametrize("grids", GRIDS, ids=range(len(GRIDS)))
def test_hostile_grids_of_points_are_refused(grids):
    with pytest.raises(InputError, match="point_grids"):
        SamAutomaticMaskGenerator(model(), points_per_side=None, point_grids=grids)


NUMBERS = st.one_of(
    st.floats(width=64),
    st.integers(-(10**25), 10**25),
    st.booleans(),
    st.none(),
    st.text(max_size=3),
    st.complex_numbers(),
)
NESTED = st.recursive(NUMBERS, lambda inner: st.lists(inner, max_size=5), max_leaves=12)


@settings(max_examples=300, deadline=None)
@given(points=NESTED, labels=st.none() | NESTED, box=st.none() | NESTED, mask=st.none() | NESTED)
def test_any_prompt_is_refused_or_finite(points, labels, box, mask):
    encoded = Encoded(None, (43, 64), (20, 30))
    try:
        mixed_prompts.check(model(), Prompt(points, labels, box, mask), encoded.original_size)
    except InputError:
        return
    xy, kinds = mixed_prompts._tokens(model(), encoded, Prompt(points, labels, box, mask))
    assert xy.dtype == np.float32 and np.isfinite(xy).all() and xy.shape == (len(kinds), 2)
    assert (np.abs(xy) <= 200).all() and np.isin(kinds, (-1, 0, 1, 2, 3)).all()


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(limits.SEARCH)), value=NUMBERS)
def test_a_field_within_its_range_is_taken_and_no_other(name, value):
    allowed = limits.SEARCH[name]
    kind = int if allowed.whole else (int, float)
    fits = isinstance(value, kind) and not isinstance(value, bool) and allowed.least <= value <= allowed.most
    more = {"hierarchical": True} if name == "covered_thresh" else {}
    if fits or (value is None and name in OPTIONAL):
        SamAutomaticMaskGenerator(model(), **{name: value}, **more)
    else:
        with pytest.raises(InputError):
            SamAutomaticMaskGenerator(model(), **{name: value}, **more)


def test_floats_and_sixteen_bits_become_eight():
    floats = Image.fromarray(np.array([[0.0, 1.4, 254.6, 255.0]], np.float32))
    assert np.asarray(eight_bits(floats)).tolist() == [[0, 1, 255, 255]]
    assert not np.asarray(eight_bits(Image.fromarray(np.zeros((2, 2), np.float32)))).any()
    deep = Image.fromarray(np.array([[0, 256, 65535]], np.uint16))
    assert np.asarray(predictor.as_image(deep))[0, :, 0].tolist() == [0, 1, 255]


def test_there_are_as_many_as_were_asked_for():
    assert len(CALLS) + len(FIELDS) + len(GRIDS) >= 111


def test_a_run_refuses_what_is_no_model():
    with pytest.raises(InputError, match=r"a model must be given, as .*not a str"):
        dispatch.run(None, "sam.pth")


@pytest.mark.parametrize(
    ("record", "fields", "line"),
    [
        (Optimizer, {"lr": "1e-3"}, "lr '1e-3' is not a number"),
        (Optimizer, {"clip": "1"}, "clip '1' is not a number"),
        (Optimizer, {"lr": None}, "lr None is not a number"),
        (Losses, {"masks": "auto"}, "masks 'auto' is not a number"),
        (Losses, {"padding": 1}, "padding 1 is neither True nor False"),
        (Augment, {"flip": "no"}, "flip 'no' is neither True nor False"),
        (Distill, {"losses": MaskLosses()}, "losses MaskLosses.* is no Losses"),
        (Distill, {"optimizer": 1e-3}, "optimizer 0.001 is no Optimizer"),
        (DistillMasks, {"augment": None}, "augment None is no Augment"),
        (Prune, {"part": "all", "quirks": False}, "quirks False is no Quirks"),
    ],
)
def test_a_field_of_a_step_of_another_type_is_refused(record, fields, line):
    with pytest.raises(InputError, match=f"^{line}"):
        record(**fields)


def test_words_and_none_stand_where_a_field_may_be_one():
    assert Optimizer(lr="auto").lr == "auto" and Prune("all", ratio=None).ratio is None
