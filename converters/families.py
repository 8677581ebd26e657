"""The families beside SAM's own ViT, as PyTorch files hold them: a module of `tables` each, with these names:

- `recognises(names)`: whether a state dict is of the family;
- `from_state_dict(state, where, **given) -> Converted`, and `to_state_dict(converted) -> state`, its exact inverse;
- `GIVEN`: what of `given` there is: what no array tells, by default the published model's, and noted in files of ours;
- `given_by(config)`: the same of a model;
- `obstacle(config)`: why the original's class cannot hold a model of this architecture, "" if it can;
- `how_to_load(sam, path)`: lines for those who have a .pth of the model.

A family may bring along `THRESHOLDS`, of the original's everything mode, and `UNIT_IMAGES`, if it takes images of 0..1.
"""

from __future__ import annotations

from collections.abc import Container
from types import ModuleType

from converters.tables import efficient_sam, hiera, rep_vit, tiny_vit

FAMILIES: dict[str, ModuleType] = {
    "tiny_vit": tiny_vit,
    "efficient_sam": efficient_sam,
    "rep_vit": rep_vit,
    "hiera": hiera,
}


def family_of(names: Container[str]) -> ModuleType | None:
    """The one that recognises a state dict of these names; None for SAM's own ViT."""
    return next((family for family in FAMILIES.values() if family.recognises(names)), None)
