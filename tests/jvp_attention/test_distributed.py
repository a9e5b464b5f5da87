"""Gradients through a JVP agree between one process and two, with DDP and FSDP2.

The JVP is inside the module's forward, the wrapper outside; for ddp-inside it is the other way round. Two networks: one
that calls attention, and one of PyTorch's own layers, in the mode that makes them right.
"""

from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import jvp_attention
from tests.attention_cases import SelfAttention, interpreter_works
from tests.processes import in_two_processes

WIDTH, HEADS, SAMPLES = 32, 2, 4


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


def compare(rank: int, *kinds: str) -> None:
    """Hold the gradients of this process's half of a batch, reduced, to those of the batch."""
    for block in (SelfAttention, Ordinary):
        net = Loss(block)
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


@pytest.mark.skipif(not interpreter_works(), reason="the interpreter of this triton needs numpy < 2.4")
@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    """FSDP2 too, in which a JVP needs PyTorch 2.13."""
    kinds = ["ddp", "ddp-inside", *(["fsdp"] if torch.__version__ >= (2, 13) else [])]
    in_two_processes("tests.jvp_attention.test_distributed.compare", tmp_path / "store", *kinds)
