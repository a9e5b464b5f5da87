"""Memory of a training step by arithmetic, and the smallest settings that fit a device.

A step holds its state (weights, two averages, the optimizer's moments), gradients, and activations: what autograd keeps
of the forward of each block until its backward. With N tokens of D numbers and H heads, a block keeps, per image,

    in float32                                      of a forward    of one with its tangent (the JVP)
    x and x / rms(x), twice                         4 N D           10 N D
    q, k in front of their norms                    2 N D           6 N D
    in the dtype of matrix products
    inputs of qkv, proj and fc1                     3 N D           6 N D
    q, k behind their norms                         2 N D           4 N D
    outputs of proj and fc2, for their gates        2 N D           4 N D
    output of fc1, and of GELU                      8 N D           16 N D
    attention, plain: q, k, v copied by head        3 N D           6 N D       and matrices of H N^2
    attention, fused: see kernels/, operators.py    5 N D           12 N D      and nothing of N^2

TVM runs one forward with a tangent (the jump) and one without (flow matching, at t = s) before the backward of both.
Checkpointing keeps x (and its tangent) alone, and makes the rest again, one block at a time. The numbers are those of
the paper's network (RMS norms everywhere); tests/imagenet/cost/test_memory.py counts what is kept.
"""

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import torch

from imagenet.config import Config
from imagenet.model.dit import DiT, DiTConfig
from tvm_ref.cli.errors import UserError

WIDE = 4  # bytes of float32
GELU = {False: 3, True: 17}  # arrays of the MLP's width that GELU's derivatives hold at once, without tangent and with
SOFTMAX = {False: 1, True: 3}  # matrices of H N^2 in float32 that plain attention's derivatives hold at once
USABLE = 0.92  # of a device's memory: the rest is NCCL's, cuBLAS's, and lost between arrays
# An objective's forwards that a backward follows, with a tangent or without, and those whose tangent it stops
PASSES = {
    "tvm": (False, True), "pid": (False, True), "fm": (False,), "lsd": (True,), "esd": (True,), "meanflow": (True,),
    "imf": (True,), "sct": (True,), "alphaflow": (True,), "soflow": (False,), "psd": (False,), "shortcut": (False,),
}  # fmt: skip
STOPPED = ("meanflow", "imf", "sct", "alphaflow")


class Weights(NamedTuple):
    """Numbers that are trained.

    Attributes:
        all: in the network.
        block: in one block.
        squares: the sum over all matrices of the squares of their sides: SOAP's matrices.
    """

    all: int
    block: int
    squares: int


def weights_of(config: Config) -> Weights:
    """Count the weights of a configuration's network, which is not built."""
    return _count(config.network())


@functools.cache
def _count(config: DiTConfig) -> Weights:
    """Count the weights of a network."""
    with torch.device("meta"):
        network = DiT(config)
    shapes = [p.shape for p in network.parameters()]
    block = sum(p.numel() for p in network.blocks[0].parameters())
    return Weights(sum(s.numel() for s in shapes), block, sum(n**2 for s in shapes if len(s) > 1 for n in s))


# What a process holds ------------------------------------------------------------------------------------------------


def state_bytes(config: Config, ranks: int = 1) -> int:
    """Sum weights, the target's and all other averages, and the optimizer's state; sharded over `ranks` with FSDP."""
    weights = weights_of(config)
    moments = 2 * weights.all + (2 * weights.squares if config.optimizer == "soap" else 0)
    return WIDE * (3 * weights.all + moments) // (ranks if config.parallel == "fsdp" else 1)


def gradient_bytes(config: Config, ranks: int = 1) -> int:
    """Sum gradients between micro-batches: unsharded in each process, but for FSDP without accumulation."""
    spread = config.parallel == "fsdp" and config.accumulate == 1
    return WIDE * weights_of(config).all // (ranks if spread else 1)


def block_bytes(config: Config, *, tangent: bool, device: str = "cuda") -> int:
    """Sum what autograd keeps of one block for the backward of one image, without checkpointing.

    Args:
        config: sizes, precision and attention.
        tangent: of a forward with its tangent, by a JVP.
        device: "cpu" has no fused attention, and another softmax under autocast.
    """
    n, d, h, low = _sizes(config)
    mixed = low < WIDE
    rows = [  # numbers, times kept by a forward, and by one with its tangent, bytes of each
        (n * d, 4, 10, WIDE),  # x, x / rms(x)
        (n * d, 2, 6, WIDE) if mixed else (n * d, 3, 8, WIDE),  # q, k: as copies, or inside of qkv
        (n * d, 3 + 2 + 2 + 8, 6 + 4 + 4 + 16, low),
        (d, 6, 22, WIDE),  # modulations
        (d, 9, 18, low),
        (n * (1 + h), 2, 8, WIDE),  # 1 / rms(x), 1 / rms(q), 1 / rms(k)
    ]
    if config.attention == "fused" and device != "cpu":
        rows += [(n * d, 2, 4, low), (n * h, 1, 2, WIDE)]  # q, k; log-sum-exp and mu
        rows += [(n * d, 3, 6 + 2, low)] * mixed  # v as a part of qkv; what rounding takes from o and do
    else:
        softmax = low if device == "cpu" else WIDE  # CUDA's autocast takes softmax in float32, and copies it
        rows += [(n * d, 3, 6, low), (n * h * n, 1, 5, softmax), (n * h, 0, 3, softmax)]
        rows += [(n * h * n, 0 if softmax == low else 1, 1 if softmax == low else 2, low)]
    return sum(numbers * (with_tangent if tangent else alone) * size for numbers, alone, with_tangent, size in rows)


def ends_bytes(config: Config, *, tangent: bool) -> int:
    """Sum what autograd keeps in front of the first block and behind the last, for one image."""
    n, d, _, low = _sizes(config)
    pixels = config.in_channels * config.input_size**2
    final = (5 if tangent else 2) * WIDE + (1 + tangent) * low  # x / rms(x), and the input of the linear layer
    return final * n * d + (WIDE + low) * pixels + WIDE * d * (40 if tangent else 15)


def kept_bytes(config: Config, *, tangent: bool, device: str = "cuda") -> int:
    """Sum what autograd keeps of the whole network for the backward of one image."""
    n, d, _, _ = _sizes(config)
    ends = ends_bytes(config, tangent=tangent)
    if config.checkpointing:
        return config.depth * WIDE * n * d * (1 + tangent) + ends  # of each block: x, and its tangent
    constant = 3 * WIDE * n * d if tangent else 0  # what the first block does not keep, as its x has no tangent
    return config.depth * block_bytes(config, tangent=tangent, device=device) - constant + ends


def copied_bytes(config: Config, *, tangent: bool) -> int:
    """Sum autocast's copies of weights, kept for the backward; with checkpointing those of one block, made there."""
    weights = weights_of(config)
    copies = 0 if config.precision == "float32" else 2 * (weights.block if config.checkpointing else weights.all)
    return copies * (1 + tangent)


def target_bytes(config: Config) -> int:
    """Return the most that the target's forward, without gradients, holds for one image: in an MLP or an attention."""
    n, d, h, low = _sizes(config)
    matrices = 0 if config.attention == "fused" else 2 * h * n * n
    return max((2 * WIDE + 9 * low) * n * d, (WIDE + 7 * low) * n * d + low * matrices)


def working_bytes(config: Config, images: int, device: str = "cuda") -> int:
    """Return the most that a step holds beside state and gradients, with so many images at once in this process.

    The fullest moment is the beginning of one of the two backwards: that of the forward without tangent, which comes
    first, or that of the forward with one. By then the gradients of the first are there, and wait for the second's.
    """
    n, d, h, low = _sizes(config)
    plain = config.attention == "plain" or device == "cpu"
    weights, passes = weights_of(config), PASSES[config.objective]
    recomputed = {t: block_bytes(config, tangent=t, device=device) if config.checkpointing else 0 for t in passes}
    moments, kept, copied = [], 0, 0
    for tangent in reversed(passes):  # the forward's order: the last is the first to go back
        kept += images * kept_bytes(config, tangent=tangent, device=device)
        copied = copied_bytes(config, tangent=tangent) + (0 if config.checkpointing else copied)
        second = tangent and not (config.detach_jvp or config.objective in STOPPED)  # a derivative of a derivative
        temporaries = max(GELU[second] * 4 * n * d * low, SOFTMAX[second] * h * n * n * WIDE if plain else 0)
        waiting = WIDE * weights.all if tangent and len(passes) > 1 else 0
        moments.append(kept + copied + waiting + images * (recomputed[tangent] + temporaries))
    return max(moments)


def gathered_bytes(config: Config) -> int:
    """Sum the weights that FSDP gathers: of two blocks, and those outside of blocks of model and target."""
    if config.parallel != "fsdp":
        return 0
    weights = weights_of(config)
    return WIDE * (2 * weights.block + 2 * (weights.all - config.depth * weights.block))


def step_bytes(config: Config, world_size: int, device: str = "cuda") -> int:
    """Return the most that a process holds in a step of `world_size` processes."""
    images = config.batch_size // (world_size * config.accumulate)
    held = state_bytes(config, world_size) + gradient_bytes(config, world_size) + gathered_bytes(config)
    return held + working_bytes(config, images, device)


def _sizes(config: Config) -> tuple[int, int, int, int]:
    """Return tokens, their width, heads, and bytes of a number that a matrix product takes."""
    low = 2 if config.precision == "bfloat16" else WIDE
    return (config.input_size // config.patch_size) ** 2, config.hidden_size, config.heads, low


# What fits -----------------------------------------------------------------------------------------------------------


def fits(config: Config, device_bytes: float, world_size: int) -> bool:
    """Return whether a step of `world_size` processes fits devices of so many bytes."""
    return step_bytes(config, world_size) <= USABLE * device_bytes


def smallest_that_fits(
    config: Config, device_bytes: float, world_size: int, *, checkpointing: bool | None = None
) -> Config | None:
    """Find the smallest --accumulate that fits, with --checkpointing only if it must be; returns the configuration.

    Args:
        config: what to train; its own --accumulate and --checkpointing do not count.
        device_bytes: memory of each process's device.
        world_size: processes.
        checkpointing: this in place of "only if it must be".

    Returns None where not even one image at a time fits.
    """
    share = config.batch_size // world_size
    for recompute in (False, True) if checkpointing is None else (checkpointing,):
        for accumulate in (a for a in range(1, share + 1) if config.batch_size % (world_size * a) == 0):
            candidate = replace(config, accumulate=accumulate, checkpointing=recompute)
            if fits(candidate, device_bytes, world_size):
                return candidate
    return None


def refusal(config: Config, device_bytes: float, world_size: int) -> str | None:
    """Say why a configuration does not fit devices of so many bytes, and what would; None if it fits."""
    if fits(config, device_bytes, world_size):
        return None
    found = _ways(config, device_bytes, world_size)
    if not found and config.parallel == "ddp" and world_size > 1 and config.optimizer != "soap":
        found = _ways(replace(config, parallel="fsdp"), device_bytes, world_size)
    ways = [
        "--parallel fsdp " * (c.parallel != config.parallel)
        + f"--accumulate {c.accumulate}"
        + " --checkpointing" * c.checkpointing
        for c in found
    ]
    images = config.batch_size // (world_size * config.accumulate)
    need = f"{images} images at once need {step_bytes(config, world_size) / 1e9:.3g} GB"
    remedy = f"{' or '.join(ways)} fits" if ways else "nothing fits, not one image at a time"
    return f"{need}, and of the device's {device_bytes / 1e9:.3g} GB {USABLE:.0%} may be used: {remedy}"


def _ways(config: Config, device_bytes: float, world_size: int) -> list[Config]:
    """Find what fits without checkpointing, and with it if that allows larger micro-batches."""
    plain, saving = (smallest_that_fits(config, device_bytes, world_size, checkpointing=c) for c in (False, True))
    if plain is not None and saving is not None and saving.accumulate >= plain.accumulate:
        saving = None
    return [c for c in (plain, saving) if c is not None]


def free_bytes(device: torch.device) -> float:
    """Return the bytes that are free on a GPU; infinity for a CPU, whose memory is not counted."""
    return float(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else math.inf


def check_memory(config: Config, free: float, world_size: int) -> None:
    """Refuse a step that does not fit, before there is one.

    Args:
        config: what to train. With torch.compile, which keeps less than is counted here, nothing is refused.
        free: bytes on each process's device.
        world_size: processes.

    Raises:
        ValueError: it does not fit; what would is said.
    """
    reason = None if free == math.inf or config.compile else refusal(config, free, world_size)
    if reason is not None:
        raise UserError(reason)
