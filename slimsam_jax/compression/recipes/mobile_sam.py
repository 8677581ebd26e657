"""MobileSAM (Zhang et al. 2023, arXiv 2306.14289): the teacher's embedding alone, into a small encoder drawn anew.

Mean squared error of the embedding; prompt encoder and mask decoder are the teacher's and stay as they are. The paper:
SAM-H into a TinyViT of 5 M parameters (5.8 M with the neck) on 1 % of SA-1B, batches of 8, 8 epochs, less than a day
on one GPU; 41.0 COCO AP with ViTDet's boxes (TinySAM's table 1), 74.5 % mIoU against SAM-H's masks. Neither optimizer
nor learning rate was published: ours are Adam at 0.002 over a cosine.

    python -m slimsam_jax.compress --recipe mobile_sam --teacher sam_vit_h_4b8939.pth --images sa1b --limit 110000 \
        --batch 8 --cache embeddings
"""

from slimsam_jax.compression.steps import Distill, Initialize, Losses, Optimizer, Recipe

EMBEDDING = Distill("none", Losses(features=0.0), Optimizer(epochs=8, lr=2e-3), batch_norm="auto")

RECIPE: Recipe = (Initialize("vit_t"), EMBEDDING)
