"""Image encoders by name, for a SAM that has its head already: the published ones, and small ones of 0.8 M parameters.

The small ones are for images of 256 pixels, as the SAM in this package; each has as many parameters as that SAM's
encoder has left at `--ratio 0.77`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from slimsam_jax.models import config as plain
from slimsam_jax.models.composed import SamConfig, with_encoder
from slimsam_jax.models.config import Config, Preset
from slimsam_jax.models.encoders import efficient_sam_vit, rep_vit_config, tiny_vit_config

_SQUEEZES = ((True, False), (True, False), (False, True, False, False), (False, True))


def _tiny_vit() -> tiny_vit_config.Config:
    config = tiny_vit_config.uniform((24, 36, 48, 72), (1, 1, 2, 1), (2, 3, 4, 6), (8, 8, 16, 8), image_size=256)
    *stages, last = config.stages
    return dataclasses.replace(config, stages=(*stages, dataclasses.replace(last, stride=1)))  # to a stride of 16


OTHERS: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: tiny_vit_config.PRESETS[name] for name in tiny_vit_config.PRESETS},
    **{name: lambda name=name: rep_vit_config.PRESETS[name] for name in rep_vit_config.PRESETS},
    **{name: lambda name=name: efficient_sam_vit.PRESETS[name] for name in efficient_sam_vit.PRESETS},
    "tiny_vit_small": _tiny_vit,
    "rep_vit_small": lambda: rep_vit_config.uniform((24, 36, 48, 64), _SQUEEZES, 256),
    "efficient_sam_small": lambda: efficient_sam_vit.uniform(48, 5, 2, image_size=256),
}
VITS: dict[str, Preset] = {**plain.PRESETS, "vit_small": Preset(48, 192, 6, 3, (2, 5), 256, 6)}
NAMES = (*OTHERS, *VITS)


def encoder(name: str, config: Config | SamConfig) -> Any:
    """Returns the architecture of a preset, for the image size and the embedding of a SAM.

    Args:
      name: one of `NAMES`.
      config: the SAM whose head it shall have.

    Raises:
      ValueError: there is no such preset, or it does not give what the head takes.
    """
    if name in VITS:
        of_size = plain.preset_of(VITS[name], config.image_size)
        if not isinstance(config.head, Config):
            raise ValueError(f"{name} brings along SAM's own head, and this is another one")
        chosen = dataclasses.replace(config.head, embed_dim=of_size.embed_dim, blocks=of_size.blocks)
    elif name in OTHERS:
        chosen = dataclasses.replace(OTHERS[name](), image_size=config.image_size, out_chans=config.out_chans)
    else:
        raise ValueError(f"there is no preset {name!r:.40}; there are {', '.join(NAMES)}")
    return with_encoder(config, chosen).encoder
