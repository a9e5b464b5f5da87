#!/usr/bin/env bash
# A laptop without a GPU, one thread, minutes: digits, then samples and scores in runs/imagenet/digits.
set -euo pipefail
torchrun imagenet/train.py "$@"
