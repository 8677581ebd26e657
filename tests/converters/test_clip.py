"""A CLIP of a folder, for FastSAM's text prompts: the same numbers as transformers' own, and what is none in a line."""

from __future__ import annotations

import json
import shutil
import sys
import tracemalloc

import numpy as np
import pytest
from PIL import Image

import slimsam_jax
from converters import clip
from helpers.fast_sam_models import random_fast_sam
from helpers.images import random_image
from helpers.models import random_sam, tiny_config
from helpers.programs import run_program
from slimsam_jax import checkpoint
from slimsam_jax.errors import InputError

transformers = pytest.importorskip("transformers")
SIDE, LONGEST = 16, 12  # pixels, tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny CLIP with random weights that knows single letters."""
    import torch

    root = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = {**sizes, **ends, "vocab_size": len(words), "max_position_embeddings": LONGEST}
    vision = {**sizes, "image_size": SIDE, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
    transformers.CLIPModel(config).save_pretrained(root / "clip")
    (root / "clip" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (root / "clip" / "merges.txt").write_text("#version: 0.2\n")
    return root / "clip"


def test_similarity_is_the_cosine_of_transformers_embeddings(folder):
    import torch

    ours = slimsam_jax.load_clip(folder)
    images = [random_image(i, *size) for i, size in enumerate([(16, 16), (20, 33), (40, 16), *[(16, 16)] * 31])]
    found = ours.similarity(iter(images), "a dog")
    assert found.shape == (34,) and np.abs(found).max() <= 1 and found.std() > 1e-3
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokens = [52, 0, *(3, 14, 32), 53]  # <start> a</w> d o g</w> <end>
    tokens[1] = 26
    pixels = torch.from_numpy(np.stack([clip.prepared(image, SIDE) for image in images]))
    with torch.no_grad():
        out = model(input_ids=torch.tensor([tokens]), pixel_values=pixels)
    np.testing.assert_allclose(found, torch.cosine_similarity(out.image_embeds, out.text_embeds).numpy(), atol=1e-6)
    assert ours.similarity([], "a dog").shape == (0,)
    with pytest.raises(InputError, match="a text of 14 tokens is longer than this CLIP reads, 12"):
        ours.similarity(images, "abcdefghijkl")


@pytest.mark.parametrize("size", [(23, 37), (37, 23), (9, 30), (40, 24)])  # smaller and larger than the model's
def test_images_are_prepared_as_by_clip(size):
    """The shorter side to the model's, the middle of the longer, in CLIP's units."""
    theirs = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)
    image = random_image(0, *size)
    expected = theirs(image, return_tensors="np")["pixel_values"][0]
    level = 1 / 255 / min(clip.DEVIATION)
    np.testing.assert_allclose(clip.prepared(image, SIDE), expected, rtol=0, atol=1.01 * level)


@pytest.mark.parametrize("size", [(1, 512), (512, 1)])
def test_a_thin_image_takes_no_more_memory_than_another(size):
    """Enlarged whole, it is 64 x 32768 pixels, 6 MB."""
    tracemalloc.start()
    try:
        assert clip.prepared(random_image(0, *size), 64).shape == (3, 64, 64)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_what_is_no_clip_is_one_line(folder, tmp_path, monkeypatch):
    def changed(name, change):
        other = tmp_path / name
        shutil.copytree(folder, other)
        change(other)
        return other

    weightless = lambda path: (path / "model.safetensors").unlink()
    another = lambda path: (path / "config.json").write_text('{"model_type": "bert"}')
    broken = lambda path: (path / "model.safetensors").write_bytes(b"x" * 100)
    wordless = lambda path: [(path / name).unlink() for name in ("vocab.json", "merges.txt")]
    garbled = lambda path: (path / "vocab.json").write_text("[")

    def poorer(path):
        from safetensors.numpy import load_file, save_file

        arrays = load_file(path / "model.safetensors")
        save_file({k: v for k, v in arrays.items() if k != "visual_projection.weight"}, path / "model.safetensors")

    def richer(path):
        words = json.loads((path / "vocab.json").read_text())
        (path / "vocab.json").write_text(json.dumps({**words, "dog</w>": 54}))

    for path, message in (
        (tmp_path / "absent", "absent is no folder"),
        (changed("weightless", weightless), "holds no CLIP: there is no model.safetensors"),
        (changed("another", another), "its config.json does not say so"),
        (changed("broken", broken), "it is no safetensors file, or one that was cut off"),
        (changed("poorer", poorer), "lacks 1 arrays of its CLIP: visual_projection.weight"),
        (changed("wordless", wordless), "holds no tokenizer: no tokenizer.json, nor vocab.json and merges.txt"),
        (changed("garbled", garbled), "is no CLIP that transformers reads"),
        (changed("richer", richer), "has another CLIP's tokenizer: token 54, and its CLIP knows 54"),
    ):
        with pytest.raises(InputError, match=message):
            slimsam_jax.load_clip(path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"need transformers and PyTorch: pip install 'slimsam_jax\[clip\]'"):
        slimsam_jax.load_clip(folder)


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("text_config", "num_hidden_layers", 100_000, "text_config.num_hidden_layers 100000 must be"),
        ("vision_config", "num_hidden_layers", 65, "vision_config.num_hidden_layers 65 must be"),
        ("vision_config", "intermediate_size", 10**6, "1000000 in its config.json is above 262144"),
        ("text_config", "num_labels", 10**9, "1000000000 in its config.json is above 262144"),
        ("vision_config", "hidden_size", 2**14, "numbers, and the CLIP of its config.json has"),
        ("vision_config", "image_size", 2048, "vision_config.image_size 2048 must be"),
        ("vision_config", "image_size", [16, 16], "is not a whole number"),
        ("vision_config", "image_size", 4, "the number of its patches 0 must be at least 1"),
        ("vision_config", "patch_size", 0, "vision_config.patch_size 0 must be at least 1"),
        ("vision_config", "hidden_size", "8", "is no CLIP that transformers reads"),
    ],
)
def test_what_a_description_asks_for_is_bounded(folder, tmp_path, monkeypatch, part, name, value, message):
    """Before a model is made of it, and before more is allocated than the folder's own file has."""
    description = json.loads((folder / "config.json").read_text())
    description[part][name] = value
    shutil.copytree(folder, tmp_path / "clip")
    (tmp_path / "clip" / "config.json").write_text(json.dumps(description))
    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("allocated"))
    with pytest.raises(InputError, match=message):
        slimsam_jax.load_clip(tmp_path / "clip")


def test_a_tokenizer_in_one_file_is_as_good(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "clip")
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "clip")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "clip" / name).unlink()
    assert (tmp_path / "clip" / "tokenizer.json").is_file()
    image = [random_image(0, 16, 16)]
    one, two = (slimsam_jax.load_clip(path).similarity(image, "a dog") for path in (folder, tmp_path / "clip"))
    np.testing.assert_array_equal(one, two)


def test_predict_takes_a_text(folder, tmp_path, monkeypatch, capsys):
    checkpoint.save(random_fast_sam(), tmp_path / "fast")
    checkpoint.save(random_sam(tiny_config()), tmp_path / "sam")
    Image.fromarray(random_image(1, 48, 64)).save(tmp_path / "image.png")

    def run(model, *arguments):
        ends = ("--image", tmp_path / "image.png", "--out", tmp_path / "x.png")
        return run_program(monkeypatch, capsys, "predict", "--model", tmp_path / model, *ends, *arguments)

    code, said, error = run("fast", "--text", "a dog", "--clip", folder)
    assert code == 0 and "similarity with the text" in said and (tmp_path / "x.png").stat().st_size, error
    for model, arguments, message in (
        ("sam", ("--text", "a dog", "--clip", folder), "a text prompt is for a FastSAM"),
        ("fast", ("--text", "a dog"), "--text and --clip FOLDER are one prompt"),
        ("fast", ("--clip", folder, "--point", "3,3"), "--text and --clip FOLDER are one prompt"),
        ("fast", ("--text", "a dog", "--clip", folder, "--box", "2,2,9,9"), "and neither a point nor a box"),
        ("fast", ("--text", "a dog", "--clip", tmp_path), "holds no CLIP: there is no config.json"),
    ):
        code, _, error = run(model, *arguments)
        assert code == 2 and message in error, error
