"""Two processes train on halves of a batch through a JVP; rank 0 compares their gradients with one process's.

    python -m tests.distributed_attention ddp|fsdp STORE

The JVP is inside the module's forward, the wrapper outside.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import jvp_attention

WIDTH, HEADS, SAMPLES = 32, 2, 4


class Block(nn.Module):
    """Self-attention with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return x + self.project(jvp_attention.attention(q, k, v).transpose(1, 2).flatten(2))


class Loss(nn.Module):
    """A loss of value and tangent of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
        y, dy = torch.func.jvp(self.blocks, (x,), (dx,))
        return (y.sin() * dy).sum(2).mean()


def work(rank: int, kind: str, store: str) -> None:
    """One process: its half of the batch, its gradients, and on rank 0 the comparison."""
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    torch.manual_seed(0)
    net = Loss()
    x, dx = torch.randn(2, SAMPLES, 10, WIDTH)
    half = slice(rank * SAMPLES // 2, (rank + 1) * SAMPLES // 2)
    net(x, dx).backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    if kind == "ddp":
        wrapped: nn.Module = DistributedDataParallel(net)
    else:
        mesh = dist.init_device_mesh("cpu", (2,))
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(net, mesh=mesh)
    wrapped(x[half], dx[half]).backward()
    for p, e in zip(net.parameters(), expected, strict=True):
        g = p.grad if kind == "ddp" else p.grad.full_tensor()
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (sys.argv[1], sys.argv[2]), nprocs=2)
    print("equal", Path(sys.argv[2]).name)
