"""Runs `experiments.train_reference`, from the first weights to the model folder."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from converters.from_torch import load
from experiments.reference_data import composites
from slimsam_jax import __version__, checkpoint, data, sharding
from slimsam_jax.data import Sample
from slimsam_jax.data.prompted import annotated
from slimsam_jax.errors import InputError
from slimsam_jax.files import replacing
from slimsam_jax.models import config as configs
from slimsam_jax.models.config import GLOBAL, Block, Config
from slimsam_jax.models.sam import Sam, init
from slimsam_jax.profiling import sam_costs
from slimsam_jax.training.masks import PROTOCOLS, MaskTraining, Settings
from slimsam_jax.training.run_folder import RunFolder
from slimsam_jax.training.setup import batch_size, check_batch, compute_dtype, split_images

if TYPE_CHECKING:
    from experiments.train_reference import Options

MOST_PARAMETERS = 2 * 10**9  # three times those of SAM-H
COMPOSITES = 200_000  # different ones; a training of more meets some again
RATES = {"random": 5e-4, "init": 5e-5}  # the default learning rates


def run(options: Options) -> dict[str, Any]:
    """See `train_reference.main`, which checks the options first."""
    settings = settings_of(options)
    images, val = (annotated(samples, "training") for samples in images_of(options))
    if settings.batch > type(options).batch:  # the default may be more than there are
        check_batch(options, settings.batch, len(images))
    sam = first_model(options)
    val = val[: options.val_images]
    origin = provenance(options, settings, sam, images, val)
    with RunFolder(options.out, origin, options.resume) as folder:
        trained = MaskTraining(folder, sam, images, val, settings).run()
        numbers = finish(folder, trained, origin, options.keep) if sharding.is_main() else {}
        sharding.barrier("finished")
    return numbers


def images_of(options: Options) -> tuple[list[Sample], list[Sample]]:
    """Splits samples into those to learn from and those to measure on."""
    if not options.composites:
        return split_images(options)
    return composites.samples(options.composites, "train", COMPOSITES, options.seed), data.find(options.val)


def settings_of(options: Options) -> Settings:
    """Returns the options that a training reads."""
    names = {field.name for field in dataclasses.fields(Settings)} - {"dtype", "batch", "learning_rate"}
    rate = options.learning_rate or RATES["init" if options.init else "random"]
    how = {"dtype": compute_dtype(options), "batch": batch_size(options), "learning_rate": rate}
    return Settings(**{name: getattr(options, name) for name in names}, **how)


def first_model(options: Options) -> Sam:
    """Loads `--init`, or draws random weights, of the decoder's side those of `--decoder`.

    Raises:
      InputError: the sizes asked for are not those of `--init`, or fit no SAM.
    """
    if options.init:
        return of_the_sizes_asked(load(options.init), options)
    config, head, origin = architecture(options.preset or "small", options.sizes()), {}, {}
    if options.decoder:
        other = load(options.decoder)
        encoder = {"image_size": config.image_size, "embed_dim": config.embed_dim, "blocks": config.blocks}
        try:
            config = dataclasses.replace(other.config, **encoder)
        except ValueError as error:  # patches of another size
            raise InputError(str(error)) from None
        head = {name: other.params[name] for name in ("prompt_encoder", "mask_decoder")}
        origin = other.provenance
    params = jax.device_get(jax.jit(init, static_argnums=0)(config, jax.random.key(options.seed)))
    return Sam(config, params | head, origin)


def of_the_sizes_asked(sam: Sam, options: Options) -> Sam:
    has = sizes_of(sam.config)
    for name, asked in options.sizes().items():
        if asked != has[name]:
            flag = name.replace("_", "-")
            raise InputError(f"--init {options.init} has {flag} {has[name]}, and --{flag} {asked} asks for another")
    return sam


def architecture(preset: str, sizes: dict[str, int]) -> Config:
    """Returns a preset with some sizes changed.

    Raises:
      InputError: there is no such SAM.
    """
    base = configs.preset(preset)
    has = {**sizes_of(base), **sizes}
    if "mlp_dim" not in sizes and "embed_dim" in sizes:
        has["mlp_dim"] = 4 * has["embed_dim"]
    if has["embed_dim"] % has["heads"]:
        raise InputError(f"--embed-dim {has['embed_dim']} is no multiple of the {has['heads']} heads")
    block = Block(has["heads"], has["embed_dim"] // has["heads"], has["mlp_dim"], has["window"])
    last_of_quarters = {math.ceil((i + 1) * has["depth"] / 4) - 1 for i in range(4)}
    windows = [GLOBAL if i in last_of_quarters else has["window"] for i in range(has["depth"])]
    blocks = tuple(dataclasses.replace(block, window=window) for window in windows)
    try:
        size = (has["image_size"], has["image_size"])
        config = dataclasses.replace(base, image_size=size, embed_dim=has["embed_dim"], blocks=blocks)
    except ValueError as error:
        raise InputError(str(error)) from None
    if (count := sam_costs.encoder_parameters(config)) > MOST_PARAMETERS:
        raise InputError(f"an image encoder of these sizes has {count / 1e9:.1f} G parameters, too many to train")
    return config


def sizes_of(config: Config) -> dict[str, int]:
    """Returns the sizes by their options' names of an architecture; of one whose blocks differ, the first block's."""
    block, window = config.blocks[0], max(block.window for block in config.blocks)
    height, width = config.image_size
    return {
        "embed_dim": config.embed_dim,
        "depth": len(config.blocks),
        "heads": block.heads,
        "mlp_dim": block.mlp_dim,
        "image_size": height if height == width else 0,
        "window": window,
    }


def provenance(
    options: Options, settings: Settings, sam: Sam, images: Sequence[Sample], val: Sequence[Sample]
) -> dict[str, Any]:
    """Records where a model comes from, for its config.json; a resumed run must agree in all of it."""
    digest = lambda samples: hashlib.sha256("\n".join(sample.name for sample in samples).encode()).hexdigest()
    packages = ("jax", "flax", "optax", "numpy")
    return {
        "init": start_of(options.init, sam),
        "decoder": start_of(options.decoder, sam),
        "images": {"count": len(images), "sha256_of_names": digest(images)},
        "val": {"count": len(val), "sha256_of_names": digest(val)},
        "options": {**options.fixing_the_result(), "learning_rate": settings.learning_rate},
        "dtype": str(jax.numpy.dtype(settings.dtype)),
        "versions": {"slimsam_jax": __version__, **{name: version(name) for name in packages}},
    }


def start_of(path: Path | None, sam: Sam) -> dict[str, Any] | None:
    """Reads what a model says of the checkpoint that `sam` was started from."""
    if not path:
        return None
    return {"file": path.name, "sha256": checkpoint.sha256(path), "provenance": sam.provenance}


def finish(folder: RunFolder, sam: Sam, origin: dict[str, Any], keep: str) -> dict[str, Any]:
    """Writes the model and its curve, and cleans up."""
    checkpoint.save(dataclasses.replace(sam, provenance=origin), folder.path)
    log = folder.read_log()
    draw(log, folder.path / "curve.png")
    folder.finish()
    scores = [entry for entry in log if "score" in entry]
    kept = max(scores, key=lambda e: (e["score"], e["step"])) if keep == "best" else scores[-1]
    mious = ", ".join(f"{name} mIoU {100 * kept[f'{name}_miou']:.2f} %" for name in PROTOCOLS)
    print(f"step {kept['step']}: {mious}; the model is in {folder.path}")
    return kept


def draw(log: Sequence[dict[str, Any]], out: Path) -> None:
    """Writes a PNG of the learning curve: losses and what they mean for the masks, against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses, scores = ([entry for entry in log if key in entry] for key in ("loss", "score"))
    left.plot([e["step"] for e in losses], [e["loss"] for e in losses])
    left.set(title="loss of the step", xlabel="step", yscale="log")
    for name in PROTOCOLS:
        values = [100 * e[f"{name}_miou"] for e in scores]
        right.plot([e["step"] for e in scores], values, marker=".", label=f"{name}, held out")
    for name in sorted({key for entry in losses for key in entry if key.startswith("iou_")}):
        clicks = f"{name.removeprefix('iou_')} corrections"
        right.plot([e["step"] for e in losses], [100 * e[name] for e in losses], lw=0.5, label=f"training, {clicks}")
    right.set(title="mIoU, %", xlabel="step")
    right.legend()
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
