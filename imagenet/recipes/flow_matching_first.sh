#!/usr/bin/env bash
# A laptop: flow matching on digits, then TVM from its weights.
set -euo pipefail
torchrun imagenet/train.py --objective fm --out runs/imagenet/fm
torchrun imagenet/train.py --init runs/imagenet/fm --out runs/imagenet/fm-then-tvm
