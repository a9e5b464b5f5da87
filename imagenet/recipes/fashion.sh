#!/usr/bin/env bash
# One CPU thread, an hour: Fashion-MNIST, flow matching first, then TVM from its weights.
# DATA is the folder of its four files; what is missing is downloaded. bfloat16 is fast on CPUs with AMX and on GPUs;
# elsewhere leave it out. Where there is a C++ compiler, --compile nearly halves TVM's time.
set -euo pipefail
torchrun imagenet/train.py fashion --data-path "${DATA:-data}" --precision bfloat16 --objective fm --steps 2500 --out runs/imagenet/fashion-fm
torchrun imagenet/train.py fashion --data-path "${DATA:-data}" --precision bfloat16 --init runs/imagenet/fashion-fm --steps 1000
