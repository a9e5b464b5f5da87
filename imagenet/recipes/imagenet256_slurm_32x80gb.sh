#!/usr/bin/env bash
# 32 x 80 GB: four nodes under Slurm, as `LATENTS=... sbatch imagenet/recipes/imagenet256_slurm_32x80gb.sh`.
# --resume also starts a run, so that a job that Slurm puts back into its queue, as after preemption, needs no other
# command; after its time limit, submit it again. Slurm sends SIGUSR1 five minutes before that: training saves and goes
# on; the trap makes bash and torchrun ignore it.
# On a GPU nothing here is measured: --accumulate is an estimate. PyTorch's OutOfMemoryError says so if it is too low.
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=USR1@300
#SBATCH --requeue
set -euo pipefail
export HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun bash -c "trap '' USR1; exec torchrun --nnodes 4 --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-endpoint $HOST:29500 --rdzv-id $SLURM_JOB_ID \
    imagenet/train.py imagenet256-w2 --data-path $LATENTS --accumulate 4 --workers 4 --save-every 5000 --resume"
