"""Whether sam2's own classes hold a SAM 2 of given widths, and how they are asked to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

POOLING = "a global block that pools"  # their classes divide by the side of its window, 0


def obstacle(config: Any) -> str:
    """Why `build_sam2` cannot hold a model, in a few words; "" if it can.

    It has one width, which doubles from stage to stage as heads do, heads that fill it, and MLPs four times as wide.
    """
    encoder, head = config.encoder, config.head
    first = encoder.stages[0]
    stages = [(first.dim << i, first.blocks[0].heads << i, stage) for i, stage in enumerate(encoder.stages)]
    blocks = [(dim, heads, block) for dim, heads, stage in stages for block in stage.blocks]
    fixed = (head.out_chans, head.mask_in_chans, head.decoder_heads, head.decoder_depth, head.decoder_mlp_dim)
    reasons = {
        "stages whose widths do not double": any(stage.dim != dim for dim, _, stage in stages),
        "heads that do not double from stage to stage": any(block.heads != heads for _, heads, block in blocks),
        "heads that are together not as wide as their stage": any(
            {block.heads * block.key_dim, block.heads * block.value_dim} != {dim} for dim, _, block in blocks
        ),
        "MLPs that are not four times as wide as their stage": any(b.mlp_dim != 4 * dim for dim, _, b in blocks),
        POOLING: bool(set(encoder.firsts[1:]) & set(encoder.global_blocks)),
        "an image that is not square": len(set(config.image_size)) > 1,
        "another decoder": fixed != (256, 16, 8, 2, 2048) or (head.multimask_outputs, head.iou_head_dim) != (3, 256),
    }
    return next((f"it has {reason}" for reason, there in reasons.items() if there), "")


def how_to_load(sam: Any, path: Path) -> str:
    """Lines for those who have a .pth of it. Without the memory of videos, as from Hugging Face, sam2 refuses it."""
    config, missing = sam.config, "" if sam.kept else "it has no memory of videos, which they load strictly"
    ours = f"in Python: import sam2_torch; sam2_torch.Predictor(sam2_torch.load({str(path)!r}))"
    if reason := obstacle(config) or missing:
        return f"{ours}\nsam2's own classes cannot hold it: {reason}"
    trunk, stages = "++model.image_encoder.trunk", config.encoder.stages
    channels = [stage.dim for stage in reversed(stages)]
    overrides = [
        f"{trunk}.embed_dim={stages[0].dim}",
        f"{trunk}.num_heads={stages[0].blocks[0].heads}",
        f"++model.image_encoder.neck.backbone_channel_list={channels}",
    ]
    if (side := config.image_size[0]) != 1024:
        overrides.append(f"++model.image_size={side}")
    return f"{ours}\n" + (
        "with sam2's code, and the .yaml of the model that it was made from: build_sam2(YAML, "
        f"{str(path)!r}, hydra_overrides_extra={overrides})"
    )
