#!/usr/bin/env bash
# 8 x 80 GB, one node: ImageNet at 512, guidance 2.5. LATENTS is what encode.py wrote with --image-size 512.
# On a GPU nothing here is measured: --accumulate is an estimate. PyTorch's OutOfMemoryError says so if it is too low.
set -euo pipefail
torchrun --nproc-per-node 8 imagenet/train.py imagenet512-w2.5 --data-path "$LATENTS" \
    --accumulate 64 --workers 4 --save-every 5000 "$@"
