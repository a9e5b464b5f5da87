"""Two processes train on halves of a batch through a JVP and compare their gradients with one process's.

    python -m tests.distributed_attention STORE ddp fsdp ddp-inside

The JVP is inside the module's forward, the wrapper outside; for ddp-inside it is the other way round. Two networks: one
that calls attention, and one of PyTorch's own layers, in the mode that makes them right.
"""

import sys
from copy import deepcopy

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


class Ordinary(nn.TransformerEncoderLayer):
    """A block of layer norms and scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__(WIDTH, HEADS, WIDTH, dropout=0.0, activation="gelu", batch_first=True)


class Loss(nn.Module):
    """A loss of value and tangent of two blocks."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(block(), block())

    def forward(self, x: torch.Tensor, dx: torch.Tensor) -> torch.Tensor:
        with jvp_attention.jvp_ready():
            y, dy = torch.func.jvp(self.blocks, (x,), (dx,))
        return (y.sin() * dy).sum(2).mean()


def wrap(kind: str, net: Loss) -> nn.Module:
    """Share the network out by DistributedDataParallel or FSDP2."""
    if kind == "ddp":
        return DistributedDataParallel(net)
    if kind == "ddp-inside":
        blocks, net.blocks = net.blocks, None
        net.blocks = DistributedDataParallel(blocks)
        return net
    mesh = dist.init_device_mesh("cpu", (2,))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def work(rank: int, store: str, kinds: list[str]) -> None:
    """One process: the gradients of the batch, and by each kind of wrapper those of its half."""
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    torch.manual_seed(0)
    for block in (Block, Ordinary):
        compare(rank, Loss(block), kinds)
    dist.barrier()
    dist.destroy_process_group()


def compare(rank: int, net: Loss, kinds: list[str]) -> None:
    """Hold the gradients of this process's half of a batch, reduced, to those of the batch."""
    x, dx = torch.randn(2, SAMPLES, 10, WIDTH)
    half = slice(rank * SAMPLES // 2, (rank + 1) * SAMPLES // 2)
    nets = [deepcopy(net) for _ in kinds]
    net(x, dx).backward()
    for kind, copy in zip(kinds, nets, strict=True):
        wrapped = wrap(kind, copy)
        wrapped(x[half], dx[half]).backward()
        for p, whole in zip(copy.parameters(), net.parameters(), strict=True):
            g = p.grad.full_tensor() if kind == "fsdp" else p.grad
            torch.testing.assert_close(g, whole.grad, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    # forked, so that PyTorch is imported once
    torch.multiprocessing.start_processes(work, (sys.argv[1], sys.argv[2:]), nprocs=2, start_method="fork")
    print("equal", *sys.argv[2:])
