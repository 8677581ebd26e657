#!/usr/bin/env bash
# SAM-H with 77 % of the channels removed, distilled on 10,000 images of SA-1B: 0.1 % of it, as in the paper.
# The paper compresses SAM-B alone, so there is no number of its own to compare with; SAM-B's row is sam_b_77.sh.
# Hours and memory: python -m experiments.sa1b.hours. The reference's recipe: --recipe slimsam. Goes on with --resume.
set -euo pipefail
exec python -m slimsam_jax.compress \
  --teacher "${TEACHER:-sam_vit_h_4b8939.pth}" --images ${IMAGES:-sa1b/train} --val ${VAL:-sa1b/val} \
  --ratio 0.77 --limit 10000 --importance-images 1000 --out "${OUT:-slim_h_77}" "$@"
