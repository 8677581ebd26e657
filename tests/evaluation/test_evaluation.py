"""Protocols and scores by hand, and against the original code; comparisons of models; the command."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy import ndimage

from converters.from_torch import load
from helpers.images import samples, save_image, truncated, write_annotation
from helpers.models import SQUARE, random_sam, tiny_config
from helpers.programs import run_program
from helpers.shared import shared
from slimsam_jax import checkpoint
from slimsam_jax.data import Annotation, find
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.evaluation import bootstrap, clicks, scores, tables
from slimsam_jax.evaluation.compare import compare_models, measure_models
from slimsam_jax.evaluation.protocols import box, box_noisy, prompt_points
from slimsam_jax.evaluation.scores import Protocols
from slimsam_jax.imaging import geometry
from slimsam_jax.imaging.overlap import boundary, boundary_iou, iou
from slimsam_jax.imaging.prompts import Prompts
from slimsam_jax.inference.decode import decode_prompts, encode_image
from slimsam_jax.models import sam as models
from slimsam_jax.models import sam_head
from slimsam_jax.profiling import sam_costs

MASKS = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=30))


def annotation(mask: np.ndarray, point=(0, 0), id=-1) -> Annotation:
    rows, columns = geometry.bounding_window(mask)
    box = (columns.start, rows.start, columns.stop, rows.stop)
    return Annotation(id, mask, np.array(box, float), np.array(point, float), np.array(box, float))


def rectangle(shape, top, left, bottom, right) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[top:bottom, left:right] = True
    return mask


def test_boundary_iou_by_hand():
    """On 40 x 30 pixels, of diagonal 50, a boundary is one pixel wide."""
    big, small = rectangle((40, 30), 5, 5, 15, 15), rectangle((40, 30), 5, 5, 15, 14)
    # Outlines of 10 x 10 and 10 x 9: 36 and 34 pixels; they share the left column, and 8 each of top and bottom row.
    assert boundary_iou(big, small) == pytest.approx((10 + 2 * 8) / (36 + 34 - 26))
    # On 80 x 60, of diagonal 100, it is two wide: rings of 20 x 20 and 20 x 17 less 16 x 16 and 16 x 13, which share
    # the left two columns and of the others the two top and bottom rows, 15 and 15.
    big, small = rectangle((80, 60), 5, 5, 25, 25), rectangle((80, 60), 5, 5, 25, 22)
    shared_ = 2 * 20 + 4 * 15
    assert boundary_iou(big, small) == pytest.approx(shared_ / (400 - 256 + 340 - 208 - shared_))
    whole = np.ones((40, 30), bool)  # the image's edge is an outline too
    assert boundary(whole, 1).sum() == 40 * 30 - 38 * 28


@settings(max_examples=100, deadline=None)
@given(MASKS, st.integers(1, 5))
def test_boundaries_equal_repeated_erosion(mask, distance):
    eroded = ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=distance)
    np.testing.assert_array_equal(boundary(mask, distance), mask & ~eroded)


@settings(max_examples=100, deadline=None)
@given(MASKS, st.randoms(use_true_random=False))
def test_scores_of_masks_equal_counting_pixels(mask, random):
    other = np.array([random.random() < 0.5 for _ in range(mask.size)]).reshape(mask.shape)
    distance = max(1, round(0.02 * math.hypot(*mask.shape)))
    edges = [boundary(m, distance) for m in (mask, other)]
    for found, (a, b) in ((iou(mask, other), (mask, other)), (boundary_iou(mask, other), edges)):
        assert found == ((a & b).sum() / (a | b).sum() if (a | b).any() else 1)


def test_depth_by_hand():
    """Where the middle of a square is, tests/data/test_sources.py has."""
    assert geometry.interior_point(rectangle((9, 12), 1, 2, 6, 7))[1] == 3
    corner = rectangle((9, 12), 0, 0, 3, 3)  # the border counts as outside
    assert geometry.interior_point(corner)[0].tolist() == [1.5, 1.5] and geometry.interior_point(corner)[1] == 2
    assert geometry.interior_point(corner, taken=[[1.5, 1.5]])[1] == 1


@settings(max_examples=100, deadline=None)
@given(MASKS.filter(np.any))
def test_no_pixel_is_deeper_than_the_deepest(mask):
    (x, y), depth = geometry.interior_point(mask)
    outside = np.argwhere(~np.pad(mask, 1)) - 1
    depths = [np.hypot(*(outside - pixel).T).min() for pixel in np.argwhere(mask)]
    assert mask[int(y), int(x)] and depth == pytest.approx(max(depths))


def test_noise_on_boxes_is_bounded_and_an_images_own():
    mask = rectangle((300, 400), 0, 100, 290, 160)
    many = box_noisy([annotation(mask)] * 500, 1).points - box([annotation(mask)]).points
    left, top, right, bottom = many.reshape(-1, 4).T
    assert np.abs(left).std() > 2 and np.std(left) == pytest.approx(6, rel=0.1)  # 10 % of 60
    assert np.abs(right).max() <= 20 and np.abs(many).max() <= 20 + 1e-4
    assert (top >= 0).all() and (bottom <= 10).all()  # inside the image
    one, other = (box_noisy([annotation(mask)], image).points for image in (1, 2))
    assert np.array_equal(one, box_noisy([annotation(mask)], 1).points) and not np.array_equal(one, other)


def test_choices_among_outputs(monkeypatch, tiny_sam):
    """Four outputs of which the single one is half right, one of the others perfect, and the most promising empty."""
    truth = rectangle((8, 8), 0, 0, 4, 8)
    masks = np.stack([truth & rectangle((8, 8), 0, 0, 2, 8), truth, ~truth, truth & False])
    monkeypatch.setattr(scores, "decode_prompts", lambda *_: (masks[None], np.array([[0.9, 0.6, 0.7, 0.8]])))
    monkeypatch.setattr(scores, "original_masks", lambda sam, encoded, low: low)
    found = scores.prompt_scores(tiny_sam, None, [annotation(truth)], None)
    assert (found["iou"], found["iou_best"], found["iou_oracle"]) == (0.5, 0, 1)
    assert (found["boundary_best"], found["boundary_oracle"]) == (0, 1) and 0 < found["boundary"] < 1
    monkeypatch.setattr(scores, "ranking", lambda sam, low, predicted: -predicted)  # EdgeSAM's are ranked otherwise
    assert scores.prompt_scores(tiny_sam, None, [annotation(truth)], None)["iou_best"] == 1


def test_sizes_are_those_of_coco():
    found = scores.means_by_size({"iou": np.array([0.1, 0.2, 0.4, 0.6])}, np.array([1023, 1024, 9215, 9216]))
    assert found == pytest.approx({"iou": 0.325, "iou_small": 0.1, "iou_medium": 0.3, "iou_large": 0.6})
    assert "iou_large" not in scores.means_by_size({"iou": np.array([0.1])}, np.array([5]))


def test_clicks_correct_what_is_wrong(monkeypatch, tiny_sam):
    """A model that answers with too much, then too little, then rightly."""
    truth = rectangle((20, 20), 0, 0, 9, 9)
    surplus = rectangle((20, 20), 12, 10, 19, 17)
    answers = iter([truth | surplus, truth & ~rectangle((20, 20), 0, 0, 5, 5), truth, truth & False])
    given_ = []

    def decode(sam, encoded, given, previous=None):
        given_.append((given.points.copy(), given.labels.copy(), previous))
        return next(answers)[None, None].astype(float), np.ones((1, 1))

    monkeypatch.setattr(clicks, "decode_prompts", decode)
    monkeypatch.setattr(clicks, "original_masks", lambda sam, encoded, low: low > 0)
    ious = clicks.click_ious(tiny_sam, None, [annotation(truth)], 4)
    np.testing.assert_allclose(ious, [[81 / 130, 56 / 81, 1, 1]])  # a mask without a fault stays
    points, labels, previous = zip(*given_, strict=True)
    for k, label in enumerate([[1, -2, -2, -2, -1], [1, 0, -2, -2, -1], [1, 0, 1, -2, -1], [1, 0, 1, -2, -1]]):
        assert labels[k].tolist() == [label]
        wanted = [[4.5, 4.5], [13.5, 15.5], [2.5, 2.5]][: k + 1]
        assert points[k][0, : k + 1].tolist()[:3] == wanted
    for k, mask in enumerate([None, truth | surplus, truth & ~rectangle((20, 20), 0, 0, 5, 5), truth]):
        np.testing.assert_array_equal(previous[k], None if mask is None else mask[None])


def test_number_of_clicks_by_hand():
    ious = np.array([[0.5, 0.9, 0.86], [0.85, 0.1, 0.2], [0.1, 0.2, 0.3]])
    assert clicks.clicks_to(ious, 0.85).tolist() == [2, 1, 3]
    assert clicks.clicks_to(ious, 0.9).tolist() == [2, 3, 3]


@pytest.fixture(scope="module")
def encoded(tiny_sam):
    return encode_image(tiny_sam, noise((40, 30)))


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 11), st.sampled_from((0, 3)))
def test_padding_changes_no_mask(tiny_sam, encoded, count, absent):
    """Neither other prompts in the same call nor absent points."""
    xy = np.random.default_rng(count).uniform(0, 30, (count, 1, 2))
    given_ = Prompts(*prompt_points(xy, np.ones((count, 1))))
    filled = Prompts(
        np.concatenate([np.full((count, absent, 2), 7.0), given_.points], axis=1),
        np.concatenate([np.full((count, absent), -2), given_.labels], axis=1),
    )
    low, predicted = decode_prompts(tiny_sam, encoded, filled)
    assert len(low) == count
    i = count // 2
    alone = decode_prompts(tiny_sam, encoded, Prompts(*(a[i : i + 1] for a in given_)))
    np.testing.assert_allclose(low[i], alone[0][0], atol=2e-4)
    np.testing.assert_allclose(predicted[i], alone[1][0], atol=2e-4)


def test_nothing_is_compiled_from_image_to_image(tiny_sam):
    """Encoder and decoder: images of other sizes, other numbers of annotations."""
    protocols = Protocols(("box", "clicks"), clicks=2)

    def measure(size: tuple[int, int], count: int) -> None:
        annotations = [annotation(rectangle(size, 2, 2, 9 + i, 12)) for i in range(count)]
        found = encode_image(tiny_sam, noise(size))
        scores.image_scores([tiny_sam], [found], annotations, protocols)

    sizes = lambda: (models.encode._cache_size(), sam_head.decode._cache_size())
    measure((40, 30), 6)  # buckets of 1 and 4
    before = sizes()
    for size, count in (((31, 57), 1), ((64, 64), 4), ((50, 20), 11)):
        measure(size, count)
    assert sizes() == before


def test_bootstrap_of_a_normal_mean():
    values = np.random.default_rng(0).normal(3, 2, (400, 1))
    low, high = bootstrap.bootstrap(values, seed=0)[:, 0]
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    np.testing.assert_array_equal(bootstrap.bootstrap(values, seed=0)[:, 0], (low, high))  # follows from the seed
    assert (bootstrap.bootstrap(values, seed=1)[:, 0] != (low, high)).any()
    with pytest.MonkeyPatch.context() as patch:  # in parts that fit into memory
        patch.setattr(bootstrap, "DRAWS", 1000)
        np.testing.assert_allclose(bootstrap.bootstrap(values, seed=0)[:, 0], (low, high), atol=0.1 * error)


def test_differences_are_paired():
    """Images differ a lot, models always by the same: the difference is certain, the means are not."""
    levels = np.linspace(0, 0.8, 30)
    found = bootstrap.summarise([[{"box/iou": v}, {"box/iou": v + 0.1}] for v in levels], seed=0)["box/iou"]
    assert found[1]["difference_interval"] == pytest.approx([0.1, 0.1]) and found[1]["difference"] == pytest.approx(0.1)
    assert found[0]["interval"][1] - found[0]["interval"][0] > 0.1 and "difference" not in found[0]


def test_scores_that_some_images_lack():
    images = [[{"box/iou": 0.5, "box/iou_small": 0.2}], [{"box/iou": 0.7}], [{"box/iou": 0.6}]]
    found = bootstrap.summarise(images, seed=0)["box/iou_small"][0]
    assert (found["mean"], found["images"]) == (0.2, 1) and found["interval"] == pytest.approx([0.2, 0.2])
    assert tables.rows({"box/iou": [{"mean": 0.6, "images": 3}], "box/iou_small": [found]})[1][0] == (
        "box mIoU, small (1 images)"
    )


@pytest.mark.slow
def test_scores_equal_the_original_on_real_photographs():
    teacher = load(shared("teacher/sam_small_256.pth"))
    expected = json.loads(shared("teacher/bsds_val_per_image.json").read_text())
    measured = measure_models([teacher], find([shared("data/bsds_val")]), Protocols(("point", "box")))
    assert set(measured.scores) == set(expected["per_image"]) and len(measured.scores) == 100
    for kind in ("point", "box"):
        found = {name: image[0][f"{kind}/iou"] for name, image in measured.scores.items()}
        assert found == pytest.approx({name: image[kind] for name, image in expected["per_image"].items()}, abs=0.01)
        assert np.mean(list(found.values())) == pytest.approx(expected[kind], abs=0.001)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three images, two of them annotated, one of those broken."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(3):
        save_image(folder / f"{i}.png", seed=i)
    write_annotation(folder / "0.png")
    write_annotation(folder / "1.png")
    truncated(folder / "3.jpg")
    return folder


def test_models_are_measured_on_what_can_be_read(images):
    sams = [random_sam(tiny_config(), seed) for seed in (0, 1)]
    names = (*scores.LABELLED, "agreement")
    measured = measure_models(sams, find([images]), Protocols(names, clicks=2))
    assert set(measured.scores) == {"0", "1", "2"} and "3.jpg" in next(iter(measured.skipped))
    one, other = measured.scores["0"]
    assert one["agreement/iou"] == 1 > other["agreement/iou"]
    assert one["clicks/iou_1"] == one["point-center/iou"]  # the same click
    assert one["box/iou_oracle"] >= one["box/iou_best"]
    assert set(measured.scores["2"][0]) == {"agreement/iou"}  # it has no annotations
    again = measure_models(sams[1:], find([images])[::-1], Protocols(names, clicks=2))
    assert again.digest == measured.digest
    alone = {key: value for key, value in again.scores["0"][0].items() if key != "agreement/iou"}
    assert alone == {key: value for key, value in other.items() if key != "agreement/iou"}
    with pytest.raises(RunError, match=r"1 of 4 images cannot be used, more than --max-broken 0\.2"):
        measure_models(sams[1:], find([images]), Protocols(("point",)), max_broken=0.2)


def test_digest_tells_data_apart(images, tmp_path):
    digests = set()
    for seed, name in ((0, "a"), (1, "a"), (0, "b")):
        path = save_image(tmp_path / str(seed) / name / f"{name}.png", seed=seed)
        write_annotation(path)
        measured = measure_models([random_sam(tiny_config())], samples([path]), Protocols(("box",)))
        digests.add(measured.digest)
    assert len(digests) == 2  # names do not count


def test_command_writes_table_json_and_figure(material, tmp_path, monkeypatch, capsys):
    teacher = load(material / "teacher")
    encoder = {**teacher.params["image_encoder"], "pos_embed": teacher.params["image_encoder"]["pos_embed"] + 0.3}
    other = dataclasses.replace(teacher, params={**teacher.params, "image_encoder": encoder})
    checkpoint.save(other, tmp_path / "other")
    out = [tmp_path / "new" / name for name in ("x.json", "x.md", "x.png")]
    arguments = ("--data", material / "val", "--json", out[0], "--markdown", out[1], "--figure", out[2])
    arguments = ("--model", material / "teacher", tmp_path / "other", *arguments, "--protocol", "box", "agreement")
    code, text, _ = run_program(monkeypatch, capsys, "evaluate", *arguments)
    assert code == 0 and "2 images" in text
    result = json.loads(out[0].read_text())
    assert set(result["per_image"]) == {"0", "1"} and set(result["models"]) == {"teacher", "other"}
    assert result["models"]["other"]["sha256"] == checkpoint.sha256(tmp_path / "other")
    values = [image["other"]["box/iou"] - image["teacher"]["box/iou"] for image in result["per_image"].values()]
    assert result["results"]["box/iou"]["other"]["difference"] == pytest.approx(np.mean(values))
    lines = out[1].read_text().splitlines()
    assert lines[2].startswith("| box mIoU | ")
    costs = result["models"]["other"]["costs"]
    size = sam_costs.parameters(other.params)
    assert costs["parameters"] == size and costs["encoder_latency_ms"] > 0
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(encoder))
    assert weights < costs["encoder_memory"] < 100 * weights
    assert costs["encoder_macs_linear"] == sam_costs.encoder_macs(other.config).linear
    row = f"| parameters, whole model | {size / 1e6:.2f} M | {size / 1e6:.2f} M |"
    assert row in lines and "parameters, whole model" in text
    with Image.open(out[2]) as drawn:
        assert drawn.size == (1300, 1100)


def test_what_cannot_be_measured_is_said(material, tmp_path, monkeypatch, capsys):
    checkpoint.save(random_sam(SQUARE, seed=1), tmp_path / "other")
    arguments = ("--model", material / "teacher", tmp_path / "other", "--data", material / "images")
    code, text, _ = run_program(monkeypatch, capsys, "evaluate", *arguments, "--protocol", "point", "box", "agreement")
    assert code == 0 and text.endswith("6 images\nnot measured, as none of the images is annotated: point, box\n")
    code, text, _ = run_program(monkeypatch, capsys, "evaluate", *arguments, "--protocol", "agreement")
    assert code == 0 and "not measured" not in text


def test_costs_need_no_images(material, monkeypatch, capsys):
    code, text, _ = run_program(monkeypatch, capsys, "evaluate", "--model", material / "teacher")
    assert code == 0 and "encoder MACs, attention" in text and "mIoU" not in text
    for more in (("--protocol", "box"), ("--no-costs",), ("--json", "x.json")):
        code, _, error = run_program(monkeypatch, capsys, "evaluate", "--model", material / "teacher", *more)
        assert code == 2 and "--data needs at least one value" in error


def test_figure_of_one_model(material, tmp_path, monkeypatch, capsys):
    arguments = ("--model", material / "teacher", "--data", material / "val", "--protocol", "clicks", "--clicks", "1")
    code, text, error = run_program(monkeypatch, capsys, "evaluate", *arguments, "--figure", tmp_path / "x.png")
    assert code == 0 and "mIoU after click 1" in text and (tmp_path / "x.png").stat().st_size > 10_000, error


def test_one_line_for_bad_input(material, tmp_path, monkeypatch, capsys):
    good = {"--model": material / "teacher", "--data": material / "val"}
    for changes, message in (
        ({"--data": material / "images"}, "none is annotated"),
        ({"--data": tmp_path / "no"}, "does not exist; give a folder of images"),
        ({"--model": tmp_path / "no"}, "no"),
        ({"--protocol": "agreement"}, "needs at least two models"),
        ({"--clicks": "0"}, "--clicks 0 must be at least 1"),
        ({"--json": tmp_path}, "is a folder, and an output file is needed"),
    ):
        arguments = [part for pair in (good | changes).items() for part in pair]
        code, _, error = run_program(monkeypatch, capsys, "evaluate", *arguments)
        assert code == 2 and message in error and error.count("error:") == 1, error
    (tmp_path / "broken").mkdir()
    truncated(tmp_path / "broken" / "a.jpg")
    code, _, error = run_program(
        monkeypatch, capsys, "evaluate", "--model", material / "teacher", "--data", tmp_path / "broken"
    )
    assert (
        code == 1 and "1 of 1 images cannot be used, more than --max-broken 0.1; the last: " in error.splitlines()[-1]
    )


def test_a_model_given_twice_is_refused(material, monkeypatch, capsys):
    code, _, error = run_program(
        monkeypatch,
        capsys,
        "evaluate",
        "--model",
        material / "teacher",
        material / "teacher",
        "--data",
        material / "val",
    )
    assert code == 2 and "a model twice" in error


def test_compare_models_refuses_what_cannot_be_read(tmp_path, tiny_sam):
    with pytest.raises(InputError, match=r"no image can be compared on: .*a\.jpg"):
        compare_models(tiny_sam, tiny_sam, samples([truncated(tmp_path / "a.jpg")]))
