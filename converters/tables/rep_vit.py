"""EdgeSAM's names and layouts (`edge_sam.pth`, `edge_sam_3x.pth`) <-> ours, strict both ways.

From facts alone: names and shapes, not EdgeSAM's code, whose licence is non-commercial; so is that of the published
weights. Nothing in a file tells the image size. Batch norm's counters are kept aside for the way back.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from converters.tables.rows import CONV, VECTOR, Row, _layer, _norm
from converters.tables.sam_head import abstract_head, head_architecture, head_rows, with_loader
from converters.tables.strict import Converted, Layer, State, abstract, placed, shapes, to_params, to_state
from slimsam_jax.errors import InputError
from slimsam_jax.models.config import DEEPEST
from slimsam_jax.models.encoders.rep_vit_config import STAGES, Block, Config, config_of, squeezed_dim

POINTWISE = "o i 1 1 -> i o"
COUNTER = ".num_batches_tracked"
FEATURES = "image_encoder.features"
ENCODER_ALONE = "features.0.0.c.weight"  # of the first stage of EdgeSAM's training
IGNORED = ("fpn.", "rpn_head.")  # proposals of boxes, in some of the published files


def conv_norm(name: str, path: str, kernel: str) -> list[Layer]:
    """The rows of a convolution `c` and its batch norm `bn`."""
    leaves = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    norm = [(f"{name}.bn.{theirs}", f"{path}/bn/{ours}", VECTOR) for theirs, ours in leaves.items()]
    return [(f"{name}.c.weight", f"{path}/kernel", kernel), *norm]


ENDS = [
    *conv_norm("features.0.0", "stem_0", CONV),
    *conv_norm("features.0.2", "stem_2", CONV),
    *_layer("fuse_stage2", "fuse_2", POINTWISE, None),
    *_layer("fuse_stage3.op_list.0", "fuse_3", POINTWISE, None),
    *_layer("neck.0", "neck_0", CONV, None),
    *_norm("neck.1", "neck_1"),
    *_layer("neck.2", "neck_2", CONV, None),
    *_norm("neck.3", "neck_3"),
]
STRIDED = [*conv_norm("token_mixer.0", "conv", CONV), *conv_norm("token_mixer.2", "project", POINTWISE)]
BRANCHES = [*conv_norm("token_mixer.0.conv", "conv", CONV), *conv_norm("token_mixer.0.conv1", "conv1", CONV)]
SQUEEZE = [
    *_layer("token_mixer.1.fc1", "squeeze/fc1", POINTWISE),
    *_layer("token_mixer.1.fc2", "squeeze/fc2", POINTWISE),
]
MIXER = [
    *conv_norm("channel_mixer.m.0", "mixer_0", POINTWISE),
    *conv_norm("channel_mixer.m.2", "mixer_2", POINTWISE),
]


GIVEN = ("image_size", "single_mask", "decoder_heads")  # see `converters.families`


class Outline(NamedTuple):
    """What the table needs of an architecture: for each block of each stage, whether it has squeeze-excite."""

    stages: tuple[tuple[bool, ...], ...]


def rows(outline: Outline) -> list[Row]:
    """The table of an image encoder with batch norms and branches: a row per array."""
    table = placed("image_encoder", "image_encoder", ENDS)
    numbers = itertools.count(1)
    for i, stage in enumerate(outline.stages):
        for j, squeeze in enumerate(stage):
            layers = [*(STRIDED if i and not j else BRANCHES), *(SQUEEZE if squeeze else ()), *MIXER]
            table += placed(f"{FEATURES}.{next(numbers)}", f"image_encoder/stages_{i}/blocks_{j}", layers)
    return table


def outline_of(config: Config) -> Outline:
    """Of an architecture."""
    return Outline(tuple(tuple(block.squeezed > 0 for block in stage.blocks) for stage in config.stages))


def outline(state: Mapping[str, np.ndarray]) -> Outline:
    """Of a state dict: a stage begins where a block has no branches.

    Raises:
      ValueError: it has too many blocks, or other than four stages.
    """
    found = {int(match[1][:4]) for name in state if (match := re.match(rf"{re.escape(FEATURES)}\.(\d+)\.", name))}
    if len(found) > DEEPEST + 1:
        raise ValueError(f"it has {len(found) - 1} blocks, and at most {DEEPEST} are taken")
    stages: list[list[bool]] = [[]]
    for number in sorted(found - {0}):
        mixer = f"{FEATURES}.{number}.token_mixer"
        if f"{mixer}.2.c.weight" in state:
            stages.append([])
        stages[-1].append(f"{mixer}.1.fc1.weight" in state)
    if len(stages) != STAGES or not all(stages):
        raise ValueError(f"it has blocks of {[len(stage) for stage in stages]} in stages, and a RepViT has {STAGES}")
    return Outline(tuple(map(tuple, stages)))


def norms(form: Outline) -> list[str]:
    """Names of the batch norms."""
    return [row.name.removesuffix(".running_var") for row in rows(form) if row.name.endswith(".running_var")]


def recognises(names: Container[str]) -> bool:
    """Whether a state dict of these names is this family's."""
    return f"{FEATURES}.0.0.c.weight" in names or ENCODER_ALONE in names


def from_state_dict(
    state: Mapping[str, np.ndarray],
    where: str = "the state dict",
    image_size: int | tuple[int, int] = 1024,
    decoder_heads: int = 8,
) -> Converted:
    """Converts a state dict of EdgeSAM, or a slim one.

    Args:
      state: {name: array}; what finds boxes in some published files is passed by.
      where: what to call it in error messages.
      image_size: pixels, one side or (height, width).
      decoder_heads: of the decoder.

    Raises:
      InputError: a name missing or surplus, a shape that fits no such model, or an argument does not fit.
    """
    from slimsam_jax.models.encoders.rep_vit import ImageEncoder

    state = {name: array for name, array in state.items() if not name.startswith(IGNORED)}
    kept = {name: array for name, array in state.items() if name.endswith(COUNTER)}
    used = {name: array for name, array in state.items() if name not in kept}
    try:
        check_edition(used)
        form = outline(used)
        head = head_architecture(used, decoder_heads)
        table = [*rows(form), *head_rows(head)]
        encoder = config_of(shapes(used, table, where)["image_encoder"], image_size)
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{where}: {error}") from None
    head = dataclasses.replace(head, image_size=encoder.image_size, patch_size=encoder.stride)
    check_counters(kept, form, where)
    expected = {"image_encoder": abstract(ImageEncoder(encoder)), **abstract_head(head)}
    return Converted(encoder, head, to_params(used, table, expected, where), kept)


def to_state_dict(model: Converted) -> State:
    """Inverse of `from_state_dict`, exact; a folded encoder gets batch norms and branches that change nothing.

    Args:
      model: its `kept` may be empty: then the counters are zero, so that the original's class loads it strictly.

    Raises:
      InputError: an array is missing or surplus, or what was kept is not this encoder's.
    """
    from slimsam_jax.models.encoders.rep_vit import unfold_batch_norm

    params, form = model.params, outline_of(model.encoder)
    if not model.encoder.batch_norm:
        params = {**params, "image_encoder": unfold_batch_norm(params["image_encoder"])}
    kept = model.kept or {norm + COUNTER: np.zeros((), np.int64) for norm in norms(form)}
    check_counters(kept, form, "what was kept")
    return {**to_state(params, [*rows(form), *head_rows(model.head)]), **kept}


def check_edition(names: Container[str]) -> None:
    """Raises ValueError for an encoder alone, and for RepViT's later edition, which has almost the same names."""
    if ENCODER_ALONE in names:
        raise ValueError("it is an image encoder alone, as EdgeSAM's first stage of training saves it; a SAM is needed")
    block = f"{FEATURES}.1.token_mixer.0"
    if f"{block}.conv1.weight" in names or f"{block}.bn.weight" in names:
        raise ValueError(
            "it is a RepViT of the later edition, with a batch norm behind the branches; EdgeSAM's has none"
        )


def check_counters(kept: Mapping[str, np.ndarray], form: Outline, where: str) -> None:
    """Raises InputError unless batch norm's counters are all there or all away."""
    from slimsam_jax import checkpoint

    checkpoint.check_names(set(kept), {norm + COUNTER for norm in norms(form)} if kept else set(), where)
    checkpoint.check_shapes({name: (array.shape, ()) for name, array in kept.items()}, where)


def obstacle(config: Any) -> str:
    """Why EdgeSAM's class cannot hold a model with such an encoder; "" if it can."""
    config = config.encoder
    reasons = {
        "a stem that is not half as wide as the first stage": config.stem_dim * 2 != config.stages[0].dim,
        "channel mixers that are not twice as wide as their stages": any(
            block.hidden != 2 * dim for block, dim, _ in blocks(config)
        ),
        "squeeze-excites of other widths than follow from their stages'": any(
            block.squeezed not in (0, squeezed_dim(width)) for block, _, width in blocks(config)
        ),
        "another sum of stages, or embedding, than of 256 channels": (config.fuse_dim, config.out_chans) != (256, 256),
    }
    return next((f"it has {reason}" for reason, there in reasons.items() if there), "")


def blocks(config: Config) -> Iterator[tuple[Block, int, int]]:
    """(block, width of its stage, width that its filter has)."""
    before = config.stages[0].dim
    for stage in config.stages:
        for i, block in enumerate(stage.blocks):
            yield block, stage.dim, stage.dim if i else before
        before = stage.dim


def given_by(config: Any) -> dict[str, Any]:
    """What no array tells."""
    return {name: getattr(config, name) for name in GIVEN}


def how_to_load(sam: Any, path: Path) -> str:
    """Lines for those who have a .pth of it."""
    theirs = f"with EdgeSAM's code: load_state_dict(torch.load({str(path)!r}), strict=True) of its model"
    if reason := obstacle(sam.config):
        theirs = f"EdgeSAM's class cannot hold this encoder: {reason}"
    return f"{with_loader('rep_vit_sam_torch', sam, path)}\n{theirs}"
