#!/usr/bin/env bash
# 8 x 80 GB, one node: images per second of DiT-XL/2 on random latents.
# On a GPU nothing here is measured: --accumulate is an estimate. PyTorch's OutOfMemoryError says so if it is too low.
set -euo pipefail
torchrun --nproc-per-node 8 imagenet/train.py synthetic --accumulate 16 "$@"
