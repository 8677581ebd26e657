"""EdgeSAM (Zhou et al. 2023, arXiv 2312.06660): the embedding into a convolutional encoder, then prompts in the loop.

Stage 1 is the squared error of the embedding where there is image. Stage 2 prompts student and teacher by a box or a
click, takes the teacher's masks, cut at 0, for the truth (5 cross entropy, 5 dice), adds one click where they disagree
and does so again; encoder and decoder learn. The paper: SAM-H into RepViT-M1 on 1 % of SA-1B, stage 1 AdamW at 0.0125,
batches of 64, 10 epochs from ImageNet's weights; stage 2 AdamW at 1e-4, batches of 16 with up to 16 prompts, 5
epochs; 42.2 COCO AP with ViTDet's boxes, box mIoU 82.0 by the encoder alone and 83.0 with prompts in the loop.

Other here: 4 prompts of an image, clicks in the middle of a cell, a cut learning rate in stage 1 without its warm-up of
5 epochs, a warm-up of 5 % in stage 2, which ends at 0; batch norms stand still after one measurement. Without a loss of
predicted IoU, as there, masks are best ranked by their stability.

    python -m slimsam_jax.compress --recipe edge_sam --teacher sam_vit_h_4b8939.pth --images sa1b --limit 110000 \
        --batch 16 --cache embeddings
"""

from slimsam_jax.compression.steps import Distill, DistillMasks, Initialize, Losses, Optimizer, Recipe, Validation

EMBEDDING = Distill(
    "none",
    Losses(features=0.0, padding=False, relative=False),
    Optimizer(epochs=10, lr=2e-3, weight_decay=0.01),
    validation=Validation(validate_by="miou"),  # what beside the image is anything does not count for
    batch_norm="auto",
)
MASKS = DistillMasks(optimizer=Optimizer(epochs=5, lr=1e-4, weight_decay=0.05, clip=0.01))

RECIPE: Recipe = (Initialize("rep_vit_m1"), EMBEDDING, MASKS)
