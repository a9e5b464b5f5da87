#!/usr/bin/env bash
# 1 x 80 GB: CIFAR-10, fetched into the folder DATA.
# On a GPU nothing here is measured: --accumulate is an estimate. PyTorch's OutOfMemoryError says so if it is too low.
set -euo pipefail
torchrun imagenet/train.py cifar10 --data-path "${DATA:-data}" --workers 4 --save-every 5000 "$@"
