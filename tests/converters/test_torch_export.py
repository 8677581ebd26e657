"""Out to PyTorch and Hugging Face: every road gives the same mask, models with unequal blocks included."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from converters import from_torch, to_torch
from converters.pad_to_uniform import pad_to_uniform, uniform_config
from helpers.models import SQUARE, UNEVEN, embed, random_sam
from helpers.peers import segment_anything, stock_sam
from slimsam_jax import checkpoint, data
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.imaging.overlap import iou
from slimsam_jax.inference.decode import encode_image, predict_masks

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.integers(0, 256, (40, 52, 3), np.uint8)
POINT = np.array([[30.0, 12.0]])


def assert_close(found, expected):
    """Within 1e-5 of the largest value."""
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


# ---------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("embed_dim", [13, 24, 40])
def test_padded_twin_is_exact(embed_dim):
    """Narrower and wider than its heads, and just as wide, when nothing needs widening."""
    sam = random_sam(dataclasses.replace(UNEVEN, embed_dim=embed_dim), embed_dim)
    twin = pad_to_uniform(sam)
    assert twin.config.uniform and twin.config.embed_dim == max(24, -(-embed_dim // 3) * 3)
    assert_close(embed(twin, images := normal(2, 64, 64, 3)), embed(sam, images))


def normal(*shape) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


def test_a_uniform_model_is_its_own_twin():
    sam = random_sam(SQUARE)
    assert pad_to_uniform(sam).config == SQUARE
    assert_close(embed(pad_to_uniform(sam), images := normal(1, 64, 64, 3)), embed(sam, images))


def test_windows_of_two_sizes_have_no_twin():
    blocks = (*UNEVEN.blocks, dataclasses.replace(UNEVEN.blocks[0], window=2))
    with pytest.raises(InputError, match="2, 3 tokens wide"):
        uniform_config(dataclasses.replace(UNEVEN, blocks=blocks))


def test_stock_code_finds_the_width_of_the_mlp():
    """It multiplies by a ratio and rounds down."""
    for embed_dim, mlp_dim in itertools.product(range(1, 60), range(1, 80)):
        block = dataclasses.replace(SQUARE.blocks[0], mlp_dim=mlp_dim)
        config = dataclasses.replace(SQUARE, embed_dim=embed_dim, blocks=(block,))
        assert int(embed_dim * to_torch.encoder_arguments(config)["mlp_ratio"]) == mlp_dim


# ----------------------------------------------------------------------- the same mask on all roads


def masks_of_ours(source: Path) -> np.ndarray:
    """[3, h, w] of POINT."""
    sam = from_torch.load(source)
    encoded = encode_image(sam, Image.fromarray(IMAGE))
    return np.stack([predict_masks(sam, encoded, POINT[None], mask=mask)[0][0] for mask in (1, 2, 3)])


def masks_of_predictor(sam) -> np.ndarray:
    """By the stock SamPredictor."""
    predictor = segment_anything().SamPredictor(sam)
    predictor.set_image(IMAGE)
    return predictor.predict(POINT, np.array([1]))[0]


def masks_of_pth(path: Path, config) -> np.ndarray:
    """Loaded strictly into the stock encoder that `encoder_arguments` describe."""
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    sam = stock_sam(config)
    encoder = segment_anything().modeling.ImageEncoderViT(**to_torch.encoder_arguments(config), norm_layer=norm)
    sam.image_encoder = encoder.eval()
    sam.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return masks_of_predictor(sam)


def masks_of_huggingface(folder: Path) -> np.ndarray:
    from transformers import SamModel, SamProcessor

    model, processor = SamModel.from_pretrained(folder), SamProcessor.from_pretrained(folder)
    inputs = processor(Image.fromarray(IMAGE), input_points=[POINT.tolist()], return_tensors="pt")
    with torch.no_grad():
        low = model.eval()(**inputs).pred_masks
    return processor.post_process_masks(low, inputs["original_sizes"], inputs["reshaped_input_sizes"])[0][0].numpy()


def assert_all_roads_agree(model: Path, tmp_path: Path, slim_sam_torch) -> None:
    expected = masks_of_ours(model)
    assert 0.01 < expected.mean() < 0.99  # an empty mask would agree with anything
    to_torch.main(model, tmp_path / "out.pth", "sam", pad_to_uniform=True)
    to_torch.main(model, tmp_path / "hf", "hf", pad_to_uniform=True)
    to_torch.main(model, tmp_path / "as it is.pth", "sam")
    slim_sam_torch.register("slim", tmp_path / "as it is.pth")
    slim_sam_torch.register("vit_b")
    registry = segment_anything().sam_model_registry
    config = uniform_config(from_torch.load(model).config)
    found = {
        "back": masks_of_ours(tmp_path / "out.pth"),
        "back from hf": masks_of_ours(tmp_path / "hf"),
        "pth": masks_of_pth(tmp_path / "out.pth", config),
        "hf": masks_of_huggingface(tmp_path / "hf"),
        "standalone": masks_of_predictor(slim_sam_torch.load(model)),
        "registered": masks_of_predictor(registry["slim"]()),
        "in place of a stock one": masks_of_predictor(registry["vit_b"](checkpoint=str(tmp_path / "out.pth"))),
    }
    for road, masks in found.items():
        assert iou(masks, expected).min() > 0.999, road


def test_all_roads_give_the_same_masks(uneven, tmp_path, slim_sam_torch):
    assert_all_roads_agree(uneven, tmp_path, slim_sam_torch)


@pytest.mark.slow
def test_all_roads_give_the_same_masks_from_a_slimmed_pth(tmp_path, slim_sam_torch, monkeypatch):
    """`.pth` -> ours -> slim -> `.pth`, Hugging Face, standalone, with the small SAM of the package."""
    from slimsam_jax.api import compress_with
    from slimsam_jax.compression.options import Options

    to_torch.main(data.embedded_teacher(), tmp_path / "teacher.pth")
    from_torch.main(tmp_path / "teacher.pth", tmp_path / "teacher")
    options = {"teacher": tmp_path / "teacher.pth", "steps": 0, "importance_images": 4, "out": tmp_path / "slim"}
    compress_with(
        Options(**options, ratio=0.6, set=("prune.head_channels=whole", "prune.criterion=magnitude"), recipe="taylor")
    )
    slim = from_torch.load(tmp_path / "slim").config
    assert not slim.uniform and len({block.heads for block in slim.blocks}) > 1
    image = Image.open(data.embedded_images() / "dog.jpg").convert("RGB")
    monkeypatch.setattr(f"{__name__}.IMAGE", np.asarray(image))
    monkeypatch.setattr(f"{__name__}.POINT", np.array([[image.width / 2, image.height / 2]]))
    for model in ("teacher", "slim"):
        (tmp_path / "out" / model).mkdir(parents=True)
        assert_all_roads_agree(tmp_path / model, tmp_path / "out" / model, slim_sam_torch)


# ------------------------------------------------------------------------------------ the command


def test_bad_input_writes_nothing(uneven, tmp_path):
    checkpoint.save(random_sam(dataclasses.replace(UNEVEN, image_size=(64, 48))), tmp_path / "rectangle")
    with pytest.raises(InputError, match="--pad-to-uniform"):
        to_torch.main(uneven, tmp_path / "out", "hf")
    for format in ("sam", "hf"):
        with pytest.raises(InputError, match="64 x 48 pixels"):
            to_torch.main(tmp_path / "rectangle", tmp_path / "out", format, pad_to_uniform=True)
    (uneven / "report.json").write_text("{}")
    with pytest.raises(InputError, match=r"report\.json cannot be read"):
        to_torch.main(uneven, tmp_path / "out", "hf", pad_to_uniform=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rectangle", "uneven"]


def test_beside_a_pth_lies_what_loads_it(uneven, tmp_path, capsys):
    """One copy for all of a folder; a file of its name that is another's is neither replaced nor relied on."""
    for name in ("one.pth", "two.pth"):
        to_torch.main(uneven, tmp_path / "out" / name)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"one.pth", "two.pth", "slim_sam_torch.py"}
    loader = tmp_path / "out" / "slim_sam_torch.py"
    assert loader.read_bytes() == to_torch.LOADERS["vit"].read_bytes()
    printed = capsys.readouterr().out
    assert f"wrote {tmp_path / 'out' / 'one.pth'} and {loader}\n" in printed
    assert f"register(\"slim\", '{tmp_path / 'out' / 'one.pth'}')" in printed and "ImageEncoderViT" not in printed
    loader.write_text("mine")
    with pytest.raises(InputError, match=r"slim_sam_torch\.py is there already"):
        to_torch.main(uneven, tmp_path / "out" / "three.pth")
    assert loader.read_text() == "mine" and not (tmp_path / "out" / "three.pth").exists()


def test_a_full_disk_leaves_nothing(uneven, tmp_path, monkeypatch):
    def full(tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_torch, "save_file", full)
    monkeypatch.setattr(torch, "save", full)
    for format in ("sam", "hf"):
        with pytest.raises(RunError, match="No space"):
            to_torch.main(uneven, tmp_path / "out", format, pad_to_uniform=True)
    assert [path.name for path in tmp_path.iterdir()] == ["uneven"]


def test_padding_says_what_it_costs(uneven, tmp_path, capsys):
    to_torch.main(uneven, tmp_path / "out.pth", "sam", pad_to_uniform=True)
    line = capsys.readouterr().out.splitlines()[0]
    assert "embedding 13 -> 24, all blocks 3 heads of 8 and 40 MLP channels; parameters 0.0" in line
    to_torch.main(tmp_path / "out.pth", tmp_path / "again.pth", "sam", pad_to_uniform=True)
    assert "padded" not in capsys.readouterr().out
    assert state_equal(tmp_path / "out.pth", tmp_path / "again.pth")


def state_equal(one: Path, other: Path) -> bool:
    a, b = (torch.load(path, weights_only=True) for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
