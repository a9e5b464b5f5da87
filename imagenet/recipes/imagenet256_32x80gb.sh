#!/usr/bin/env bash
# 32 x 80 GB: four nodes, this script on each, HOST the name of one of them. LATENTS is what encode.py wrote.
# On a GPU nothing here is measured: --accumulate is an estimate. PyTorch's OutOfMemoryError says so if it is too low.
set -euo pipefail
torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$HOST:29500" --rdzv-id 1 \
    imagenet/train.py imagenet256-w2 --data-path "$LATENTS" --accumulate 4 --workers 4 --save-every 5000 "$@"
