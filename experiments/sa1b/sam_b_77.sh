#!/usr/bin/env bash
# SAM-B with 77 % of the channels removed, distilled on 10,000 images of SA-1B: 0.1 % of it, as in the paper.
# The paper: SlimSAM-77, 9.1 M parameters (9.7 M as loaded), 67.40 mIoU by point on SA-1B.
# Hours and memory: python -m experiments.sa1b.hours. The reference's recipe: --recipe slimsam. Goes on with --resume.
set -euo pipefail
exec python -m slimsam_jax.compress \
  --teacher "${TEACHER:-sam_vit_b_01ec64.pth}" --images ${IMAGES:-sa1b/train} --val ${VAL:-sa1b/val} \
  --ratio 0.77 --limit 10000 --importance-images 1000 --out "${OUT:-slim_b_77}" "$@"
