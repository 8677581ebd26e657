"""EfficientSAM (Xiong et al. 2023, arXiv 2312.00863): masked pre-training towards the teacher, then masks.

The encoder sees a quarter of the patches; a decoder of cross-attention, left behind afterwards, predicts the teacher's
embedding of all of them. Then encoder and decoder learn SAM's own loss of annotated masks, corrected by a click. The
paper: SAM-H's features of ImageNet into a ViT-Ti (or S), AdamW at 0.0024, batches of 4096, 400 epochs; then all of
SA-1B, AdamW at 4e-4, batches of 128, 5 epochs, 64 A100; 42.3 COCO AP with ViTDet's boxes (S: 44.4).

Other here: both steps see the same images; 40 epochs of pre-training at 0.001, for batches of a few images; cosine
decay in both steps after a warm-up of 5 %, by which the paper's second falls linearly; Adam's 0.999 for its 0.95; the
mask decoder is the teacher's, SAM's, and so are its frames, padding's patches included.

    python -m slimsam_jax.compress --recipe efficient_sam --teacher sam_vit_h_4b8939.pth --images sa1b --limit 110000 \
        --batch 16 --cache embeddings
"""

from slimsam_jax.compression.mask_steps import MaskLosses, Prompting
from slimsam_jax.compression.recipes.tiny_sam import SAMS
from slimsam_jax.compression.steps import DistillMasks, Initialize, Optimizer, Pretrain, Recipe

MASKS = DistillMasks(MaskLosses(**SAMS), Prompting(target="annotation"), Optimizer(epochs=5, lr=4e-4, weight_decay=0.1))

RECIPE: Recipe = (Initialize("efficient_sam_ti"), Pretrain(), MASKS)
