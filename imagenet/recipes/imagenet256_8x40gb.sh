#!/usr/bin/env bash
# 8 x 40 GB, one node: ImageNet at 256, guidance 2. LATENTS is what encode.py wrote.
# On a GPU nothing here is measured: --accumulate is an estimate. PyTorch's OutOfMemoryError says so if it is too low.
set -euo pipefail
torchrun --nproc-per-node 8 imagenet/train.py imagenet256-w2 --data-path "$LATENTS" \
    --accumulate 32 --workers 4 --save-every 5000 "$@"
