"""A SAM of integers: made with images, kept in a folder, used and exported like any other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import onnx
import pytest
from flax.traverse_util import flatten_dict

import slimsam_jax
from converters import to_onnx, to_torch
from converters.onnx import check, integers, kernels
from converters.onnx.graph import Graph
from helpers.family_models import sam2
from helpers.images import samples
from helpers.models import random_sam, tiny_config
from slimsam_jax import checkpoint, data
from slimsam_jax.compression import quantize as quantize_module
from slimsam_jax.compression.analysis import Bench
from slimsam_jax.compression.integers import Quantize
from slimsam_jax.compression.mixed_bits import choose, packed_bytes
from slimsam_jax.compression.plan import check as check_recipe
from slimsam_jax.compression.plan import names
from slimsam_jax.compression.quantize import ENCODER, quantize
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.set_option import change
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.models.encoders import hiera
from slimsam_jax.models.sam import dequantized, encode
from slimsam_jax.profiling.sam_costs import parameters
from slimsam_jax.quantization import Quantized, Range, Statistics, is_quantized
from slimsam_jax.quantization.tinysam_function import Search
from slimsam_jax.quantize.__main__ import main

SMALL = tiny_config(image_size=(64, 64), decoder_depth=1, multimask_outputs=1)
SMALL = dataclasses.replace(SMALL, blocks=SMALL.blocks[:1])


@pytest.fixture(scope="module")
def photos():
    return sorted(data.embedded_images().glob("*.jpg"))[:4]


@pytest.fixture(scope="module")
def sam():
    return random_sam(SMALL, 1)


@pytest.fixture(scope="module")
def quantized(sam, photos, tmp_path_factory):
    """By the program: with four bits, its encoder's layers with inputs of eight; as it is read from its folder."""
    folder = tmp_path_factory.mktemp("quantized")
    checkpoint.save(sam, folder / "float")
    (folder / "photos").mkdir()
    for photo in photos:
        (folder / "photos" / photo.name).symlink_to(photo)
    settings = ("float_inputs=1", "quantize.float_weights=2")
    main(folder / "float", folder / "out", (str(folder / "photos"),), 4, 8, settings)
    return folder / "out", checkpoint.load(folder / "out")


@pytest.fixture(scope="module")
def weights_alone(quantized):
    """The same whose inputs stay as they are."""
    _, sam = quantized
    plain = lambda leaf: dataclasses.replace(leaf, range=None) if is_quantized(leaf) else leaf
    return dataclasses.replace(sam, params=jax.tree.map(plain, sam.params, is_leaf=is_quantized))


def nodes_of(sam):
    leaves = jax.tree_util.tree_leaves_with_path(sam.params, is_leaf=is_quantized)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in leaves if is_quantized(leaf)}


def test_a_folder_has_the_integers(sam, quantized):
    folder, loaded = quantized
    nodes = nodes_of(loaded)
    kernels = [path for path in flatten_dict(sam.params, sep="/") if path.endswith("kernel")]
    assert len(set(kernels) - set(nodes)) == 2 and set(nodes) <= set(kernels)  # all but two of the head's
    inside = [path for path, leaf in nodes.items() if leaf.range is not None]
    assert all(path.startswith("image_encoder") for path in inside)
    assert len(inside) == sum(path.startswith("image_encoder") for path in nodes) - 2  # the first, and one that costs
    described = json.loads((folder / "config.json").read_text())
    assert {kind["bits"] for kind in described["quantization"]} == {4}
    assert described["provenance"]["quantized"]["activations"] == 8
    assert parameters(loaded.params) == parameters(sam.params)
    size = (folder / "model.safetensors").stat().st_size
    assert size < 0.5 * sum(4 * leaf.size for leaf in jax.tree.leaves(sam.params))  # of so small a model much is scales


def test_it_computes_like_what_it_was_made_of(sam, quantized, weights_alone):
    """And with integers alone to the bit what they stand for."""
    _, loaded = quantized
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8), np.array([[64, 50]])
    embed = lambda sam: np.asarray(encode(sam.config, sam.params, *image))
    plain, inputs, weights = embed(sam), embed(loaded), embed(weights_alone)
    error = lambda embedding: np.square(embedding - plain).mean() / plain.var()
    assert 0 < error(weights) < 0.05 and error(weights) < error(inputs) < 0.1
    np.testing.assert_allclose(weights, embed(dequantized(weights_alone)), atol=1e-6)


def test_it_predicts(quantized, photos):
    masks, scores, _ = slimsam_jax.predict(quantized[1], photos[0], points=[[50, 40]], multimask_output=True)
    assert masks.shape[0] == 1 and np.isfinite(scores).all()


def test_pytorch_gets_what_the_integers_stand_for(weights_alone):
    state = to_torch.to_state_dict(weights_alone)
    expected = dequantized(weights_alone).params["image_encoder"]["blocks_0"]["mlp_lin1"]["kernel"]
    np.testing.assert_array_equal(state["image_encoder.blocks.0.mlp.lin1.weight"].T, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_onnx_has_the_integers_and_computes_the_same(bits, weights_alone):
    wide = lambda leaf: dataclasses.replace(leaf, codes=leaf.codes.astype(np.int8), bits=bits)
    change_bits = lambda leaf: wide(leaf) if is_quantized(leaf) else leaf
    own = dataclasses.replace(
        weights_alone, params=jax.tree.map(change_bits, weights_alone.params, is_leaf=is_quantized)
    )
    encoder, _ = to_onnx.models(own, "sam", np.float32, integers=True)
    onnx.checker.check_model(encoder, full_check=True)
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    (found,) = check.session(encoder.SerializeToString()).run(None, {"images": image.transpose(0, 3, 1, 2)})
    expected = encode(own.config, own.params, image, np.array([[64, 64]]))
    np.testing.assert_allclose(found.transpose(0, 2, 3, 1), expected, atol=1e-4)
    kinds = [node.op_type for node in encoder.graph.node]
    count = sum(path.startswith("image_encoder") for path in nodes_of(own))
    assert kinds.count("MatMulNBits") == (count - 2 if bits == 4 else 0)  # convolutions have none
    assert kinds.count("DequantizeLinear") == (2 if bits == 4 else count)
    assert integers.suffix_of(own) == ("_q4" if bits == 4 else "_quantized")


@pytest.mark.parametrize(
    ("shape", "axes", "scale"),
    [((64, 32), (1,), (64, 1)), ((64, 64), (1,), (64, 1)), ((64, 32), (0,), (16, 32)), ((96, 32), (0,), (4, 32))],
    ids=["other axes", "square", "groups of 4", "groups of 24"],
)
def test_integers_that_no_graph_can_have_are_refused(shape, axes, scale):
    node = Quantized(np.ones(shape, np.int8), np.ones(scale, np.float32), bits=4, axes=axes)
    right = Quantized(node.codes, np.ones((shape[0] // 32, shape[1]), np.float32), bits=4)
    assert integers.linear(Graph({}), "x", "w", right, shape[1]) == "w"
    with pytest.raises(
        InputError, match=r"^w: its integers are grouped as no graph can have them; take --dtype float32"
    ):
        integers.linear(Graph({}), "x", "w", node, shape[1])


@pytest.mark.parametrize(
    ("dtype", "error"), [(dtype, error) for dtype in ("float32", "integers") for error in (2e-3, np.nan)]
)
def test_onnx_that_differs_is_not_kept(dtype, error, sam, tmp_path, monkeypatch):
    errors = {"float32": 0.0, dtype: error}
    monkeypatch.setattr(check, "reference", lambda sam, image: sam)  # of which the architecture is read
    monkeypatch.setattr(to_onnx, "write", lambda sam, folder, layout, dtype, single: [folder / dtype])
    monkeypatch.setattr(kernels, "Opened", lambda path, **_: path)
    monkeypatch.setattr(
        to_onnx, "measure", lambda expected, layout, paths, single, **_: check.Errors(errors[paths[0].name], 0, 0, 1)
    )
    with pytest.raises(RunError, match="differs from JAX"):
        to_onnx.export(sam, tmp_path / "out", "sam", ("float32", "integers"), None)
    assert not (tmp_path / "out").exists()


def test_what_is_refused(sam, quantized, photos, tmp_path):
    folder, loaded = quantized
    with pytest.raises(InputError, match="integers cannot be quantised again"):
        quantize(loaded, photos[0].parent)
    with pytest.raises(InputError, match="integers cannot be compressed: take the model that it was made of"):
        slimsam_jax.compress(folder, photos[0].parent, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="integers cannot be cut"):
        Bench(loaded, RECIPES["default"], [], 4, 0)
    with pytest.raises(InputError, match="no images to calibrate with"):
        quantize(sam, [])
    with pytest.raises(InputError, match="a step says all of its choices: give a step, or images"):
        quantize(sam, photos[0].parent, step=Quantize(), images=3)
    options = {"recipe": "mobile_sam", "student": folder, "out": tmp_path / "out"}
    with pytest.raises(InputError, match="integers cannot be trained: take the model that it was made of"):
        slimsam_jax.compress(folder.parent / "float", photos[0].parent, **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="not quantised"):
        integers.check_integers(sam, "m", ["integers"])


@pytest.mark.parametrize(
    "choices",
    [
        {"weights": 1},
        {"weights": 17},
        {"activations": 1},
        {"activations": 17},
        {"group": 3},
        {"ranges": "token"},
        {"arithmetic": "integer"},
        {"images": 0},
    ],
)
def test_choices_that_there_are_not(choices):
    with pytest.raises(InputError):
        Quantize(**choices)


def test_broken_images_are_named_or_too_many(sam, photos, tmp_path, monkeypatch, capsys):
    """Where they are read; what is made of the others is another test's."""
    monkeypatch.setattr(quantize_module, "see", lambda *_: None)
    monkeypatch.setattr(quantize_module, "with_integers", lambda sam, *_: sam.params)
    (tmp_path / "broken.png").write_bytes(b"none")
    images = samples([*photos, tmp_path / "broken.png"])
    quantize(sam, images)
    assert "skipped: " in capsys.readouterr().out
    with pytest.raises(RunError):
        quantize_module.quantized(sam, images, Quantize(), max_broken=0.0)


def test_an_embedding_of_several_maps(photos):
    """SAM 2's, whose decoder is given all three; errors of layers count the maps alike."""
    encoder = hiera.uniform(8, 1, (1, 1, 1, 1), (2,), (8, 4, 6, 3), (3, 3), image_size=64)
    model = sam2(dataclasses.replace(encoder, out_chans=16))
    small = quantize(model, samples(photos), images=4, float_weights=1)
    assert sum(map(is_quantized, jax.tree.leaves(small.params, is_leaf=is_quantized))) > 20


def test_it_is_a_step_of_a_recipe():
    recipe = (*RECIPES["default"], Quantize())
    assert names(recipe)[-1] == "quantize"
    assert change(recipe, ["quantize.weights=4"])[-1].weights == 4
    check_recipe((Quantize(),))


HEAD = "mask_decoder/transformer/layers_0"


@pytest.fixture
def two_mlps(sam, monkeypatch):
    """Statistics of a block's MLP in either part, of whose layers the last by name cost masks most.

    What is asked of masks is traced, and not computed.
    """
    names = ("mlp_lin1/kernel", "mlp_lin2/kernel")
    flat = flatten_dict(sam.params, sep="/")

    def seen(root, part=""):
        shapes = {f"{root}/{name}": flat[f"{part}{root}/{name}"].shape for name in names}
        return {
            path: Statistics((0,), np.zeros(n, int), np.eye(m)[None], np.zeros((1, m)), 9, Range(-1, 1))
            for path, (m, n) in shapes.items()
        }

    def costs(function, params, integers, batches):
        results = jax.eval_shape(lambda params: function(params, *batches[0]), params)
        traced.append([leaf.shape for leaf in jax.tree.leaves(results)])
        paths = sorted(nodes_of(dataclasses.replace(sam, params=integers)), reverse=True)
        return {path: (1.0 / 10 ** (4 * place), 0.0) for place, path in enumerate(paths)}

    traced = []
    monkeypatch.setattr(quantize_module, "sensitivity", costs)
    image = (np.zeros((1, 64, 64, 3), np.uint8), np.full((1, 2), 64))
    prompts = (
        np.zeros((4, 4, SMALL.out_chans), np.float32),
        np.zeros((3, 2, 2), np.float32),
        np.ones((3, 2), np.int32),
    )
    return quantize_module.Seen(seen("blocks_0", ENCODER), seen(HEAD), [image], [prompts]), traced


def bits_of(sam, params):
    return {path: leaf.bits for path, leaf in nodes_of(dataclasses.replace(sam, params=params)).items()}


def test_the_worst_layers_of_the_decoder_stay(sam, two_mlps):
    """Those of the encoder do not."""
    params = quantize_module.with_integers(sam, Quantize(weights=4, float_weights=1), two_mlps[0])
    assert set(bits_of(sam, params).values()) == {4} and len(bits_of(sam, params)) == 3
    np.testing.assert_array_equal(
        *(flatten_dict(tree, sep="/")[f"{HEAD}/mlp_lin2/kernel"] for tree in (params, sam.params))
    )


def test_a_share_is_filled_in_both_parts(sam, two_mlps):
    """By masks' errors: with 8 bits, then floats; ranges of inputs count, and what cannot be is refused."""
    (seen, traced), flat = two_mlps, flatten_dict(sam.params, sep="/")
    worst = [f"{ENCODER}blocks_0/mlp_lin2/kernel", f"{HEAD}/mlp_lin2/kernel"]
    count, whole = sum(flat[path].size for path in worst), packed_bytes(sam.params)
    made = lambda **choices: quantize_module.with_integers(sam, Quantize(weights=4, **choices), seen)
    least = packed_bytes(made())
    filled = lambda room, **choices: made(share=(least + room) / whole, **choices)
    eight = filled(count // 2 + 8)
    assert traced == [[(3, 2, 16, 16)]] * 2
    assert {path for path, bits in bits_of(sam, eight).items() if bits == 8} == set(worst)
    assert least < packed_bytes(eight) <= least + count // 2 + 8
    assert least < packed_bytes(filled(count // 2 + 4, activations=8)) <= least + count // 2 + 4
    floats = filled(count // 2 + 3 * count + 8)
    for path in worst:
        np.testing.assert_array_equal(flatten_dict(floats, sep="/")[path], flat[path])
    assert set(bits_of(sam, floats)) == set(bits_of(sam, eight)) - set(worst)
    with pytest.raises(
        InputError, match=r"^share=0.126: integers of 4 bits alone take 0[.][0-9]+ of .* a larger share, or fewer bits"
    ):
        made(share=0.126)


def test_a_share_that_no_layer_can_meet_is_refused_before_an_image_is_read(sam):
    with pytest.raises(InputError, match=r"^share=0.13: integers of 4 bits alone take at least 0[.][0-9]+ of float32"):
        quantize(sam, samples([Path("nowhere.png")]), weights=4, share=0.13)


@pytest.mark.parametrize(("weights", "share"), [(8, 0.25), (4, 0.1)])
def test_a_share_that_no_model_can_meet_is_no_choice(weights, share):
    with pytest.raises(InputError, match=f"^share={share}: integers of {weights} bits alone take more than "):
        Quantize(weights=weights, share=share)


def test_a_share_of_the_size_goes_where_masks_gain_most_a_byte():
    node = lambda count, bits=4: Quantized(np.zeros((1, count), np.int8), np.ones((1, count), np.float32), None, bits)
    nodes = {"a": node(100), "b": node(1000), "c": node(10), "d": node(10, 8)}
    errors = {"a": 1.0, "b": 2.0, "c": 0.5, "d": 0.5}
    # 8 bits of a, b and c cost 50, 500 and 5 bytes more, floats 300, 3000, 30 and 30 beyond those.
    assert choose(errors, nodes, 54) == {"c": 8, "d": 32}
    assert choose(errors, nodes, 90) == {"c": 8, "d": 32, "a": 8}
    assert choose(errors, nodes, 620) == {"c": 32, "d": 32, "a": 8, "b": 8}
    assert choose(errors, nodes, 4) == {}
    assert packed_bytes({"layer": node(100), "bias": np.zeros(3, np.float32)}) == 50 + 400 + 12


def test_tinysams_scheme_takes_one_batch_and_no_statistics(sam, material, monkeypatch):
    """And the model says how many images that were."""
    seen = []
    monkeypatch.setattr(quantize_module, "capture", lambda *_: pytest.fail("captured"))
    monkeypatch.setattr(
        quantize_module, "prompted", lambda sam, batches, seed: [len(batch["image"]) for batch in batches]
    )
    monkeypatch.setattr(quantize_module, "with_integers", lambda sam, step, own: seen.append(own) or sam.params)
    photos = samples(sorted((material / "images").iterdir()))
    for asked, used in ((32, 4), (3, 3)):
        step = Quantize(activations=8, method="tinysam", head=False, images=asked)
        new, _ = quantize_module.quantized(sam, photos, step)
        assert new.provenance["quantized"]["calibration_images"] == used
        assert [len(images) for images, _ in seen[-1].images] == seen[-1].prompts == [used]
    with pytest.raises(InputError, match="float_weights are of prompt encoder and decoder"):
        Quantize(float_weights=2, head=False)


def test_tinysams_scheme_runs_on_an_encoder(sam):
    """Guided by masks; and it is of the encoder and its inputs alone."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (1, 64, 64, 3), np.uint8), np.array([[64, 50]])
    prompts = [(None, np.float32([[[20, 30]]]), np.array([[1]]))]
    seen = quantize_module.Seen({}, {}, [images], prompts)
    step = Quantize(weights=6, activations=6, method="tinysam", head=False)
    encoder = quantize_module.tinysam_encoder(sam, step, seen, Search(1, (1.0, 1.0, 1)))
    nodes = nodes_of(dataclasses.replace(sam, params=encoder))
    spans = [() if leaf.range is None else leaf.range.shape for leaf in nodes.values()]
    assert len(nodes) == 9 and spans.count(()) == 1 and spans.count((3,)) == 1  # the first, and the one behind GELU
    for wrong in ({"head": True}, {"activations": 0}, {"ranges": "token"}):
        with pytest.raises(InputError, match="method tinysam is of the image encoder"):
            Quantize(**{"weights": 6, "activations": 6, "method": "tinysam", "head": False, **wrong})
