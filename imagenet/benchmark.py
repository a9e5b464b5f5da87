"""Measure a training step: time, images per second, memory, and how much of the device's arithmetic it uses.

    python imagenet/benchmark.py                                                      digits, on a laptop
    python imagenet/benchmark.py imagenet256-w2 --batch-size 32
    python imagenet/benchmark.py imagenet256-w2 --batch-size 32 --attention plain --settings detach_jvp=true
    python imagenet/benchmark.py imagenet256-w2 --batch-size 32 --compile --checkpointing

Whole steps of train.py are timed, optimizer and averages included, on synthetic data, on one device. Figure 10 of the
paper plots these against the batch size, for each attention, with and without gradients through the JVP.

    FLOP     floating-point operations of matmuls per image and step: those that run, and the least that a TVM
             step needs (cost/flops.py)
    memory   on a GPU the peak of allocated memory, on a CPU the memory that the process holds
    MFU      model FLOP utilisation: the least arithmetic of a TVM step, or the arithmetic that runs of another
             objective's, over its time, over the rate at which this device multiplies large matrices (measured first)
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from imagenet.config import PRESETS, Config
from imagenet.cost.flops import counted_step_flops, least_step_flops, weights_of
from imagenet.data.batches import Batches
from imagenet.data.image_sets import load_data
from imagenet.model import distributed
from imagenet.model.distributed import World
from imagenet.training.log import peak_memory
from imagenet.training.step import Training
from tvm_ref.cli.errors import require
from tvm_ref.cli.options import OneLineParser, add_options, given, require_at_least, run
from tvm_ref.cli.progress import progress

VARIED = (  # fields of Config that change what a step costs
    "batch_size", "objective", "settings", "attention", "precision", "compile", "checkpointing", "accumulate",
)  # fmt: skip
MATRIX = {"cuda": 8192, "cpu": 1024}  # side of the matrices that measure the device's rate
REPEATS = 10  # repeats of each measurement of that rate
FIRST = 3  # warm-up steps, not timed: kernels are chosen and compiled


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("benchmark.py", __doc__)
    p.add_argument("preset", nargs="?", default="digits", choices=tuple(PRESETS), help="preset (default: digits)")
    p.add_argument("--timed", type=int, default=10, help="number of steps to time")
    p.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")
    add_options(p.add_argument_group("the configuration (defaults are the preset's)"), Config, VARIED)
    return p


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Time some work on a device."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second of large matrix products; the best of several."""
    n = MATRIX.get(device.type, MATRIX["cpu"])
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(seconds_of(lambda: a @ b, device) for _ in range(REPEATS))


def step_seconds(training: Training, batches: Batches, timed: int) -> list[tuple[float, float]]:
    """Time each of `timed` training steps, after FIRST others, and beside it a forward of as many samples.

    Making the batch is not counted.
    """
    config, device = training.config, training.world.device
    seconds = []
    for step in progress(range(FIRST + timed), "steps", leave=False):
        batch = batches[step]
        _, x1, (t, s, _), condition = batch.slice(0, config.batch_size // config.accumulate).to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            forward = config.accumulate * seconds_of(partial(training.model, x1, t, s, condition), device)
        seconds.append((seconds_of(partial(training.train_step, batch), device), forward))
    return seconds[FIRST:]


def measure(config: Config, world: World, timed: int) -> list[str]:
    """Measure a step of a configuration on synthetic data; returns what to print."""
    device, name = world.device, f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    rate = matmul_rate(device, getattr(torch, config.precision))
    least = least_step_flops(config.network(), detach_jvp=config.detach_jvp, guided=config.guided)
    counted = counted_step_flops(config)
    batches = Batches(config, load_data(config))
    pairs = step_seconds(Training(config, world), batches, timed)
    seconds = statistics.median(step for step, _ in pairs)
    forwards = statistics.median(step / forward for step, forward in pairs)  # of pairs, on a machine that others use
    speed = config.batch_size / seconds
    weights = sum(shape.numel() for shape in weights_of(config))
    of_least = f", {counted / least:.3f} of the least that it needs" if config.objective == "tvm" else ""
    return [
        f"{weights / 1e6:.4g} M weights, on {name}, PyTorch {torch.__version__}",
        f"matrix products in {config.precision}: {rate / 1e12:.3g} TFLOP/s measured",
        f"{counted / 1e9:.4g} GFLOP per image and step{of_least}",
        f"{1000 * seconds:.1f} ms per step, {speed:.4g} images per second, {peak_memory(device) / 2**30:.2f} GiB, "
        f"MFU {speed * (least if config.objective == 'tvm' else counted) / rate:.1%}",
        f"a step takes as long as {forwards:.1f} forwards of its batch without gradients",
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, 0."""
    command = parser()
    options = command.parse_args(argv)
    with command.errors(), distributed.process_group(options.device) as world:
        require_at_least(1, timed=options.timed)
        require(world.size == 1, "this runs as one process, on one device")
        config = replace(PRESETS[options.preset], **given(options, Config), data="synthetic")
        print(*measure(config, world, options.timed), sep="\n")
    return 0


if __name__ == "__main__":
    run(main)
