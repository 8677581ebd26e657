"""Heads: what makes masks of an embedding and prompts, a kind a module. Each has five names:

- `HeadConfig`: the architecture, frozen, with `image_size`, `grid`, `out_chans`, `patch_size`, `multimask_outputs`,
  `pixel_mean`, `pixel_std`, `to_json`; `frame`, how images come into the model frame and masks out of it
  (`imaging.frames`); and `point_tokens`, how many tokens one point makes;
- `from_json(fields)`: its inverse;
- `init(config, keys)`: random {"prompt_encoder", "mask_decoder"};
- `decode(config, params, embedding, points, labels, masks, masked)`: as `sam.decode`; SAM 2's embedding is a dict of
  three maps;
- `refusal(labels, masked)`: why prompts cannot be taken, in a line, or None.

One may bring along

- `decode_tokens(config, params, embedding, points, labels)`: as `sam.decode_tokens`, for prompts in the loop;
- `LARGEST_LOW_RES`, within which logits are given back for a next prompt.

Prompts come to all of them alike: points, box corners and what fills up, with the labels of `imaging.prompts`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from slimsam_jax.models import efficient_sam_head, sam2_head, sam_head

HEADS: dict[str, ModuleType] = {"sam": sam_head, "efficient_sam": efficient_sam_head, "sam2": sam2_head}


def name_of(head: Any) -> str:
    """The kind of a head's `HeadConfig`.

    Raises:
      ValueError: it is of none.
    """
    for name, module in HEADS.items():
        if type(head) is module.HeadConfig:
            return name
    raise ValueError(f"{type(head).__module__} is no kind of head; there are {', '.join(HEADS)}")


def kind_of(head: Any) -> ModuleType:
    """Its module; see `name_of`."""
    return HEADS[name_of(head)]
