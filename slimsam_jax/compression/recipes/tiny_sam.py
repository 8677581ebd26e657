"""TinySAM (Shu et al. 2023, arXiv 2312.13789): distillation at all stages, with hard prompts and hard masks.

First the embedding alone, ours. Then embedding, output tokens and mask logits of student and teacher for the same
prompts (mean absolute errors; those of masks weigh more where the teacher is better), beside SAM's own loss of the
annotated mask. Each prompt begins with a click in the mask; each next one lies where the student misses it, 0 to 9 of
them. The paper: SAM-H into a TinyViT of 5 M parameters on 1 % of SA-1B, Adam, 8 epochs, 64 prompts in an iteration;
42.3 COCO AP with ViTDet's boxes (41.4 without hard prompts and masks; 40.7 without distillation).

The three terms' weights were never published. Ours are 1 each: every term is relative to the spread of its target, so
that 1 means as bad as a constant; `--set masks.embedding=1 masks.tokens=1 masks.outputs=1` says the same, and takes
others. Other here, too: one learning rate for encoder and decoder, half of the first clicks in the mask's middle, batch
norms that stand still after one measurement.

    python -m slimsam_jax.compress --recipe tiny_sam --teacher sam_vit_h_4b8939.pth --images sa1b --limit 110000 \
        --batch 16 --cache embeddings
"""

from slimsam_jax.compression.mask_steps import MaskLosses, Prompting
from slimsam_jax.compression.recipes.mobile_sam import EMBEDDING
from slimsam_jax.compression.steps import DistillMasks, Initialize, Optimizer, Recipe

SAMS = {"focal": 20.0, "dice": 1.0, "iou": 1.0, "bce": 0.0}  # Kirillov et al. 2023, section 3
FULL = DistillMasks(
    MaskLosses(**SAMS, embedding=1.0, tokens=1.0, outputs=1.0, hard=True),
    Prompting(rounds=10, vary=True, first="point", click="missed", target="annotation"),
    Optimizer(epochs=8, lr=1e-4),
)

RECIPE: Recipe = (Initialize("vit_t"), EMBEDDING, FULL)
