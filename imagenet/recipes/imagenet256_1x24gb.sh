#!/usr/bin/env bash
# 1 x 24 GB: ImageNet at 256, guidance 2. LATENTS is what encode.py wrote.
# On a GPU nothing here is measured: --accumulate is an estimate. PyTorch's OutOfMemoryError says so if it is too low.
set -euo pipefail
torchrun imagenet/train.py imagenet256-w2 --data-path "$LATENTS" \
    --accumulate 128 --checkpointing --workers 4 --save-every 1000 "$@"
