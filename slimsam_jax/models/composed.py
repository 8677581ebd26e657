"""The architecture of a SAM whose image encoder is of any family: its encoder's, and its head's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from slimsam_jax.models import heads
from slimsam_jax.models.config import Config


@dataclasses.dataclass(frozen=True)
class SamConfig:
    """A SAM. Stands wherever `Config` does, which is that of a ViT.

    Attributes:
      encoder: the `Config` of a family (`models.encoders.FAMILIES`).
      head: prompt encoder and mask decoder, the `HeadConfig` of a kind (`models.heads.HEADS`), of SAM's own a
        `Config` without a ViT; its patches are the embedding's cells.
      single_mask: whether the decoder's first mask is for use. TinySAM's never returns it: then the best of the others,
        by predicted IoU, stands in its place (`sam.decode`).

    Raises:
      ValueError: the embedding is not of the size that the head takes, or there would be no mask at all.
    """

    encoder: Any
    head: Any
    single_mask: bool = True

    def __post_init__(self):
        if type(self.single_mask) is not bool:
            raise ValueError(f"single_mask {self.single_mask!r:.40} is neither true nor false")
        if not (self.single_mask or self.head.multimask_outputs):
            raise ValueError("a decoder without a single mask has others, and this one has none")
        pairs = {"image_size": "pixels", "grid": "cells", "out_chans": "channels"}
        for name, unit in pairs.items():
            own, wanted = getattr(self.encoder, name), getattr(self.head, name)
            if own != wanted:
                raise ValueError(f"the encoder has {name} {own} ({unit}), and the mask decoder {wanted}")
        given, taken = (getattr(part, "MAPS", 1) for part in (self.encoder, self.head))
        if given != taken:
            raise ValueError(f"the encoder's embedding is of {given} scales, and the mask decoder takes {taken}")

    def __getattr__(self, name: str) -> Any:
        """The head's own fields: image_size, grid, out_chans, patch_size, pixel_mean, multimask_outputs, ..."""
        if name.startswith("_") or name in ("embed_dim", "blocks", "uniform", "encoder", "head"):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return getattr(self.head, name)

    def to_json(self) -> dict[str, Any]:
        """SAM's own head, which was the only one at first, says no kind; a single mask is the usual thing."""
        kind = heads.name_of(self.head)
        said = {} if kind == "sam" else {"kind": kind}
        fields = {"encoder": self.encoder.to_json(), "head": {**said, **self.head.to_json()}}
        return fields if self.single_mask else {**fields, "single_mask": False}

    @classmethod
    def from_json(cls, family: ModuleType, fields: Mapping[str, Any]) -> SamConfig:
        """Inverse of `to_json`.

        Args:
          family: the encoder's module.

        Raises:
          ValueError: an unknown or missing field, or one out of range.
        """
        try:
            own = dict(fields["head"])
            kind = own.pop("kind", "sam")
            if kind not in heads.HEADS:
                raise ValueError(f"its head is of the kind {kind!r:.40}, and there are {', '.join(heads.HEADS)}")
            head = heads.HEADS[kind].from_json(own)
            return cls(family.Config.from_json(fields["encoder"]), head, fields.get("single_mask", True))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an architecture of slimsam_jax: {error}") from None

    def with_encoder(self, encoder: Any) -> SamConfig:
        """The same SAM with an encoder of other widths."""
        return dataclasses.replace(self, encoder=encoder)


def with_encoder(config: Config | SamConfig, encoder: Any) -> Config | SamConfig:
    """The same head with an encoder of any family.

    Raises:
      ValueError: it does not give what the head takes.
    """
    if isinstance(encoder, Config):
        if (encoder.head, config.single_mask) != (config.head, True):
            raise ValueError("a ViT brings along its own head, and this is another one")
        return encoder
    return SamConfig(encoder, config.head, config.single_mask)


def head_of(image_size: tuple[int, int], patch_size: int = 16, **fields: Any) -> Config:
    """SAM's own head for embeddings of a cell per `patch_size` pixels; `fields` are those of `Config`."""
    return Config(image_size=image_size, embed_dim=0, blocks=(), patch_size=patch_size, **fields)
