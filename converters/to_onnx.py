"""Converts ours to ONNX, checked by JAX. `python -m converters.to_onnx MODEL FOLDER --layout sam|transformers_js`."""

from __future__ import annotations

import importlib.util
import logging
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tyro.conf import Positional

from converters import huggingface
from slimsam_jax import cli
from slimsam_jax.cli.checks import check_empty
from slimsam_jax.errors import InputError, RunError, writing

if TYPE_CHECKING:
    import onnx

    from converters.onnx.check import Errors, Reference
    from slimsam_jax.models.sam import Architecture, Sam

# What needs JAX or onnx is imported where it is used: --help should not wait for it.

Dtype = Literal["float32", "float16", "int8", "integers", "integers_float16"]
Layout = Literal["sam", "transformers_js", "efficient_sam", "sam2"]
SUFFIXES = {"float32": "", "float16": "_fp16", "int8": "_quantized"}  # transformers.js's
INTEGERS = {"integers": "", "integers_float16": "f16"}  # behind what `suffix_of` says
STEMS = dict.fromkeys(("sam", "efficient_sam", "sam2"), ("encoder", "decoder"))
STEMS |= {"transformers_js": ("onnx/vision_encoder", "onnx/prompt_encoder_mask_decoder")}
LAYOUTS = {  # by the kind of head
    "sam": ("sam", "transformers_js"),
    "efficient_sam": ("sam", "efficient_sam"),
    "sam2": ("sam", "sam2"),
}
CHOOSE = ("sam", "sam2")  # whose decoders may give a single mask
LARGEST_ERROR = 1e-3  # of float32 and integers; rounding gives 1e-5 at most (see `apart`), a wrong graph 1e-1
LARGEST_FILE = 2**31 - 2**24  # bytes of arrays: protobuf's limit less the nodes; larger ones get a second file


def models(
    sam: Sam, layout: Layout, dtype: Any, return_single_mask: bool = False, integers: bool = False
) -> list[onnx.ModelProto]:
    """Builds encoder and decoder, `dtype` np.float32 or np.float16; of a quantised model perhaps with its integers."""
    import flax.traverse_util

    from converters.onnx import efficient_sam_layout, layouts, sam2
    from slimsam_jax.models.sam import dequantized, folded
    from slimsam_jax.quantization import is_quantized

    sam = sam if integers else folded(dequantized(sam))
    flat = flax.traverse_util.flatten_dict(sam.params, sep="/")
    params = {path: array if is_quantized(array) else np.asarray(array) for path, array in flat.items()}
    if layout in CHOOSE:
        encoder, decoder = (
            (layouts.sam_encoder, layouts.sam_decoder) if layout == "sam" else (sam2.encoder, sam2.decoder)
        )
        return [encoder(sam.config, params, dtype), decoder(sam.config, params, dtype, return_single_mask)]
    makers = {
        "transformers_js": (layouts.vision_encoder, layouts.prompt_encoder_mask_decoder),
        "efficient_sam": (efficient_sam_layout.encoder, efficient_sam_layout.decoder),
    }
    return [make(sam.config, params, dtype) for make in makers[layout]]


def check_model(sam: Sam, where: str, layout: Layout = "sam") -> None:
    """Raises InputError if there is no graph of the encoder's family or its head, or the layout cannot express it."""
    from converters.onnx.layouts import ENCODERS
    from slimsam_jax.models.encoders import name_of
    from slimsam_jax.models.heads import name_of as kind_of

    if (family := name_of(sam.config.encoder)) not in ENCODERS:
        raise InputError(f"{where} is a {family}, and ONNX is written of {', '.join(ENCODERS)} alone")
    if layout not in (known := LAYOUTS.get(head := kind_of(sam.config.head), ())):
        advice = f"take {' or '.join(known)}" if known else "there is none"
        raise InputError(f"--layout {layout} is not for {where}, whose prompts are those of {head}; {advice}")
    if layout == "transformers_js" and len(set(sam.config.image_size)) > 1:
        height, width = sam.config.image_size
        raise InputError(f"transformers.js pads images to squares, and {where} takes {height} x {width}; use sam")


def save(model: onnx.ModelProto, path: Path) -> None:
    """Writes and checks one model; arrays that exceed protobuf's limit go into `path` + "_data"."""
    import onnx

    large = sum(len(array.raw_data) for array in model.graph.initializer) > LARGEST_FILE
    apart = {"save_as_external_data": True, "location": f"{path.name}_data", "size_threshold": 1024} if large else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path.name):
        onnx.save_model(model, path, **apart)
        onnx.checker.check_model(path, full_check=True)


def quantize(source: Path, target: Path) -> None:
    """Quantizes linear layers: weights to int8, per output channel; inputs to uint8, as they come (dynamic).

    Convolutions, positions and the products inside attention stay float32: they are few weights or none. So do the
    layers by which the decoder's image attends to tokens, which are few and half of the masks' error.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    nodes = onnx.load(source, load_external_data=False).graph.node
    linear = [node.name for node in nodes if node.op_type == "MatMul" and node.input[1].endswith("/kernel")]
    linear = [name for name in linear if "cross_attn_image_to_token" not in name]
    logging.disable(logging.WARNING)  # it recommends a pass that only models of torch need
    try:
        with writing(target.name):
            # Of 7 bits: products of 8 overflow on x86 processors without VNNI, and the error is no smaller.
            kinds = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": True}
            quantize_dynamic(source, target, nodes_to_quantize=linear, **kinds)
    finally:
        logging.disable(logging.NOTSET)


def write(sam: Sam, folder: Path, layout: Layout, dtype: Dtype, return_single_mask: bool = False) -> list[Path]:
    """Writes encoder and decoder in one dtype; int8 is made of the float32 files, which must be there."""
    from converters.onnx.integers import suffix_of

    suffix = SUFFIXES[dtype] if dtype in SUFFIXES else suffix_of(sam) + INTEGERS[dtype]
    paths = [folder / f"{stem}{suffix}.onnx" for stem in STEMS[layout]]
    if dtype == "int8":
        for stem, path in zip(STEMS[layout], paths, strict=True):
            quantize(folder / f"{stem}.onnx", path)
    else:
        integers = dtype in INTEGERS
        kind = np.dtype(np.float16 if "float16" in dtype else np.float32)
        for model, path in zip(models(sam, layout, kind, return_single_mask, integers), paths, strict=True):
            save(model, path)
    return paths


def measure(
    expected: Reference, layout: Layout, paths: Sequence[Path], return_single_mask: bool = False, **opened: Any
) -> Errors:
    """Compares encoder and decoder with JAX; see `converters.onnx.check.Errors`, and its `opened`."""
    from converters.onnx import check

    if layout in CHOOSE:
        compare = check.compare_sam if layout == "sam" else check.compare_sam2
        return compare(expected, *paths, return_single_mask, **opened)
    compare = {"transformers_js": check.compare_transformers_js, "efficient_sam": check.compare_efficient_sam}
    return compare[layout](expected, *paths, **opened)


def describe(config: Architecture, folder: Path) -> None:
    """Writes the two files that transformers.js reads, with all widths of models whose blocks are not alike."""
    from slimsam_jax.files import write_json
    from slimsam_jax.models.config import Config

    fields = huggingface.description(config)
    if isinstance(config, Config) and not config.uniform:
        for name in ("num_attention_heads", "mlp_dim", "mlp_ratio"):  # true of the first block only
            del fields["vision_config"][name]
    fields["slimsam_jax"] = config.to_json()
    external = {path.name.removesuffix("_data"): True for path in (folder / "onnx").glob("*.onnx_data")}
    if external:
        fields["transformers.js_config"] = {"use_external_data_format": external}
    write_json(folder / "config.json", fields)
    write_json(folder / "preprocessor_config.json", huggingface.preprocessor(config))


def export(
    sam: Sam, folder: Path, layout: Layout, dtypes: tuple[Dtype, ...], image: Any, return_single_mask: bool = False
) -> None:
    """Writes the folder and prints errors and sizes.

    Raises:
      RunError: float32 or integers differ from JAX by more than rounding may, or are not finite; nothing is written.
    """
    from converters.onnx.apart import check_parts, limit_of
    from converters.onnx.check import reference
    from converters.onnx.kernels import describe as kernels
    from slimsam_jax.files import new_folder
    from slimsam_jax.models.sam import dequantized
    from slimsam_jax.quantization.running import quantizes_inputs

    inputs = quantizes_inputs(sam.params)  # of which float32 has nothing, but what the weights stand for
    plain = reference(dequantized(sam) if inputs else sam, image)
    own = reference(sam, image) if inputs and set(dtypes) & set(INTEGERS) else plain
    limit = None if own is plain else limit_of(own, plain, LARGEST_ERROR)
    written = lambda bare, where: write(bare, where, layout, "integers", return_single_mask)
    without_codes = lambda *bare: measure(plain, layout, written(*bare), return_single_mask)
    lines, float32, timed = [], None, {"int8", *INTEGERS} & set(dtypes)
    with new_folder(folder) as temporary:
        for dtype in ("float32", *(d for d in dtypes if d != "float32")):  # float32 proves the graph
            paths = write(sam, temporary, layout, dtype, return_single_mask)
            expected = (own, limit) if dtype in INTEGERS else (plain, None)
            if expected[1]:
                check_parts(sam, paths[0], without_codes, LARGEST_ERROR)
            said, opened = compared(*expected, layout, dtype, paths, return_single_mask)
            lines += [said, *(f"  {describe_file(path, temporary)}" for path in paths)]
            if dtype == "int8" or dtype in INTEGERS:
                lines += kernels(float32, opened, [Path(stem).name for stem in STEMS[layout]])
            float32 = float32 or (opened if timed else None)
            del opened  # a session holds all weights
        if "float32" not in dtypes:
            lines = lines[3:]
            for stem in STEMS[layout]:
                for path in (temporary / f"{stem}.onnx").parent.glob(f"{Path(stem).name}.onnx*"):
                    path.unlink()
        if layout == "transformers_js":
            describe(sam.config, temporary)
    print("\n".join(lines))


def compared(
    expected: Reference, limit: float | None, layout: Layout, dtype: Dtype, paths: list[Path], single: bool
) -> tuple[str, list[Any]]:
    """A line about a pair of files, and the two as they were opened; `limit`: where inputs are quantised."""
    from converters.onnx.apart import Apart
    from converters.onnx.kernels import Opened, saturation, summary

    exact = dtype in ("float32", "integers")
    said = lambda differences: f"{dtype}: {summary(differences, score_of(expected.config))}"
    opened = {path: Opened(path, kernels=False, counted=not exact) for path in paths}
    run = opened | {paths[0]: Apart(opened[paths[0]], expected)} if limit else opened
    differences = measure(expected, layout, paths, single, opened=run.__getitem__)
    differences = run[paths[0]].completed(differences) if limit else differences
    allowed = limit or LARGEST_ERROR, LARGEST_ERROR, LARGEST_ERROR
    if exact and not all(map(operator.le, differences, allowed)):  # NaN, too
        raise RunError(f"the ONNX model differs from JAX: {said(differences)}; nothing is written")
    if dtype == "integers":  # that the graph is right is shown in float32, and now what its kernels make of it
        opened = {path: Opened(path) for path in paths}
        differences = measure(expected, layout, paths, single, opened=opened.__getitem__)
    more = saturation(differences, allowed[0]) if dtype == "integers" else ""
    return said(differences) + more, list(opened.values())


def score_of(config: Architecture) -> str:
    """What a model ranks its masks by, in words."""
    from slimsam_jax.inference.ranking import ranks_by_stability

    return "stability" if ranks_by_stability(config) else "predicted IoU"


def describe_file(path: Path, root: Path) -> str:
    return f"{path.relative_to(root)}  {sum(p.stat().st_size for p in path.parent.glob(f'{path.name}*')) / 1e6:.2f} MB"


def main(
    source: Positional[Path],
    folder: Positional[Path],
    layout: Layout = "sam",
    dtype: tuple[Dtype, ...] = ("float32",),
    return_single_mask: bool = False,
    image: Path | None = None,
) -> None:
    """Convert a model into ONNX files, and check them against JAX with onnxruntime.

    Blocks need not be alike, nor images square. In the layout sam, encoder.onnx takes uint8 images
    [b, 3, height, width] scaled to fit the model (as ResizeLongestSide does), and normalises and pads
    them itself; decoder.onnx has the signature of Meta's SamOnnxModel. The layout transformers_js is a
    folder for SamModel.from_pretrained of transformers.js, which scales images otherwise than everyone
    else (sides rounded down, no smoothing), so that masks deviate unless it is given scaled images.
    EfficientSAM goes to sam and to efficient_sam, the signature of its own export: batched_images
    float32 [b, 3, height, width], 0 to 1, of any size, and many queries for each image. Its graphs
    fail for what it cannot take, a node's name saying why. SAM 2 goes to sam, with images of any
    size and two finer maps more between encoder and decoder, and to sam2, the names of the exports
    made for it: image float32 [b, 3, height, width], stretched and normalised.

    Args:
      source: a model folder, a .pth, or a Hugging Face SamModel folder.
      folder: the folder to write; must not exist or be empty.
      layout: sam for Meta's tools, transformers_js for the browser, where masks deviate (see above),
        efficient_sam and sam2 for tools made for these.
      dtype: one or several. float16 keeps residual stream, LayerNorm, softmax and positions in float32;
        int8 quantizes the weights of linear layers, and their inputs as they come; integers are those of a quantised
        model (slimsam quantize), which stand in the file as they are, integers_float16 beside float16. Of integers
        milliseconds are printed, too.
      return_single_mask: of the layout sam: the decoder chooses one of its masks, as Meta's option does; of sam2: the
        single mask, or the best of the others where it is unstable.
      image: the image to check with; one of ours if not given.
    """
    check_empty(folder)
    if layout not in CHOOSE and return_single_mask:
        raise InputError("--return-single-mask belongs to --layout sam and sam2; who calls the others chooses")
    if len(set(dtype)) != len(dtype) or not dtype:
        raise InputError(f"--dtype {' '.join(dtype)}: give at least one, and each once")
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"writing ONNX needs {' and '.join(missing)}: pip install onnx onnxruntime")
    from converters.from_torch import load_sam as load
    from converters.onnx.integers import check_integers
    from slimsam_jax import data

    photo = data.read_image(image or data.embedded_images() / "dog.jpg")
    sam = load(source)
    check_model(sam, str(source), layout)
    if set(dtype) & set(INTEGERS):
        check_integers(sam, str(source), dtype)
    export(sam, folder, layout, dtype, photo, return_single_mask)
    print(f"wrote {folder}")


if __name__ == "__main__":
    cli.run(main)
