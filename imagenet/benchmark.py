"""What a training step costs: time, images per second, peak memory, arithmetic, and the share of it that is needed.

    python imagenet/benchmark.py                                                     digits, on a laptop
    python imagenet/benchmark.py imagenet256-w2 --batch-size 16 32 64
    python imagenet/benchmark.py imagenet256-w2 --attention plain fused --detach-jvp both --out cost.json
    python imagenet/benchmark.py imagenet256-w2 --compile --checkpointing            other ways to compute the same

Whole steps of train.py are timed, optimizer and averages included, on synthetic data, on one device; each row runs in a
process of its own, so that one that needs too much memory leaves the others alone. The table is that of figure 10 of
the paper: cost against batch size, for each attention and with or without gradients through the JVP.

    FLOP     floating-point operations of matrix products per image and step: those counted as they run, and the least
             that a TVM step needs (flops.py)
    memory   peak, on a GPU of allocated memory, on a CPU of the process beyond what it had before the model
    MFU      model FLOP utilisation: the least arithmetic of a step, over its time, over the rate at which this device
             multiplies large matrices (measured first)
"""

import itertools
import json
import multiprocessing
import re
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from imagenet import distributed
from imagenet.config import PRESETS, Config
from imagenet.cost.flops import counted_step_flops, least_step_flops, weights_of
from imagenet.data.batches import Batches
from imagenet.data.image_sets import Synthetic
from imagenet.distributed import World
from imagenet.model.dit import ATTENTION
from imagenet.training.step import Training
from tvm_ref.cli.errors import UserError
from tvm_ref.cli.files import require_new, write_atomically
from tvm_ref.cli.options import OneLineParser, add_options, require_at_least, run
from tvm_ref.cli.progress import progress

COMPUTED = ["precision", "compile", "checkpointing", "accumulate"]  # fields of Config that a row may change
DETACHED = {"no": (False,), "yes": (True,), "both": (False, True)}
MATRIX = {"cuda": 8192, "cpu": 1024}  # side of the matrices that the device's rate is measured with
REPEATS = 10  # of each measurement of that rate


@dataclass(frozen=True)
class Row:
    """The cost of one way of training; numbers are None if it failed.

    Attributes:
        batch_size: samples per step.
        attention: plain or fused.
        detach_jvp: no gradient through the JVP.
        step_seconds: median over steps.
        images_per_second: batch_size / step_seconds.
        peak_bytes: of memory.
        failure: why there are no numbers.
    """

    batch_size: int
    attention: str
    detach_jvp: bool
    step_seconds: float | None = None
    images_per_second: float | None = None
    peak_bytes: int | None = None
    failure: str | None = None


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("benchmark.py", __doc__)
    p.add_argument("preset", nargs="?", default="digits", choices=tuple(PRESETS), help="the default is digits")
    p.add_argument("--batch-size", type=int, nargs="+", default=[32], help="samples per step")
    p.add_argument("--attention", nargs="+", choices=tuple(ATTENTION), help="kinds (default: the preset's)")
    p.add_argument("--detach-jvp", choices=tuple(DETACHED), default="no", help="no gradient through the JVP")
    p.add_argument("--steps", type=int, default=10, help="steps timed")
    p.add_argument("--warmup", type=int, default=3, help="steps before, for kernels to be chosen")
    p.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")
    p.add_argument("--out", type=Path, help="write everything as JSON")
    add_options(p.add_argument_group("the configuration (defaults are the preset's)"), Config, COMPUTED)
    return p


# Measuring ----------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait until a GPU is done with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second of large matrix products; the best of several."""
    n = MATRIX.get(device.type, MATRIX["cpu"])
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(REPEATS):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds)


def step_seconds(training: Training, batches: Batches, steps: int, warmup: int) -> list[float]:
    """Time each of `steps` training steps, after `warmup` others; making the batch is not counted."""
    seconds = []
    for step in range(warmup + steps):
        batch = batches[step]
        synchronize(training.world.device)
        started = time.perf_counter()
        training.train_step(batch)
        synchronize(training.world.device)
        seconds.append(time.perf_counter() - started)
    return seconds[warmup:]


def peak_bytes(device: torch.device) -> int:
    """Return the most memory used so far: allocated on a GPU, held by this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose ru_maxrss begins with the peak of the process that started this one
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(config: Config, device: str, steps: int, warmup: int) -> Row:
    """Measure a configuration. It runs alone in a process, or memory on a CPU means nothing."""
    world = World(0, 1, torch.device(device))
    row = Row(config.batch_size, config.attention, config.detach_jvp)
    before = 0 if world.device.type == "cuda" else peak_bytes(world.device)
    try:
        data = Synthetic((config.in_channels, config.input_size, config.input_size), config.classes)
        seconds = statistics.median(step_seconds(Training(config, world), Batches(config, data), steps, warmup))
    except torch.OutOfMemoryError:
        return replace(row, failure="out of memory")
    except (ValueError, RuntimeError) as error:
        return replace(row, failure=str(error).strip().splitlines()[0])
    return replace(
        row,
        step_seconds=seconds,
        images_per_second=config.batch_size / seconds,
        peak_bytes=peak_bytes(world.device) - before,
    )


def measure_apart(config: Config, device: str, steps: int, warmup: int) -> Row:
    """Call `measure` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure, config, device, steps, warmup).result()
        except BrokenProcessPool:
            row = Row(config.batch_size, config.attention, config.detach_jvp)
            return replace(row, failure="its process was killed; likely out of memory")


# The command --------------------------------------------------------------------------------------------------------


def detaching(config: Config, detach: bool) -> dict[str, Any]:
    """Return an objective's settings with the gradient through the JVP stopped, or not."""
    others = {name: value for name, value in config.settings.items() if name != "detach_jvp"}
    return others | ({"detach_jvp": True} if detach else {})


def configurations(
    config: Config, batch_sizes: Sequence[int], attention: Sequence[str], detached: Sequence[bool]
) -> list[Config]:
    """Combine a configuration with every batch size, kind of attention and treatment of the JVP, on synthetic data.

    Raises:
        ValueError: values that do not go together, or attention that cannot be had here.
    """
    for kind in attention:
        ATTENTION[kind]()
    return [
        replace(config, data="synthetic", batch_size=batch_size, attention=kind, settings=detaching(config, detach))
        for kind, detach, batch_size in itertools.product(attention, detached, batch_sizes)
    ]


def arithmetic(config: Config) -> dict[str, float]:
    """Count the FLOP of a step per image: the least, and as run."""
    least = least_step_flops(config.network(), detach_jvp=config.detach_jvp, guided=config.guided)
    counted = counted_step_flops(config)
    return {"least": least, "counted": counted, "ratio": counted / least}


def measure_all(configs: list[Config], device: torch.device, steps: int = 10, warmup: int = 3) -> dict[str, Any]:
    """Measure configurations that differ in batch size, attention and treatment of the JVP.

    Args:
        configs: the rows.
        device: where to run.
        steps: steps timed.
        warmup: steps before.

    Returns:
        what --out holds, but for the preset's name.
    """
    first = configs[0]
    flops = {
        str(detached).lower(): arithmetic(replace(first, settings=detaching(first, detached)))
        for detached in dict.fromkeys(c.detach_jvp for c in configs)
    }
    rate = matmul_rate(device, getattr(torch, first.precision))
    rows = []
    for config in progress(configs, unit="row", desc="measuring"):
        row = measure_apart(config, str(device), steps, warmup)
        needed = flops[str(config.detach_jvp).lower()]["least"]
        achieved = None if row.images_per_second is None else row.images_per_second * needed
        rows.append(asdict(row) | {"mfu": achieved and achieved / rate})
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
        "parameters": sum(shape.numel() for shape in weights_of(first)),
        "matmul_flops_per_second": rate,
        "config": {name: getattr(first, name) for name in COMPUTED},
        "flops": flops,
        "rows": rows,
    }


def table(report: dict[str, Any]) -> str:
    """Format the report."""
    rate = report["matmul_flops_per_second"] / 1e12
    lines = [
        f"{report['preset']}, {report['parameters'] / 1e6:.4g} M weights, on {report['device']}, "
        f"PyTorch {report['torch']}",
        f"matrix products in {report['config']['precision']}: {rate:.3g} TFLOP/s measured",
    ]
    for detached, flops in report["flops"].items():
        what = "JVP detached: " if detached == "true" else ""
        counted, ratio = flops["counted"] / 1e9, flops["ratio"]
        lines.append(f"{what}{counted:.4g} GFLOP per image and step, {ratio:.3f} of the least that it needs")
    lines.append(f"{'batch':>6}  {'attention':<10}{'JVP':<10}{'step':>10}{'images/s':>10}{'memory':>11}{'MFU':>8}")
    for row in report["rows"]:
        name = f"{row['batch_size']:>6}  {row['attention']:<10}{'detached' if row['detach_jvp'] else 'whole':<10}"
        if row["failure"]:
            lines.append(f"{name}  {row['failure']}")
            continue
        cells = f"{1000 * row['step_seconds']:>7.1f} ms{row['images_per_second']:>10.4g}"
        lines.append(f"{name}{cells}{row['peak_bytes'] / 2**30:>7.2f} GiB{100 * row['mfu']:>6.1f} %")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 every row failed."""
    command = parser()
    options = command.parse_args(argv)
    with command.errors():
        require_at_least(1, batch_size=min(options.batch_size), steps=options.steps)
        require_at_least(0, warmup=options.warmup)
        require_new(options.out)
        config = replace(
            PRESETS[options.preset], **{name: getattr(options, name) for name in COMPUTED if hasattr(options, name)}
        )
        configs = configurations(
            config, options.batch_size, options.attention or [config.attention], DETACHED[options.detach_jvp]
        )
        with distributed.process_group(options.device) as world:
            if world.size > 1:
                raise UserError("this runs as one process, on one device")
            report = {"preset": options.preset} | measure_all(configs, world.device, options.steps, options.warmup)
        print(table(report))
        if options.out is not None:
            write_atomically(options.out, json.dumps(report, indent=2) + "\n")
    return int(all(row["failure"] for row in report["rows"]))


if __name__ == "__main__":
    run(main)
